"""Writing files atomically and durably."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Buffer


def write_atomically(path: Path, data: Buffer) -> None:
    """Replace a file's content atomically and flush it to the disk. A crash leaves the old content or the new one.

    Raises:
        OSError: the file cannot be written; the old file is unchanged.
    """
    temporary = path.with_name(f".{path.name}.tmp")  # not mkstemp, whose file only its owner can read
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # makes the rename durable; Windows cannot open a folder
        flush(path.parent)


def flush(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
