"""`pytest bench/ --benchmark-only`: stored samples of interleaved cases reach pytest-benchmark, and all is reported."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CASE = "ops/layernorm/rows=8,width=16/forward/float32"


def run(tmp_path, *flags):
    """Run pytest on bench/ with the cases of tiny_suite."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # of xdist
    environment["PYTHONPATH"] = str(ROOT / "tests" / "helpers")
    command = [sys.executable, "-m", "pytest", str(ROOT / "bench"), "-p", "tiny_suite", "-p", "no:cacheprovider",
               "-rsxX", "-n0", f"--rootdir={ROOT}", f"--benchmark-storage={tmp_path / 'saved'}"]  # fmt: skip
    return subprocess.run([*command, *flags], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Return the folder, the finished process and the JSON of a run that is saved for a later comparison."""
    folder = tmp_path_factory.mktemp("suite")
    path = folder / "out.json"
    done = run(folder, "--benchmark-only", "--benchmark-save=first", f"--benchmark-json={path}")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done, json.loads(path.read_text())


def test_each_contender_reports_its_stored_samples_and_figures(ran):
    _, _, document = ran
    rows = {row["name"]: row for row in document["benchmarks"]}
    assert list(rows) == [f"test_speed[{case}/{name}]" for case in (CASE, CASE.replace("float32", "bfloat16"))
                          for name in ("peakgpt", "eager")]  # fmt: skip
    for row in rows.values():
        info, data = row["extra_info"], row["stats"]["data"]
        assert row["group"] == row["params"]["case"] and row["options"]["timer"] == "seconds"
        assert data == info["samples_s"] and len(data) == row["stats"]["rounds"]
        assert row["stats"]["median"] == pytest.approx(info["median_s"])
        assert 0 < info["peak_flops_share"] < 1 and 0 < info["bandwidth_share"] < 1 and "freed memory" in info["note"]
    ours, eager = (rows[f"test_speed[{CASE}/{name}]"] for name in ("peakgpt", "eager"))
    ratio = eager["stats"]["median"] / ours["stats"]["median"]
    assert ours["extra_info"]["times_as_fast_as_eager"] == pytest.approx(ratio)
    assert eager["extra_info"]["times_as_fast_as_eager"] is None
    assert document["machine_info"]["peakgpt"]["threads"] >= 1


def test_contender_that_is_not_timed_is_skipped_or_fails_with_its_reason(ran):
    _, done, _ = ran
    assert "SKIPPED [1] bench/test_speed/test_cases.py" in done.stdout
    assert ": another day" in done.stdout and ": not measured, rocket is not installed" in done.stdout
    assert re.search(r"XFAIL .*float32/broken\] - RuntimeError: no such kernel", done.stdout)


def test_table_has_our_columns_under_the_name_of_the_case(ran):
    _, done, _ = ran
    assert f"benchmark '{CASE}': 2 tests" in done.stdout
    assert re.search(r"\npeakgpt +\d+\.\d % FLOP/s +\d+\.\d % bytes/s +\d+\.\d\d x eager ", done.stdout)
    assert re.search(r"\nName \(time in \ws\) +Median +IQR +Rounds\n", done.stdout)


@pytest.fixture(scope="module")
def compared(ran):
    """Compare a run with the saved one, while our kernel is wrong."""
    flags = ("--benchmark-only", "--benchmark-compare", "-m", "readme", "-k", "peakgpt or eager", "-p", "broken_kernel")
    return run(ran[0], *flags)


def test_saved_run_is_compared_and_k_and_m_select(compared):
    table = compared.stdout[compared.stdout.index(f"benchmark '{CASE}': 2 tests") :]
    assert re.search(r"\neager +\d.*bytes/s \(NOW\) ", table) and re.search(r"\neager +\(0001_first\) ", table)
    assert "1 failed, 1 passed, 5 deselected" in compared.stdout


def test_failure_of_ours_is_a_failure(compared):
    assert compared.returncode == 1 and "layernorm: peakgpt: result 0 is off eager" in compared.stdout


def test_options_that_would_be_ignored_are_errors(tmp_path):
    done = run(tmp_path, "--benchmark-only", "--benchmark-min-rounds=3")
    assert done.returncode == 4 and "--benchmark-min-rounds=3: got it for bench/" in done.stderr


def test_plain_pytest_does_not_run_the_benchmarks(pytestconfig):
    assert pytestconfig.getini("testpaths") == ["tests"] and not list((ROOT / "tests").rglob("*test_speed*"))
