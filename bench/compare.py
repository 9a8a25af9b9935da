"""Compare the results of two commits, or of two runs of one commit: `peakgpt bench compare A B`.

    speed of a round      log(time of the baseline / time of peakgpt), both of the same round of the same run
    test                  Mann-Whitney U of the speeds of A against those of B (Mann and Whitney 1947), one-sided
    null hypothesis       B is at most `margin` slower (faster) than A
    correction            Holm 1979 over both tests of all rows

The baseline, such as eager, is measured in both runs, so a change of the machine between the runs cancels. A row
without a baseline is compared by its times, and only if both runs are from one machine.

Two runs of one commit differ by more than their rounds show (RUN_TO_RUN). The margin is the difference that none of the
rows exceeds with 97.5 %; the tests reject one of the null hypotheses wrongly with 2.5 % at most. So a table of any
length has a false alarm in 5 % of the comparisons at most.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peakgpt.bench.chosen_runs import Run
from peakgpt.bench.intervals import CONFIDENCE, MIN_ROUNDS, RUN_TO_RUN
from peakgpt.bench.report import case_text
from peakgpt.bench.run_results import OURS
from peakgpt.bench.schema import Result, comparable
from peakgpt.bench.timing import ratio

ALPHA = 1 - CONFIDENCE  # one half for the margin, one half for the tests
BASELINES = ("eager", "torch fused", "transformers", "torch", "engine", "llama.cpp", "openvino", "compile")
MACHINE = ("device", "threads", "cpu_quota", "isa", "malloc")  # keys of the environment
MEDIAN_OF_ABSOLUTE = 0.6745  # of a standard normal variable
Rows = dict[str, dict[str, Result]]  # case -> contender -> row
DEFAULT_FOLDER = Path("bench", "results")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="A", help="a file of results, or a commit: all its files in the folder")
    parser.add_argument("b", metavar="B", help="the same for the newer commit")
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER, help=f"default: ./{DEFAULT_FOLDER}")


def run(args: argparse.Namespace) -> int:
    """
    Returns:
        1 if a row is slower, or if both are one commit and fewer than 95 % of the intervals overlap; else 0.
    Raises:
        ValueError: no file, no common row, or scipy is not installed.
    """
    runs_a, runs_b = (load(name, args.folder) for name in (args.a, args.b))
    changes = compare(runs_a, runs_b)
    print(*(change.line for change in changes), sep="\n")
    counts = Counter(change.verdict for change in changes)
    print("; ".join(f"{verdict}: {count}" for verdict, count in counts.items()))
    share, text = overlap(runs_a, runs_b)
    print(text)
    same_commit = {r.environment["commit"] for r in runs_a} == {r.environment["commit"] for r in runs_b}
    unstable = same_commit and share is not None and share < CONFIDENCE
    return int(counts["slower"] > 0 or unstable)


def load(name: str, folder: Path) -> list[Run]:
    """Return the runs of a file or of a commit, the oldest first.

    Raises:
        ValueError: there is no such file, and no file of such a commit.
    """
    if Path(name).is_file():
        return [Run.load(Path(name))]
    runs = [Run.load(path) for path in sorted(folder.glob("*.json"))]
    found = [run for run in runs if len(name) >= 7 and str(run.environment["commit"]).startswith(name)]
    if not found:
        raise ValueError(f"expected a file of results or a commit with results in {folder}, got {name!r}")
    return sorted(found, key=lambda run: run.environment["date"])


def rows_of(runs: Iterable[Run]) -> Rows:
    """Return the rows by case and contender; of a row that was measured again the newest."""
    rows: Rows = {}
    for run in runs:
        measured: Rows = {}
        for row in run.results:
            key = json.dumps([row.bench, row.dtype, row.device, sorted(row.case.items())])
            measured.setdefault(key, {})[row.contender] = row
        rows |= measured  # as a whole, because ratios need rows of one run
    return rows


@dataclass(frozen=True)
class Change:
    """A row of peakgpt in two runs: log speeds of its rounds, and what the test says."""

    text: str
    a: list[float]
    b: list[float]
    verdict: str = ""

    @property
    def line(self) -> str:
        factor = math.exp(statistics.median(self.b) - statistics.median(self.a))
        return f"{self.verdict}: {self.text}: {factor:.3f} x ({len(self.a)} and {len(self.b)} rounds)"


def compare(runs_a: Sequence[Run], runs_b: Sequence[Run]) -> list[Change]:
    """Test every row of peakgpt that both have.

    Raises:
        ValueError: no common row, or scipy is not installed.
    """
    a, b = rows_of(runs_a), rows_of(runs_b)
    one_machine = len({json.dumps([r.environment.get(k) for k in MACHINE]) for r in (*runs_a, *runs_b)}) == 1
    found = []
    for case, rows in a.items():
        for name in sorted(rows.keys() & b.get(case, {}).keys()):
            if name.startswith(OURS) and (change := _change(name, rows, b[case], one_machine=one_machine)):
                found.append(change)
    if not found:
        raise ValueError("got no row of peakgpt in both; rows without a baseline count only if the machine is the same")
    return judged(found)


def _change(name: str, a: Mapping[str, Result], b: Mapping[str, Result], *, one_machine: bool) -> Change | None:
    shared = [n for n in BASELINES if all(n in rows and comparable(rows[name], rows[n]) for rows in (a, b))]
    if not shared and not (one_machine and a[name].samples_s and b[name].samples_s):
        return None
    speeds = [_log_speeds(rows[name], rows[shared[0]] if shared else None) for rows in (a, b)]
    versus = f"versus {shared[0]}" if shared else "by its time"
    return Change(f"{a[name].bench}: {case_text(a[name])}, {name} {versus}", *speeds)


def _log_speeds(row: Result, baseline: Result | None) -> list[float]:
    others = baseline.samples_s if baseline else [1.0] * len(row.samples_s)
    return [math.log(other / ours) for other, ours in zip(others, row.samples_s, strict=True)]


def judged(changes: Sequence[Change]) -> list[Change]:
    """Return the changes with their verdicts: slower, faster, no difference, or too few rounds."""
    margin = log_margin(len(changes))
    tests = [p for change in changes for p in p_values(change.a, change.b, margin)]
    rejected = holm(tests, ALPHA / 2)
    return [
        replace(change, verdict=_verdict(change, slower=slower, faster=faster))
        for change, slower, faster in zip(changes, rejected[::2], rejected[1::2], strict=True)
    ]


def _verdict(change: Change, *, slower: bool, faster: bool) -> str:
    if slower or faster:
        return "slower" if slower else "faster"
    return "too few rounds" if min(len(change.a), len(change.b)) < MIN_ROUNDS else "no difference"


def log_margin(rows: int) -> float:
    """Return the log ratio that no row of two runs of one commit exceeds, with 1 - ALPHA / 2."""
    return math.sqrt(2) * RUN_TO_RUN * statistics.NormalDist().inv_cdf(1 - ALPHA / 4 / rows)


def p_values(a: Sequence[float], b: Sequence[float], margin: float) -> tuple[float, float]:
    """Return the p-values of "b is more than `margin` slower" and of "b is more than `margin` faster".

    Args:
        a, b: log speeds of the rounds.
        margin: log ratio.
    """
    try:
        from scipy.stats import mannwhitneyu  # takes 0.5 s to import
    except ImportError as error:
        raise ValueError("bench compare needs scipy: pip install 'peakgpt[bench]'") from error
    slower = mannwhitneyu([x + margin for x in b], a, alternative="less")
    faster = mannwhitneyu([x - margin for x in b], a, alternative="greater")
    return float(slower.pvalue), float(faster.pvalue)


def holm(p_values: Sequence[float], alpha: float) -> list[bool]:
    """Return which hypotheses Holm's procedure rejects: the k-th smallest of n p-values must be <= alpha / (n - k + 1).

    Holm 1979, "A Simple Sequentially Rejective Multiple Test Procedure".
    """
    rejected = [False] * len(p_values)
    for done, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        if p_values[i] > alpha / (len(p_values) - done):
            break
        rejected[i] = True
    return rejected


def overlap(runs_a: Sequence[Run], runs_b: Sequence[Run]) -> tuple[float | None, str]:
    """Return the share of ratios of peakgpt whose intervals overlap, None without any, and a line about them.

    The line also has the standard deviation of a run's log ratios, from the median of the differences between the runs.
    On a quiet machine with many rounds RUN_TO_RUN should not be below it.
    """
    a, b, overlaps, shifts = rows_of(runs_a), rows_of(runs_b), [], []
    for case in a.keys() & b.keys():
        for name in a[case].keys() & b[case].keys() - {OURS}:
            pairs: list[Any] = [(rows.get(OURS), rows[name]) for rows in (a[case], b[case])]
            if any(ours is None or not comparable(ours, other) for ours, other in pairs):
                continue
            first, second = (ratio(other.timing(), ours.timing()) for ours, other in pairs)
            if first.interval and second.interval:
                overlaps.append(first.overlaps(second))
                shifts.append(math.log(second.median / first.median))
    if not overlaps:
        return None, "no ratio has an interval in both"
    share = sum(overlaps) / len(overlaps)
    deviation = statistics.median(map(abs, shifts)) / MEDIAN_OF_ABSOLUTE / math.sqrt(2)
    spread = f"standard deviation of a run, its rounds included: {deviation:.2%}"
    return share, f"intervals overlap in {sum(overlaps)} of {len(overlaps)} ratios ({share:.1%}); {spread}"
