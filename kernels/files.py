"""Writing files atomically and durably."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Buffer


def write_atomically(path: Path, data: Buffer) -> None:
    """Write a file so that it has its new content or its old one, never a part; flush it to the disk.

    Raises:
        OSError: as from open and write; the old file is unchanged.
    """
    temporary = path.with_name(f".{path.name}.tmp")  # mkstemp's file would be readable by its owner only
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the new name itself; Windows cannot open a folder
        flush(path.parent)


def flush(path: Path) -> None:
    """Flush a file's content, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
