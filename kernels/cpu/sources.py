"""Whether the extension is built from the sources that lie beside it; where it is installed alone there are none."""

from __future__ import annotations

import functools
import hashlib
import warnings
from pathlib import Path

CSRC = Path(__file__).resolve().parents[2] / "csrc"  # of a tree that is installed as it lies


def digest(folder: Path) -> str:
    """SHA-256 of the sources, as setup.py compiles it in; 1 ms."""
    files = sorted(path for path in folder.rglob("*") if path.suffix in {".cpp", ".h"} and path.is_file())
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


@functools.cache
def objection(built_from: str) -> str | None:
    """Why an extension built from sources of that digest may not be called, which a warning tells once, or None."""
    if not CSRC.is_dir() or digest(CSRC) == built_from:
        return None
    reason = f"the C++ extension is built from other sources than {CSRC} holds, run `pip install -e .` again"
    warnings.warn(f"peakgpt: {reason}; until then eager runs", stacklevel=2)
    return reason
