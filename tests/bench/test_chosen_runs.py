"""The rule that chooses the run of a document: no figure takes part in it."""

import dataclasses
import subprocess

import pytest

from peakgpt.bench.chosen_runs import ANY, Group, History, Run, choose
from peakgpt.bench.schema import Result, write_results
from peakgpt.bench.timing import Timing, Turns

COMMITS = ["c" * 40, "b" * 40, "a" * 40]  # the newest first
GROUP = Group(bench="train", dtype="float32", case={"batch": 4, "tokens": ANY}, contenders=("peakgpt", "eager"))


def row(contender, seconds=1.0, **changes):
    fields = {"bench": "train", "case": {"batch": 4, "tokens": 256}, "contender": contender, "backend": "",
              "device": "cpu", "dtype": "float32", **changes}  # fmt: skip
    return Result.of(Timing((seconds,) * 7), **fields)


def run(tmp_path, name, commit, *, date="2026-11-21T10:00:00", ours_s=1.0, contenders=("peakgpt", "eager"), suite=None,
        **changes):  # fmt: skip
    """Write a file of results and load it; a contender other than peakgpt takes 2 s."""
    results = [row(c, ours_s if c == "peakgpt" else 2.0, **changes) for c in contenders]
    environment = {"commit": commit, "date": date, **({"suite": suite} if suite else {})}
    write_results(tmp_path / f"{name}.json", results, environment)
    return Run.load(tmp_path / f"{name}.json")


def chosen(runs, releases=(), group=GROUP):
    return choose(group, runs, History(COMMITS, releases)).run.path.stem


def test_newest_commit_is_chosen_and_not_the_best_run(tmp_path):
    """Fails if the figure, the name of the file or the date comes before the commit."""
    runs = [
        run(tmp_path, "z-best", "a" * 40, ours_s=0.1, date="2026-11-25"),
        run(tmp_path, "old", "b" * 12, ours_s=0.5),
        run(tmp_path, "a-newest", "c" * 40, ours_s=1.9, date="2026-11-01"),
    ]
    assert chosen(runs) == chosen(runs[::-1]) == "a-newest"


def test_newest_run_of_a_commit_is_chosen(tmp_path):
    times = {"first": ("10:00", 0.5), "last": ("12:00", 1.5), "between": ("11:00", 1.0)}
    runs = [run(tmp_path, name, "c" * 40, date=f"2026-11-21T{time}", ours_s=s) for name, (time, s) in times.items()]
    assert chosen(runs) == chosen(runs[::-1]) == "last"


def test_release_comes_before_a_newer_commit_without_one(tmp_path):
    runs = [run(tmp_path, "old-release", "a" * 40), run(tmp_path, "release", "b" * 40), run(tmp_path, "work", "c" * 40)]
    assert chosen(runs, releases=["b" * 40, "a" * 40]) == "release" and chosen(runs) == "work"
    assert chosen(runs[::2], releases=["b" * 40, "a" * 40]) == "old-release"


@pytest.mark.parametrize(
    "damage",
    [{"commit": "c" * 40 + "+dirty"}, {"commit": "d" * 40}, {"commit": "c"}, {"contenders": ("peakgpt",)},
     {"suite": {"cases": ["x", "y"], "finished": ["x"]}}, {"dtype": "bfloat16"},
     {"case": {"batch": 4, "tokens": 256, "recompute": "norm"}}, {"case": {"batch": 1, "tokens": 256}}],
    ids=str,
)  # fmt: skip
def test_run_with_changes_unknown_commit_or_without_a_row_is_not_eligible(tmp_path, damage):
    bad = run(tmp_path, "bad", **{"commit": "c" * 40, **damage})
    good = run(tmp_path, "good", "a" * 40, case={"batch": 4, "tokens": 512}, suite={"cases": ["x"], "finished": ["x"]})
    assert chosen([bad, good]) == "good"
    with pytest.raises(ValueError, match="no complete run at a known commit"):
        chosen([bad])


def test_run_without_the_times_of_its_rounds_has_no_ratios(tmp_path):
    old = run(tmp_path, "old", "c" * 40)
    old.results[:] = [dataclasses.replace(row, samples_s=[], turns=Turns()) for row in old.results]
    assert chosen([old, run(tmp_path, "good", "a" * 40)]) == "good"
    assert chosen([old], group=dataclasses.replace(GROUP, contenders=("peakgpt",))) == "old"


def test_history_lists_commits_and_releases_newest_first(tmp_path):
    def git(*arguments):
        command = ["git", "-c", "user.name=n", "-c", "user.email=e", "-C", str(tmp_path), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    with pytest.raises(ValueError, match="complete git history"):
        History.of(tmp_path)
    git("init", "-q")
    commits = []
    for name in ("one", "two", "three"):
        git("commit", "-q", "--allow-empty", "-m", name, "--date", f"2026-11-2{len(commits)}T10:00:00")
        commits.append(git("rev-parse", "HEAD"))
    git("tag", "v1", commits[0])
    git("tag", "-a", "v2", "-m", "annotated", commits[1])
    git("tag", "other", commits[2])
    history = History.of(tmp_path)
    assert set(history.commits) == set(commits) and set(history.releases) == set(commits[:2])
    assert history.find(commits[0][:12]) == commits[0]
