"""Files that are there whole or not at all, and on the disk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Buffer


def write_whole(path: Path, data: Buffer) -> None:
    """Put data at path, whole or not at all, and on the disk before returning.

    Raises:
        OSError: as open and write do; what was at path before is still there.
    """
    temporary = path.with_name(f".{path.name}.tmp")  # mkstemp's would be readable to its owner only
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the new name itself; Windows can not open a folder
        flush(path.parent)


def flush(path: Path) -> None:
    """Have what was written to a file, or the names in a folder, on the disk before returning."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
