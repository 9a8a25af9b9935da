"""The output of a benchmark run: tables, comparisons, notes, exit code, HTML page."""

import dataclasses
import json

import pytest

from peakgpt.bench.check import Check
from peakgpt.bench.isolated_jobs import run_part
from peakgpt.bench.report import comparisons, groups, notes, result_sections, speedup, tables, verdicts
from peakgpt.bench.run_results import Failure, RunResults, decode, encode
from peakgpt.bench.schema import Result
from peakgpt.bench.timing import Timing


def make_result(**changes):
    fields = {
        "bench": "op", "case": {"op": "mlp", "pass": "forward", "rows": 8}, "contender": "eager", "backend": "torch",
        "device": "cpu", "dtype": "float32",
    }  # fmt: skip
    timing = changes.pop("timing", Timing((0.2,)))
    return Result.of(timing, **{**fields, **changes})


def make_check(**changes):
    fields = {"op": "mlp", "case": {"rows": 8}, "backend": "cpu", "device": "cpu", "dtype": "float32", "passed": True,
              "error": 1e-7, "torch_error": 1e-7, "limit": 3e-7}  # fmt: skip
    return Check(**{**fields, **changes})


def test_speedup_and_groups():
    eager, ours = make_result(), make_result(contender="peakgpt", timing=Timing((0.1,)))
    other = make_result(case={"op": "mlp", "pass": "forward", "rows": 9})
    assert groups([eager, other, ours]) == [[eager, ours], [other]]
    assert speedup(ours, [eager, ours]) == pytest.approx(2.0)
    assert speedup(eager, [eager, ours]) is None and speedup(ours, [ours]) is None


def test_case_shows_heads_once():
    case = {"op": "attention_qkv", "pass": "forward", "heads": 3, "n_head": 3}
    assert "attention_qkv forward float32, heads 3  " in "\n".join(tables([make_result(case=case)]))


def test_tables_show_case_contender_and_used_columns():
    eager = make_result(flops=4e9, flops_kind="work", peak_flops_s=1e11)
    ours = make_result(contender="peakgpt", backend="cpu", timing=Timing((0.1,)), flops=4e9, flops_kind="work")
    text = "\n".join(tables([eager, ours]))
    lines = text.splitlines()
    assert "work FLOPs" in lines[1] and "GB/s" not in text, "a column without a figure is left out"
    assert lines[4].startswith("mlp forward float32, rows 8") and "20.0 %" in lines[4] and "20" in lines[4]
    assert "peakgpt (cpu)" in lines[5] and lines[5].endswith("2.00 x") and "mlp" not in lines[5]
    assert len({len(line) for line in lines[2:]}) == 1
    assert tables([]) == []


def test_comparisons_pair_times_by_round():
    """The machine is half as fast in every second round, so the times vary and their ratios do not."""
    ours = make_result(contender="peakgpt", timing=Timing((0.1, 0.2, 0.1, 0.2), dropped=1), memory_bytes=6 << 20,
                       base_bytes=2 << 20, flops=4e9, flops_kind="work", peak_flops_s=1e11)  # fmt: skip
    eager = make_result(timing=Timing((0.15, 0.3, 0.15, 0.3)), memory_bytes=12 << 20, base_bytes=2 << 20)
    other = make_result(contender="old", timing=Timing((0.2,)))
    row = comparisons([eager, ours, other])[0].splitlines()[-1].split("  ")
    assert [cell.strip() for cell in row if cell] == [
        "mlp forward float32, rows 8", "26.7 %", "eager", "1.50 x, too few rounds for an interval",
        "0.50 x", "0.40 x", "4 of 5",
    ]  # fmt: skip
    assert comparisons([eager]) == comparisons([ours, other]) == []
    bare = [dataclasses.replace(r, memory_bytes=None) for r in (ours, eager)]
    assert "memory" not in comparisons(bare)[0]


def test_notes_show_each_kind_once():
    disturbed = [make_result(timing=Timing((0.1,), dropped=2, note=f"only {n} of 9 rounds fitted")) for n in (3, 4, 5)]
    said = notes([*disturbed, make_result(peak_source="datasheet")])
    assert said == [
        "op: 2 of 3 rounds dropped",
        "only 3 of 9 rounds fitted (2 more like it)",
        "peak: datasheet",
    ]


def test_verdicts_and_exit_code():
    fine = RunResults(checks=[make_check()], failures=[Failure(message="no kernel", contender="sdpa cudnn")])
    assert fine.exit_code == 0 and "1 of 1 cases" in verdicts(fine)[0]
    for bad in (RunResults(checks=[make_check(passed=False, message="result 1: error 3e-2")]),
                RunResults(failures=[Failure(message="x", contender="peakgpt, gpu")]),
                RunResults(failures=[Failure(message="x", job="batch 8")])):  # fmt: skip
        assert bad.exit_code == 1 and len(verdicts(bad)) >= 1
    assert RunResults().exit_code == 0


def test_rows_round_trip_through_json():
    for row in (make_result(), make_check(), Failure(message="m", part="p", job="j")):
        assert decode(json.loads(json.dumps(encode(row)))) == row


def test_failure_has_no_absolute_paths(tmp_path, monkeypatch):
    (tmp_path / "peer.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ZeroDivisionError) as caught:
        run_part("peer", "", None)
    told = Failure.of(caught.value)
    for line in (
        'File "bench/isolated_jobs.py", line ',
        'File "importlib/__init__.py", line ',
        'File "peer.py", line 1',
    ):
        assert line in told.traceback
    assert 'File "/' not in told.traceback
    told = Failure(message=f"{tmp_path}/a.so: none, /other{tmp_path}/b.so: none")
    assert told.message == f"a.so: none, /other{tmp_path}/b.so: none"  # the end of a longer path stays


def test_results_are_sections_of_the_page():
    sections = result_sections([make_result(), make_result(contender="a<b")])
    assert "a&lt;b" in sections[0].body and "mlp forward float32, rows 8" in sections[0].body
    assert result_sections([]) == []
