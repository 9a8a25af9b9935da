"""Writing files atomically and durably; locks; folders that are made and removed without harm to other processes."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

try:
    import fcntl
except ImportError:  # Windows: there are no locks, and no staging folder is swept
    fcntl = None

if TYPE_CHECKING:
    from typing_extensions import Buffer

STAGE = re.compile(r"\.incoming-[a-z0-9_]{8}")  # names of staging folders
ATTEMPTS = 100  # a folder that was just made may be removed by another process; more often than this is no accident


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file that replaces `path` at the end of the block, atomically and flushed to the disk.

    A crash or an exception in the block leaves the old content. Only one process at a time may write a path.

    Raises:
        OSError: the file cannot be written; the old file is unchanged.
    """
    temporary = path.with_name(f".{path.name}.tmp")  # not mkstemp, whose file only its owner can read
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # makes the rename durable; Windows cannot open a folder
        flush(path.parent)


def write_atomically(path: Path, data: Buffer) -> None:
    """Replace a file's content as `atomic_file` does.

    Raises:
        OSError: the file cannot be written; the old file is unchanged.
    """
    with atomic_file(path) as file:
        file.write(data)


def write_all(handle: int, data: Buffer) -> None:
    """Write all of the data to an open file; one system call may write less.

    Args:
        data: bytes, or an array of uint8.
    Raises:
        OSError: the file cannot be written.
    """
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(handle, rest) :]


def flush(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def lock(handle: int) -> bool:
    """Take the exclusive lock of an open file or folder, without waiting.

    The system frees the lock when the handle is closed, and so when the process ends in any way.

    Returns:
        False if the file system or the platform has no locks.
    Raises:
        BlockingIOError: another handle has the lock.
    """
    if fcntl is None:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


def is_open_at(handle: int, path: Path) -> bool:
    """Return whether the open file or folder is still the one at `path`: it was neither removed nor replaced."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def make_folders(path: Path) -> list[Path]:
    """Make a folder and its missing parents.

    Returns:
        The folders that this call made, the outermost first. Folders that another process made meanwhile are not
        among them.
    Raises:
        OSError: a folder cannot be made.
    """
    for _ in range(ATTEMPTS):
        made: list[Path] = []
        try:
            for folder in (*reversed(path.parents), path):
                if not folder.is_dir():
                    with contextlib.suppress(FileExistsError):
                        folder.mkdir()
                        made.append(folder)
            if path.is_dir():
                return made
            raise NotADirectoryError(None, "Not a directory", str(path))
        except FileNotFoundError:  # another process has removed a parent, because it was empty
            remove_empty_folders(made)
        except OSError:
            remove_empty_folders(made)
            raise
    raise FileNotFoundError(None, "its parents disappear", str(path))


def remove_empty_folders(folders: Sequence[Path]) -> None:
    """Remove the folders from the last to the first, and stop at one that is not empty."""
    with contextlib.suppress(OSError):
        for folder in reversed(folders):
            folder.rmdir()


def publish(folder: Path, target: Path) -> None:
    """Move a complete folder to its final name, atomically and durably. After a crash, `target` is complete or missing.

    Args:
        folder: in a staging folder. All files and folders in it are flushed before the move.
        target: beside the staging folder. A folder of that name is moved into the staging folder first.
    Raises:
        OSError: a file cannot be flushed or moved.
    """
    for path in [*folder.rglob("*"), folder]:
        flush(path)
    if target.exists():
        os.rename(target, folder.with_name(f"replaced-{target.name}"))
    os.rename(folder, target)
    flush(target.parent)


@contextlib.contextmanager
def staging_folder(folder: Path) -> Iterator[Path]:
    """Make a hidden folder inside `folder`, and delete it afterwards with everything in it.

    The hidden folders of processes that were killed are deleted first.
    """
    sweep(folder)
    stage, handle = _locked_stage(folder)
    try:
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        os.close(handle)


def _locked_stage(folder: Path) -> tuple[Path, int]:
    """Make a staging folder that `sweep` does not touch while this process lives. Returns it and its locked handle."""
    for _ in range(ATTEMPTS):
        stage = Path(tempfile.mkdtemp(prefix=".incoming-", dir=folder))
        try:
            handle = os.open(stage, os.O_RDONLY)
        except FileNotFoundError:  # swept already
            continue
        with contextlib.suppress(BlockingIOError):  # it is being swept
            lock(handle)
            if is_open_at(handle, stage):
                return stage, handle
        os.close(handle)
    raise FileNotFoundError(None, "staging folders disappear", str(folder))


def sweep(folder: Path) -> None:
    """Delete the staging folders whose process has ended."""
    for stage in list(folder.iterdir()):
        if STAGE.fullmatch(stage.name) is None or stage.is_symlink() or not stage.is_dir():
            continue
        with contextlib.suppress(FileNotFoundError, PermissionError):
            handle = os.open(stage, os.O_RDONLY)
            with contextlib.suppress(BlockingIOError):  # its process lives
                if lock(handle):
                    shutil.rmtree(stage, ignore_errors=True)
            os.close(handle)
