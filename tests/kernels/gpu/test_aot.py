"""The static check passes for every kernel and chip, and rejects planted faults.

Kernels are compiled in new processes: this process may have TRITON_INTERPRET set, and then Triton compiles nothing.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")

from peakgpt.kernels import gpu
from peakgpt.kernels.gpu import static_check
from peakgpt.kernels.gpu.static_check import DEFAULT_TARGETS, TARGETS, Row

NEAREST = ("sm_80", "sm_90")  # each chip takes about 10 s of CPU time; the slow case compiles all rows for all chips
GOOD = Row(op="op", kernel="kernel", case="case", target="sm_80", warps=4, stages=1)


def python(*arguments, **environment):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=os.environ | environment)


@pytest.mark.parametrize(
    ("rows", "targets"), [(("--hot",), NEAREST), pytest.param((), TARGETS, marks=pytest.mark.slow)]
)
def test_every_kernel_passes_on_every_target(rows, targets):
    """The program starts with TRITON_INTERPRET set; its workers must ignore it."""
    assert set(NEAREST) < set(DEFAULT_TARGETS) < set(TARGETS)
    chosen = [word for target in targets for word in ("--target", target)]
    done = python("-m", "peakgpt.kernels.gpu.static_check", "--json", *rows, *chosen, TRITON_INTERPRET="1")
    rows = json.loads(done.stdout or "[]")
    faults = [f"{r['kernel']} {r['case']} {r['target']}: {r['failure']}" for r in rows if r["failure"]]
    assert not faults and done.returncode == 0, "\n".join([*faults, done.stderr[-2000:]])
    assert all(r["registers"] > 0 for r in rows)
    for target in targets:
        assert launched_kernels() == {r["kernel"] for r in rows if r["target"] == target}


def launched_kernels():
    """Return the names of the kernels that the source launches as `kernel[grid](...)`."""
    sources = "".join(path.read_text() for path in Path(gpu.__path__[0]).rglob("*.py"))
    defined = set(re.findall(r"@triton\.jit(?:\(.*\))?\s+def (\w+)", sources))
    return {name for name in defined if re.search(rf"\b{name}\[", sources)}


def test_planted_faults_fail_the_static_check():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).parents[2] / "helpers" / "planted_kernels.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    failures = json.loads(done.stdout)
    assert failures["good"] is None and failures["good without dot"] is None
    assert "spills: " in failures["too large"] and "shared memory: 262144 bytes" in failures["too large"]
    assert failures["spills without dot"].startswith("spills: ")
    assert failures["no dot"].startswith("no matrix instruction")
    assert failures["no store"].startswith("stores nothing") and "stores nothing" in failures["no store, dot expected"]
    assert failures["early"] is None and failures["early and hasty"].startswith("accesses memory before it waits")
    assert failures["broken"] == "does not compile: planted"


@pytest.mark.parametrize("failure", (None, "spills: 3 instructions"))
@pytest.mark.parametrize("as_json", (False, True))
def test_report_shows_failures_and_exit_code_is_1_for_any(failure, as_json, monkeypatch, capsys):
    monkeypatch.setattr(static_check, "check", lambda *_, **__: iter([GOOD, replace(GOOD, failure=failure)]))
    arguments = argparse.Namespace(target=None, op=None, json=as_json, hot=False)
    assert static_check.run(arguments) == int(failure is not None)
    out = capsys.readouterr().out
    if as_json:
        assert [row["failure"] for row in json.loads(out)] == [None, failure]
    else:
        assert [line.split("  ")[-1] for line in out.splitlines()[1:]] == ["ok", f"FAIL {failure}" if failure else "ok"]


def test_every_listed_module_has_cases():
    """Regression: a module without cases counted as passed."""
    assert not [op for op in static_check.ops() if not static_check._cases(op, "sm_90")]


@pytest.mark.parametrize("arguments", (("--target", "sm_1"), ("--op", "linear"), ("--nonsense",)))
def test_bad_arguments_exit_with_2_and_are_named(arguments):
    done = python("-m", "peakgpt", "aot", *arguments)
    assert done.returncode == 2 and arguments[-1] in done.stderr and "Traceback" not in done.stderr
