"""The wheel has all files of the tree; the extension matches its sources and loads no unwanted library."""

import os
import re
import subprocess
import sys
from pathlib import Path

import fixed_peaks
import pytest

from peakgpt.kernels.cpu import sources

ROOT = Path(__file__).parents[1]
FOLDERS = {"api": "peakgpt", "kernels": "peakgpt/kernels", "engine": "peakgpt/engine", "bench": "peakgpt/bench"}


# Loads the extension without the peakgpt package, because the package imports torch.
LOAD = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("peakgpt._C", sys.argv[1])
spec.loader.exec_module(importlib.util.module_from_spec(spec))
"""


def mapped_libraries(code: str, *args: str) -> set[str]:
    """Return the paths of the shared libraries that a new interpreter has loaded after it ran `code`."""
    code += "print(open('/proc/self/maps').read())\n"
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return {line.split()[-1] for line in done.stdout.splitlines() if ".so" in line}


@pytest.fixture
def extension():
    return pytest.importorskip("peakgpt._C", reason="the C++ extension is not built")


def test_package_has_every_file_of_the_tree(tmp_path):
    """Regression: a subpackage that setup.py does not list is not in the wheel, but works in an editable install."""
    commands = ["-q", "egg_info", "--egg-base", tmp_path, "build_py", "--build-lib", tmp_path]
    subprocess.run([sys.executable, "setup.py", *commands], cwd=ROOT, check=True, capture_output=True, timeout=120)
    expected = {
        Path(package, path.relative_to(ROOT / folder))
        for folder, package in FOLDERS.items()
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".py", ".html", ".css", ".js", ".toml"} or path.name == "py.typed"
        if "test_speed" not in path.parts  # needs pytest-benchmark, and runs from a checkout only
    }
    packaged = {path.relative_to(tmp_path) for path in (tmp_path / "peakgpt").rglob("*") if path.is_file()}
    assert packaged == expected


def test_sdist_has_the_files_that_documents_link_to(tmp_path):
    """Regression: the sdist had the README, but neither docs/ nor examples/."""
    subprocess.run([sys.executable, "setup.py", "-q", "egg_info", "--egg-base", tmp_path], cwd=ROOT, check=True,
                   capture_output=True, timeout=120)  # fmt: skip
    names = (tmp_path / "peakgpt.egg-info" / "SOURCES.txt").read_text().splitlines()
    packed = {Path(name) for name in names}
    packed |= {parent for name in packed for parent in name.parents}
    documents = [name for name in packed if name.suffix == ".md"]
    assert Path("README.md") in packed and Path("docs/dropin.md") in packed
    for document in documents:
        for link in re.findall(r"\]\(([\w./-]+)[)#]", (ROOT / document).read_text()):
            assert Path(os.path.normpath(document.parent / link)) in packed, f"{document} links {link}"


def test_metadata_has_a_license(tmp_path):
    subprocess.run([sys.executable, "setup.py", "-q", "egg_info", "--egg-base", tmp_path], cwd=ROOT, check=True,
                   capture_output=True, timeout=120)  # fmt: skip
    metadata = (tmp_path / "peakgpt.egg-info" / "PKG-INFO").read_text()
    assert "License-Expression: MIT" in metadata and "License-File: LICENSE" in metadata


def test_extension_is_built_from_these_sources(extension):
    """Regression: if an optional extension does not compile, the previous build stays installed."""
    assert extension.source_digest == sources.digest(ROOT / "csrc"), "csrc changed: reinstall with pip install -e ."


# Replaces the extension by an object without functions, so any call of it raises.
OUTDATED_EXTENSION = """
import sys, types, warnings
sys.modules["peakgpt._C"] = types.SimpleNamespace(source_digest="of older sources")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import peakgpt, torch
    from peakgpt.kernels.cpu.memory import keep_pages
    for op in (peakgpt.layernorm, peakgpt.linear):
        inputs = op.sample(device="cpu", dtype=torch.float32)
        op(*inputs)
        print(op.explain(*inputs)["cpu"])
print(keep_pages())
print(len([warning for warning in caught if "pip install -e ." in str(warning.message)]))
"""


def test_extension_built_from_other_sources_is_not_called():
    """Regression: after a pull the outdated extension was called with arguments that it does not know."""
    done = subprocess.run([sys.executable, "-c", OUTDATED_EXTENSION], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    *reasons, warning_count = done.stdout.splitlines()
    assert len(reasons) == 3 and all("other sources" in reason and "`pip install -e .`" in reason for reason in reasons)
    assert warning_count == "1"


# Hides the extension, as if no compiler had been there when peakgpt was installed.
MISSING_EXTENSION = """
import importlib.util, sys, warnings
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "peakgpt._C" else find_spec(name, *rest)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import peakgpt, torch
    for op in (peakgpt.layernorm, peakgpt.linear):
        inputs = op.sample(device="cpu", dtype=torch.float32)
        op(*inputs)
        print(op.explain(*inputs)["cpu"])
    import fixed_peaks
fixed_peaks.use()
print(str(peakgpt.doctor("cpu")).count("install a C++ compiler"))
print(len([warning for warning in caught if "install a C++ compiler" in str(warning.message)]))
"""


def test_missing_extension_is_named_once_with_the_way_out():
    """Regression: pip reports success without a compiler, and doctor said "cannot import name '_C'"."""
    environment = os.environ | {"PYTHONPATH": str(Path(fixed_peaks.__file__).parent)}
    done = subprocess.run([sys.executable, "-c", MISSING_EXTENSION], capture_output=True, text=True, timeout=300,
                          env=environment)  # fmt: skip
    assert done.returncode == 0, done.stderr
    *reasons, mentions, warning_count = done.stdout.splitlines()
    assert len(reasons) == 2 and all("install a C++ compiler with OpenMP" in reason for reason in reasons)
    assert mentions == "1" and warning_count == "1"


def test_extension_of_a_wheel_without_sources_is_called(monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "CSRC", tmp_path / "csrc")
    assert sources.objection("digest of the sources") is None


def test_digest_ignores_lock_files_of_editors(tmp_path):
    """Regression: a dangling link `.#file.cpp` made the import of peakgpt fail."""
    empty = sources.digest(tmp_path)
    (tmp_path / ".#adamw.cpp").symlink_to("nobody@nowhere")
    assert sources.digest(tmp_path) == empty


def test_extension_loads_without_torch(extension):
    """It links no library of torch, so one build works with every torch version."""
    libraries = mapped_libraries(LOAD, extension.__file__)
    assert extension.__file__ in libraries
    assert not {path for path in libraries if re.search(r"torch|libc10", Path(path).name)}


@pytest.mark.parametrize("code", ["import torch\n" + LOAD, LOAD + "import torch\n"], ids=["torch first", "torch last"])
def test_process_loads_one_openmp_runtime(extension, code):
    """Two runtimes in one process would have two thread pools on the same cores."""
    libraries = mapped_libraries(code, extension.__file__)
    runtimes = {path for path in libraries if re.match(r"lib(gomp|iomp5|omp)\b", Path(path).name)}
    assert len(runtimes) == 1, sorted(runtimes)
