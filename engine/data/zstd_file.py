"""Read zstd files, and find out whether they end early: the readers of `zstandard` do not."""

from __future__ import annotations

import io
from types import ModuleType
from typing import TYPE_CHECKING, BinaryIO, cast

if TYPE_CHECKING:
    from typing_extensions import Buffer

CHUNK_BYTES = 1 << 17
MAX_WINDOW_BYTES = 1 << 31  # files of `zstd --long=31` too


class ZstdFile(io.RawIOBase):
    """A stream of the content of a file with one or more zstd frames."""

    def __init__(self, file: BinaryIO, zstandard: ModuleType):
        self._file, self._zstandard = file, zstandard
        self._begin()
        self._ready, self._between = memoryview(b""), True

    @classmethod
    def buffered(cls, file: BinaryIO, zstandard: ModuleType) -> BinaryIO:
        return cast("BinaryIO", io.BufferedReader(cls(file, zstandard), CHUNK_BYTES))

    def _begin(self) -> None:
        self._frame = self._zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES).decompressobj()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer) -> int:
        """Fill a part of `buffer`.

        Raises:
            EOFError: the file ends inside a frame.
            OSError: the file is damaged.
        """
        out = memoryview(buffer).cast("B")
        unread = b""
        while not self._ready:
            chunk = unread or self._file.read(CHUNK_BYTES)
            if not chunk:
                if not self._between:
                    raise EOFError("an end of the file inside a frame")
                return 0
            try:
                self._ready = memoryview(self._frame.decompress(chunk))
            except self._zstandard.ZstdError as error:
                raise OSError(str(error)) from None
            self._between, unread = self._frame.eof, b""
            if self._between:
                unread = self._frame.unused_data
                self._begin()
                if self._ready and unread:
                    self._file.seek(-len(unread), io.SEEK_CUR)
        count = min(len(out), len(self._ready))
        out[:count], self._ready = self._ready[:count], self._ready[count:]
        return count
