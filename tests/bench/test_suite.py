"""`peakgpt bench suite`: it prints and keeps each row, continues after a kill, and writes a report."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import fixed_peaks
import pytest
import tiny_suite

from peakgpt.bench import cases, environment, results_file, suite
from peakgpt.bench.case import Case
from peakgpt.cli import main

FIRST, SECOND = "ops/layernorm/rows=8,width=16/forward/float32", "ops/layernorm/rows=8,width=16/forward/bfloat16"


@pytest.fixture
def tiny(monkeypatch):
    """The suite has two tiny cases, the commit is known and clean, and all runs begin in the same second."""
    monkeypatch.setattr(results_file.time, "strftime", lambda form: "20260101-000000")
    fixed_peaks.use(monkeypatch)
    monkeypatch.setattr(suite, "suite_cases", lambda device: tiny_suite.plain_cases())
    monkeypatch.setattr(environment, "_commit", lambda: "a" * 40)


def bench(out, *flags):
    return main(["bench", "suite", "--device", "cpu", "--out", str(out), *flags])


def json_files(out):
    return [json.loads(path.read_text()) for path in sorted(out.glob("*.json"))]


def stop_at(monkeypatch, name, error=KeyboardInterrupt):
    """Let the case raise as if the run had been stopped in it; return the names of the measured cases."""
    measure, measured = Case.measure, []

    def stopping(case, device, on_failure):
        if case.name == name:
            on_failure("eager", RuntimeError("before the stop"))
            raise error
        measured.append(case.name)
        return measure(case, device, on_failure)

    monkeypatch.setattr(Case, "measure", stopping)
    return measured


def test_a_stopped_run_continues_with_the_missing_cases(tiny, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_at(patch, SECOND)
        assert bench(tmp_path) == 130
    (document,) = json_files(tmp_path)
    assert document["environment"]["suite"]["finished"] == [FIRST]
    assert {r["dtype"] for r in document["results"]} == {"float32"}
    before = document["results"]
    measured = stop_at(monkeypatch, "none")
    assert bench(tmp_path) == 0 and measured == [SECOND]
    (document,) = json_files(tmp_path)
    progress = document["environment"]["suite"]
    assert progress["finished"] == progress["cases"] == [FIRST, SECOND] and set(progress["seconds"]) == {FIRST, SECOND}
    assert document["results"][: len(before)] == before and len(document["results"]) == 2 * len(before)
    assert document["failures"] == [], "the failures of the stopped case are those of its second measurement"
    assert "1 of 2 cases are finished" in capsys.readouterr().err
    assert bench(tmp_path) == 0 and len(json_files(tmp_path)) == 2, "a complete run is not continued"


@pytest.mark.parametrize("change", ["commit", "dirty", "threads", "cases"])
def test_a_run_of_another_commit_machine_or_selection_is_not_continued(change, tiny, tmp_path, monkeypatch):
    if change == "dirty":  # changes in the working tree have no name
        monkeypatch.setattr(environment, "_commit", lambda: "a" * 40 + "+dirty")
    with monkeypatch.context() as patch:
        stop_at(patch, SECOND)
        assert bench(tmp_path) == 130
    if change == "commit":
        monkeypatch.setattr(environment, "_commit", lambda: "b" * 40)
    if change == "threads":
        monkeypatch.setattr(environment.torch, "get_num_threads", lambda: 77)
    flags = ["--case", "*float32"] if change == "cases" else []
    measured = stop_at(monkeypatch, "none")
    assert bench(tmp_path, *flags) == 0
    assert measured == ([FIRST] if flags else [FIRST, SECOND]) and len(json_files(tmp_path)) == 2


KILLED = """
import os, signal, sys
import tiny_suite
from peakgpt.bench import environment, suite
from peakgpt.bench.case import Case
from peakgpt.cli import main
environment._commit = lambda: "a" * 40
suite.suite_cases = lambda device: tiny_suite.plain_cases()
measure = Case.measure
def killing(case, device, on_failure):
    if case.dtype == "bfloat16":
        os.kill(os.getpid(), signal.SIGKILL)
    return measure(case, device, on_failure)
Case.measure = killing
main(["bench", "suite", "--device", "cpu", "--out", sys.argv[1]])
"""


def test_a_killed_run_continues(tiny, tmp_path, monkeypatch):
    environment_of = {**os.environ, "PYTHONPATH": str(Path(tiny_suite.__file__).parent)}
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], env=environment_of, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert re.search(rb"case 1 of 2: ops.*\nop: .*, peakgpt: .* ms\n", killed.stderr), "each row is printed as it ends"
    measured = stop_at(monkeypatch, "none")
    assert bench(tmp_path) == 0 and measured == [SECOND]
    (document,) = json_files(tmp_path)
    assert [(r["dtype"], r["contender"]) for r in document["results"]] == [
        (dtype, name) for dtype in ("float32", "bfloat16") for name in ("peakgpt", "eager")
    ]


def test_report_has_text_charts_and_tables_and_loads_nothing(tiny, tmp_path, capsys):
    assert bench(tmp_path) == 0
    (page,), (text,) = ([p.read_text() for p in tmp_path.glob(f"*.{kind}")] for kind in ("html", "txt"))
    assert "layernorm forward float32, rows 8, width 16" in text and "peakgpt against each contender" in text
    assert text.strip() in capsys.readouterr().out
    assert not re.search(r"src\s*=|href\s*=\s*[\"'](?!#)|url\((?!#)|@import|<script", page)
    for part in ("prefers-color-scheme:dark", "width=device-width", "layernorm forward bfloat16, rows 8, width 16",
                 "2 of 2", "a" * 12, "GFLOP/s"):  # fmt: skip
        assert part in page
    assert page.count("<div class=bars>") == 2 and page.count("class=first") == 2
    widths = [float(width) for width in re.findall(r"<b style='width:([\d.]+)%'", page)]
    assert len(widths) == 4 and all(0 < width <= 100 for width in widths)


def test_list_prints_the_cases_and_measures_nothing(tiny, tmp_path, capsys):
    assert bench(tmp_path, "--list") == 0
    assert capsys.readouterr().out.splitlines() == [f"{FIRST}: peakgpt, eager", f"{SECOND}: peakgpt, eager"]
    assert not list(tmp_path.iterdir())


def test_readme_flag_takes_the_cases_of_the_readme(tmp_path, capsys):
    assert bench(tmp_path, "--list", "--readme") == 0
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == list(cases.README)
