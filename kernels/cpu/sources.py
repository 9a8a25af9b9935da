"""Check that the extension exists and was built from the sources in the same tree. A wheel has no such sources."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import sys
import warnings
from pathlib import Path

CSRC = Path(__file__).resolve().parents[2] / "csrc"  # exists in an editable installation


def digest(folder: Path) -> str:
    """Return the SHA-256 of the sources, which setup.py compiles into the extension. Takes 1 ms."""
    files = sorted(path for path in folder.rglob("*") if path.suffix in {".cpp", ".h"} and path.is_file())
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


MISSING = (
    "the C++ extension is missing, because it did not compile: install a C++ compiler with OpenMP (such as g++) and "
    "reinstall peakgpt; `pip install -v` shows the messages of the compiler"
)


@functools.cache
def missing() -> str | None:
    """Return the reason why there is no extension, or None if its file exists. Warns once."""
    if "peakgpt._C" in sys.modules or importlib.util.find_spec("peakgpt._C"):
        return None
    warnings.warn(f"peakgpt: {MISSING}. Until then the eager backend runs on CPUs", stacklevel=2)
    return MISSING


@functools.cache
def objection(built_from: str) -> str | None:
    """Return the reason why an extension with this digest must not be called, or None. Warns once."""
    if not CSRC.is_dir() or digest(CSRC) == built_from:
        return None
    reason = f"the C++ extension was built from other sources than those in {CSRC}, run `pip install -e .` again"
    warnings.warn(f"peakgpt: {reason}; until then the eager backend runs", stacklevel=2)
    return reason
