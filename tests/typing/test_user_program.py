"""A user's program runs, and pyright --strict finds no error in it that comes from peakgpt."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("user_program.py")


def link_package(folder: Path) -> None:
    """Link the checkout as folder/peakgpt: type checkers cannot follow the import hook of an editable install."""
    package = folder / "peakgpt"
    package.mkdir()
    for path in (ROOT / "api").iterdir():
        (package / path.name).symlink_to(path)
    for name in ("kernels", "engine", "bench"):
        (package / name).symlink_to(ROOT / name)


def test_user_program_runs(tmp_path):
    done = subprocess.run([sys.executable, PROGRAM], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("loss ") == 3 and done.stdout.count("torch.Size([1, 8, 2, 16])") == 2


def test_user_program_passes_pyright_strict(tmp_path):
    if importlib.util.find_spec("pyright") is None:
        pytest.skip("pyright is not installed: pip install pyright")
    if shutil.which("node") is None:
        pytest.skip("pyright needs Node.js, and there is no `node` on the PATH")
    link_package(tmp_path)
    shutil.copy(PROGRAM, tmp_path)
    config = {"include": [PROGRAM.name], "extraPaths": [str(tmp_path)], "typeCheckingMode": "strict"}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "pyright", "-p", tmp_path, "--pythonpath", sys.executable, "--outputjson"]
    env = {**os.environ, "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert done.stdout.startswith("{"), f"pyright did not run: {done.stdout}{done.stderr}"
    report = json.loads(done.stdout)
    errors = [f"line {d['range']['start']['line'] + 1}: {d['message']}" for d in report["generalDiagnostics"]]
    assert report["summary"]["filesAnalyzed"] == 1 and not errors, "\n".join(errors)


def test_every_exported_name_resolves():
    import peakgpt

    assert all(getattr(peakgpt, name) is not None for name in peakgpt.__all__)
    with pytest.raises(AttributeError, match="module 'peakgpt' has no attribute 'nothing'"):
        peakgpt.nothing  # noqa: B018
