"""What is installed is what the tree holds: the wheel's files, the compiled sources, the extension's libraries."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from peakgpt.kernels.cpu import sources

ROOT = Path(__file__).parents[1]
FOLDERS = {"api": "peakgpt", "kernels": "peakgpt/kernels", "engine": "peakgpt/engine", "bench": "peakgpt/bench"}


# The extension without the package around it, which imports torch.
LOAD = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("peakgpt._C", sys.argv[1])
spec.loader.exec_module(importlib.util.module_from_spec(spec))
"""


def mapped_libraries(code: str, *args: str) -> set[str]:
    """Paths of the shared libraries in a fresh interpreter's memory after it ran `code`."""
    code += "print(open('/proc/self/maps').read())\n"
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return {line.split()[-1] for line in done.stdout.splitlines() if ".so" in line}


@pytest.fixture
def extension():
    return pytest.importorskip("peakgpt._C", reason="the C++ extension is not built")


def test_package_holds_every_file_of_the_tree(tmp_path):
    """Regression: a subpackage that setup.py does not list vanishes from the wheel yet works in an editable install."""
    commands = ["-q", "egg_info", "--egg-base", tmp_path, "build_py", "--build-lib", tmp_path]
    subprocess.run([sys.executable, "setup.py", *commands], cwd=ROOT, check=True, capture_output=True, timeout=120)
    expected = {
        Path(package, path.relative_to(ROOT / folder))
        for folder, package in FOLDERS.items()
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".py", ".html", ".css", ".js"} or path.name == "py.typed"
    }
    found = {path.relative_to(tmp_path) for path in (tmp_path / "peakgpt").rglob("*") if path.is_file()}
    assert found == expected


def test_extension_is_built_from_these_sources(extension):
    """Regression: an optional extension that stops compiling leaves the previous build in place."""
    assert extension.source_digest == sources.digest(ROOT / "csrc"), "csrc changed: reinstall with pip install -e ."


# An extension that may not be called: it has nothing to call.
OLDER = """
import sys, types, warnings
sys.modules["peakgpt._C"] = types.SimpleNamespace(source_digest="of older sources")
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    import peakgpt, torch
    from peakgpt.kernels.cpu.memory import keep_pages
    for op in (peakgpt.layernorm, peakgpt.linear):
        inputs = op.sample(device="cpu", dtype=torch.float32)
        op(*inputs)
        print(op.explain(*inputs)["cpu"])
print(keep_pages())
print(len([warning for warning in told if "pip install -e ." in str(warning.message)]))
"""


def test_an_extension_of_other_sources_is_not_called():
    """Regression: after a pull the extension of before was called, with arguments that it does not know."""
    done = subprocess.run([sys.executable, "-c", OLDER], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    *reasons, warned = done.stdout.splitlines()
    assert len(reasons) == 3 and all("other sources" in why and "`pip install -e .`" in why for why in reasons)
    assert warned == "1"


def test_an_extension_without_sources_beside_it_is_called(monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "CSRC", tmp_path / "csrc")
    assert sources.objection("of sources that are elsewhere") is None


def test_the_lock_of_an_editor_is_no_source(tmp_path):
    """Regression: a dangling link `.#file.cpp` would keep peakgpt from being imported."""
    empty = sources.digest(tmp_path)
    (tmp_path / ".#adamw.cpp").symlink_to("nobody@nowhere")
    assert sources.digest(tmp_path) == empty


def test_extension_needs_no_torch(extension):
    """It loads alone, and no library of torch comes with it, so one build serves every torch."""
    libraries = mapped_libraries(LOAD, extension.__file__)
    assert extension.__file__ in libraries
    assert not {path for path in libraries if re.search(r"torch|libc10", Path(path).name)}


@pytest.mark.parametrize("code", ["import torch\n" + LOAD, LOAD + "import torch\n"], ids=["torch first", "torch last"])
def test_one_openmp_runtime(extension, code):
    """Two runtimes in one process mean two pools of threads on the same cores."""
    libraries = mapped_libraries(code, extension.__file__)
    runtimes = {path for path in libraries if re.match(r"lib(gomp|iomp5|omp)\b", Path(path).name)}
    assert len(runtimes) == 1, sorted(runtimes)
