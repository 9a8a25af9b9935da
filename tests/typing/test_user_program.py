"""The program of a user runs, and `pyright --strict` accepts it."""

import importlib.machinery
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import fixed_peaks
import pytest

PROGRAM = Path(__file__).with_name("user_program.py")


def test_package_is_found_without_an_import_hook():
    """Type checkers search folders and path files; they cannot follow the import hook of an editable install."""
    spec = importlib.machinery.PathFinder.find_spec("peakgpt")
    assert spec is not None, "reinstall with pip install -e ."
    assert Path(spec.origin).with_name("py.typed").is_file()
    package = Path(spec.origin).parent
    assert all((package / name).exists() for name in ("cli.py", "kernels/core", "engine/gpt.py", "bench/schema.py"))


def test_user_program_runs(tmp_path):
    """With peaks that are not measured."""
    code = f"import fixed_peaks, runpy; fixed_peaks.use(); runpy.run_path({str(PROGRAM)!r}, run_name='__main__')"
    command, path = [sys.executable, "-c", code], {"PYTHONPATH": str(Path(fixed_peaks.__file__).parent)}
    completed = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300,
                               env=os.environ | path)  # fmt: skip
    assert completed.returncode == 0, completed.stderr
    assert completed.stdout.count("loss ") == 3 and completed.stdout.count("torch.Size([1, 8, 2, 16])") == 2


def test_user_program_passes_pyright_strict(tmp_path):
    if importlib.util.find_spec("pyright") is None:
        pytest.skip("pyright is not installed: pip install pyright")
    if shutil.which("node") is None:
        pytest.skip("pyright needs Node.js, and there is no `node` on the PATH")
    shutil.copy(PROGRAM, tmp_path)
    config = {"include": [PROGRAM.name], "typeCheckingMode": "strict"}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "pyright", "-p", tmp_path, "--pythonpath", sys.executable, "--outputjson"]
    env = {**os.environ, "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"}
    completed = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert completed.stdout.startswith("{"), f"pyright did not run: {completed.stdout}{completed.stderr}"
    report = json.loads(completed.stdout)
    errors = [f"line {d['range']['start']['line'] + 1}: {d['message']}" for d in report["generalDiagnostics"]]
    assert report["summary"]["filesAnalyzed"] == 1 and not errors, "\n".join(errors)


def test_every_exported_name_resolves():
    import peakgpt

    assert all(getattr(peakgpt, name) is not None for name in peakgpt.__all__)
    with pytest.raises(AttributeError, match="module 'peakgpt' has no attribute 'nothing'"):
        peakgpt.nothing  # noqa: B018
