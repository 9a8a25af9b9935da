"""Each op is a typed function for a type checker, with the signature of its eager function."""

import inspect
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from torch import Tensor

from peakgpt.kernels.core.dispatch import OPS
from peakgpt.kernels.ops import catalogue

ROOT = Path(__file__).parents[3]
PROGRAM = ROOT / "tests" / "typing" / "op_calls.py"


@pytest.mark.parametrize("name", sorted(catalogue.__all__))
def test_every_argument_and_result_is_annotated_and_documented(name):
    signature = inspect.signature(OPS[name].eager, eval_str=True)
    assert all(p.annotation is not p.empty for p in signature.parameters.values())
    expected = None if OPS[name].mutates else tuple[Tensor, Tensor] if len(OPS[name].outputs) == 2 else Tensor
    assert signature.return_annotation == expected
    assert inspect.signature(OPS[name]) == inspect.signature(OPS[name].eager) and OPS[name].__doc__


@pytest.fixture
def installed(tmp_path):
    """Python of a venv with peakgpt installed like a wheel, so that a type checker finds py.typed."""
    folder = tmp_path / "venv"
    venv.create(folder)
    python = folder / "bin" / "python"
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    paths = [sysconfig.get_path("purelib"), *(p for p in sys.path if p.endswith("site-packages"))]
    (site / "dependencies.pth").write_text("\n".join(dict.fromkeys(paths)))
    shutil.copytree(ROOT / "api", site / "peakgpt")
    for package in ("kernels", "engine", "bench"):
        ignored = shutil.ignore_patterns("results", "__pycache__")
        shutil.copytree(ROOT / package, site / "peakgpt" / package, ignore=ignored)
    return python


def test_pyright_strict_accepts_calls_of_every_op_and_finds_wrong_ones(installed, tmp_path):
    pytest.importorskip("pyright", reason="pyright is not installed")
    source = PROGRAM.read_text()
    project = tmp_path / "project"
    project.mkdir()
    (project / "op_calls.py").write_text(source)
    (project / "pyrightconfig.json").write_text('{"typeCheckingMode": "strict"}')
    done = subprocess.run(
        [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", installed, project],
        capture_output=True, text=True, timeout=600, env={**os.environ, "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"},
    )  # fmt: skip
    if not done.stdout.startswith("{"):
        pytest.skip(f"pyright does not start (it downloads node on first use): {(done.stderr or done.stdout)[-200:]}")
    report = json.loads(done.stdout)
    errors = {d["range"]["start"]["line"]: d["message"] for d in report["generalDiagnostics"]}
    expected = {i for i, line in enumerate(source.splitlines()) if "# type error" in line}
    assert errors.keys() == expected, report["generalDiagnostics"]
    assert report["summary"]["filesAnalyzed"] == 1
