"""`peakgpt bench compare`: regressions are found, two runs of one commit are not, for many rows at once."""

import numpy as np
import pytest

from peakgpt.bench import compare as module
from peakgpt.bench.compare import Change, holm, judged, load, log_margin, p_values
from peakgpt.bench.intervals import RUN_TO_RUN
from peakgpt.bench.schema import Result, write_results
from peakgpt.bench.timing import Timing, Turns
from peakgpt.cli import main

pytest.importorskip("scipy")
ENVIRONMENT = {"commit": "a" * 40, "date": "2026-11-28T10:00", "device": "x", "threads": 2, "isa": "", "malloc": {}}


def row(contender, samples, **changes):
    fields = {"bench": "op", "case": {"op": "mlp"}, "contender": contender, "backend": "", "device": "cpu",
              "dtype": "float32", **changes}  # fmt: skip
    timing = Timing(tuple(samples), turns=Turns(rounds=list(range(len(samples)))))
    return Result.of(timing, **fields)


def pair(rng, *, rounds=12, factor=1.0, machine=1.0, shift=0.0, rows=1):
    """Rows of peakgpt and eager on a machine whose speed changes between rounds, in some cases."""
    results = []
    for i in range(rows):
        speed = machine * np.exp(rng.normal(0, 0.3, rounds))
        noise = np.exp(rng.normal(shift if i == 0 else rng.normal(0, RUN_TO_RUN), 0.01, rounds))
        case = {"op": "mlp", "rows": i}
        results.append(row("eager", (2 * speed).tolist(), case=case))
        slower = factor if i == 0 else 1.0
        results.append(row("peakgpt", (speed * slower * noise).tolist(), case=case))
    return results


def write(path, results, **environment):
    write_results(path, results, {**ENVIRONMENT, **environment})
    return str(path)


def compared(tmp_path, capsys, a, b, **environment):
    paths = [write(tmp_path / "a.json", a), write(tmp_path / "b.json", b, **{"commit": "b" * 40, **environment})]
    code = main(["bench", "compare", *paths])
    return code, capsys.readouterr().out


def test_regression_of_one_row_among_sixty_is_found(tmp_path, capsys):
    """The second machine is half as fast, and both change from round to round: only the ratios by round show it."""
    rng = np.random.default_rng(0)
    code, out = compared(tmp_path, capsys, pair(rng, rows=60), pair(rng, rows=60, factor=1.1, machine=2.0))
    assert code == 1 and out.count("slower: op: mlp float32, rows 0, peakgpt versus eager: 0.9") == 1
    assert out.count("no difference: op") == 59 and "faster" not in out


def test_faster_row_is_no_regression(tmp_path, capsys):
    rng = np.random.default_rng(1)
    code, out = compared(tmp_path, capsys, pair(rng), pair(rng, factor=0.9))
    assert code == 0 and out.startswith("faster: op: mlp")


def test_few_of_many_equal_tables_have_a_false_alarm():
    """Two runs of one commit, 20 rows with shifts between the runs. Fails with the margin of one row."""
    rng, tables, alarms = np.random.default_rng(2), 60, 0
    for _ in range(tables):
        speeds = rng.normal(rng.normal(0, RUN_TO_RUN, (2, 20, 1)), 0.002, (2, 20, 12)).tolist()
        changes = judged([Change("", a, b) for a, b in zip(*speeds, strict=True)])
        alarms += any(change.verdict != "no difference" for change in changes)
    assert alarms <= 0.05 * tables


def test_change_within_the_margin_is_no_difference(tmp_path, capsys):
    rng = np.random.default_rng(3)
    code, out = compared(tmp_path, capsys, pair(rng, rounds=30), pair(rng, rounds=30, factor=1 + log_margin(1) / 2))
    assert code == 0 and out.startswith("no difference")


def test_three_rounds_are_too_few(tmp_path, capsys):
    rng = np.random.default_rng(4)
    code, out = compared(tmp_path, capsys, pair(rng, rounds=3), pair(rng, rounds=3, factor=1.5))
    assert code == 0 and out.startswith("too few rounds")


def test_row_without_a_baseline_needs_one_machine(tmp_path, capsys):
    times = ([1.0, 1.01, 1.02, 0.99, 0.98, 1.03, 1.0, 1.01], [1.5, 1.51, 1.52, 1.49, 1.48, 1.53, 1.5, 1.51])
    a, b = ([row("peakgpt", samples)] for samples in times)
    code, out = compared(tmp_path, capsys, a, b)
    assert code == 1 and "peakgpt by its time: 0.66" in out
    code, out = compared(tmp_path, capsys, a, b, threads=4)
    assert code == 2 and out == ""


def test_two_runs_of_one_commit_fail_if_their_intervals_do_not_overlap(tmp_path, capsys):
    rng = np.random.default_rng(5)
    code, out = compared(tmp_path, capsys, pair(rng, rows=20), pair(rng, rows=20), commit="a" * 40)
    assert code == 0 and "intervals overlap in 20 of 20 ratios (100.0%)" in out
    # One row in ten differs: faster, so it is no regression, but the interval has promised too much.
    rows = pair(rng, rows=10)
    code, out = compared(tmp_path, capsys, rows, pair(rng, rows=10, factor=0.8), commit="a" * 40)
    assert code == 1 and "intervals overlap in 9 of 10 ratios (90.0%)" in out


def test_holm_rejects_step_by_step():
    assert holm([0.01, 0.04, 0.03], 0.05) == [True, False, False]  # 0.03 > 0.05 / 2
    assert holm([0.01, 0.04, 0.02], 0.05) == [True, True, True]  # Bonferroni would reject the first only
    assert holm([], 0.05) == []


def test_commit_stands_for_its_files_and_a_row_measured_again_is_the_newest(tmp_path):
    write(tmp_path / "x.json", [row("peakgpt", [2.0])], date="2026-11-28T12:00")
    write(tmp_path / "y.json", [row("peakgpt", [1.0])], date="2026-11-28T11:00")
    write(tmp_path / "z.json", [row("peakgpt", [3.0])], commit="b" * 40)
    runs = load("a" * 7, tmp_path)
    assert [run.path.stem for run in runs] == ["y", "x"]
    ((contenders),) = module.rows_of(runs).values()
    assert contenders["peakgpt"].samples_s == [2.0]
    with pytest.raises(ValueError, match="got 'abcdefg'"):
        load("abcdefg", tmp_path)


def test_missing_scipy_is_one_sentence(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "scipy.stats", None)
    with pytest.raises(ValueError, match=r"bench compare needs scipy: pip install 'peakgpt\[bench\]'"):
        p_values([1.0], [1.0], 0.0)
