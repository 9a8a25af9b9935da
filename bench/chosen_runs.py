"""Which committed run a document shows: a rule that cannot choose the best one.

    eligible    a file of bench/results whose commit is in the history, without "+dirty", and with every contender that
                the table shows; a run of the suite that was stopped is not eligible
    chosen      of the newest release (tag v...) that has an eligible run; without one, of the newest commit. Of several
                runs of this commit the newest.

Each group (a case in one dtype) is chosen by itself. All contenders of a group are from the same run, and all its kept
rounds count. No figure takes part in the choice.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peakgpt.bench.schema import Result, read_results

ANY = "any value"  # of a size that the table states and that does not identify the case
DIRTY = "+dirty"


@dataclass(frozen=True, kw_only=True)
class Group:
    """A case whose contenders a table shows.

    Args:
        bench: `Result.bench`.
        dtype: `Result.dtype`.
        case: `Result.case`; a value may be ANY.
        contenders: that the table shows. A run without one of them is incomplete.
    """

    bench: str
    dtype: str
    case: Mapping[str, Any]
    contenders: tuple[str, ...]

    def holds(self, result: Result) -> bool:
        """Return whether a result belongs to the group."""
        same = (result.bench, result.dtype) == (self.bench, self.dtype) and result.case.keys() == self.case.keys()
        return same and all(value in (ANY, result.case[key]) for key, value in self.case.items())

    def is_in(self, rows: Mapping[str, Result]) -> bool:
        """Return whether all contenders are among the rows; several need the times of their rounds for ratios."""
        shown = [rows.get(name) for name in self.contenders]
        return all(row is not None and (len(shown) == 1 or row.samples_s) for row in shown)


@dataclass(frozen=True)
class History:
    """The commits that results may name.

    Args:
        commits: of the history, the newest first.
        releases: commits of the tags v..., the newest first.
    """

    commits: Sequence[str]
    releases: Sequence[str] = ()

    @classmethod
    def of(cls, root: Path) -> History:
        """Read the history of a checkout.

        Raises:
            ValueError: there is no complete git history.
        """
        if _git(root, "rev-parse", "--is-shallow-repository") != "false":
            raise ValueError(f"{root}: expected a checkout with its complete git history")
        tags = _git(root, "tag", "--list", "v*").split()
        tagged = {_git(root, "rev-parse", f"{tag}^{{commit}}") for tag in tags}
        commits = _git(root, "rev-list", "HEAD").split()
        return cls(commits, [commit for commit in commits if commit in tagged])

    def find(self, commit: str) -> str | None:
        """Return the full name of a commit of the history; None if it is unknown or has changes."""
        if not commit or len(commit) < 7 or commit.endswith(DIRTY):
            return None
        return next((known for known in self.commits if known.startswith(commit)), None)


@dataclass(frozen=True)
class Run:
    """A committed file of results."""

    path: Path
    results: list[Result]
    environment: dict[str, Any]

    @classmethod
    def load(cls, path: Path) -> Run:
        return cls(path, *read_results(path))

    @property
    def complete(self) -> bool:
        """Whether the run was not stopped. A run of one benchmark does not say which cases it has."""
        suite = self.environment.get("suite")
        return suite is None or set(suite["cases"]) == set(suite["finished"])


@dataclass(frozen=True)
class Shown:
    """The rows of a group in the run that the rule chose."""

    run: Run
    commit: str
    rows: dict[str, Result]  # by contender


def choose(group: Group, runs: Sequence[Run], history: History) -> Shown:
    """Return the rows that a document shows.

    Raises:
        ValueError: no eligible run.
    """
    found = []
    for run in runs:
        rows = {row.contender: row for row in run.results if group.holds(row)}
        commit = history.find(run.environment["commit"])
        if commit is None or not run.complete or not group.is_in(rows):
            continue
        release = history.releases.index(commit) if commit in history.releases else len(history.releases)
        age = (release, history.commits.index(commit))
        found.append(((age, _Newest(run.environment["date"])), Shown(run, commit, rows)))
    if not found:
        raise ValueError(f"no complete run at a known commit without changes has {group}")
    return min(found, key=lambda pair: pair[0])[1]


class _Newest(str):
    """A date in ISO format that is smaller the newer it is."""

    def __lt__(self, other: str) -> bool:
        return str.__gt__(self, other)


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
    return done.stdout.strip()
