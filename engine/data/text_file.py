"""Reading a text that a user names: a file or a pipe, never a device."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO


def read_text(path: Path | str) -> str:
    """Read a UTF-8 text.

    A pipe, such as `<(zcat text.gz)` of a shell, is read to its end. A named pipe that no process writes to would never
    end, and neither would a device such as /dev/zero.

    Raises:
        ValueError: the file is missing, a folder, a device or a pipe without a writer, or is not UTF-8.
    """
    try:
        return read_bytes(path).decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: {error}, expected UTF-8") from None


def read_bytes(path: Path | str) -> bytes:
    """Read the bytes of a text, as `read_text` does.

    Raises:
        ValueError: the file is missing, a folder, a device or a pipe without a writer.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # opening a pipe without a writer would block
        with open(handle, "rb") as file:
            first = _first_byte(handle, path)
            return first + file.read()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}, expected a text file") from None


def open_file(path: Path | str) -> BinaryIO:
    """Open a regular file, which can be read more than once.

    Raises:
        ValueError: the file is missing or cannot be read, or is a folder, a device or a pipe.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # opening a pipe without a writer would block
    except OSError as error:
        raise ValueError(f"{path}: got {error.strerror}, expected a file") from None
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe" if stat.S_ISFIFO(mode) else "a device"
        raise ValueError(f"{path}: got {kind}, expected a file")
    return open(handle, "rb")


def _first_byte(handle: int, path: Path | str) -> bytes:
    """Return the first byte of a pipe, b"" if its writer has not written yet or for a regular file."""
    mode, first = os.fstat(handle).st_mode, b""
    if stat.S_ISFIFO(mode):
        try:
            first = os.read(handle, 1)
        except BlockingIOError:  # there is a writer
            pass
        else:
            if not first:
                raise ValueError(f"{path}: got a pipe that no process writes to, expected a text file")
    elif not stat.S_ISREG(mode):
        raise ValueError(f"{path}: got a folder or a device, expected a text file")
    os.set_blocking(handle, True)
    return first
