"""metrics.jsonl: one JSON object a line. A checkpoint marks its end, and a resumed run cuts it back to that mark."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peakgpt.engine.checkpoint.manifest import hash_start
from peakgpt.kernels.strict_json import dumps


class MetricsLog:
    """An open metrics.jsonl, with the digest of all its lines."""

    def __init__(self, path: Path, *, new: bool):
        """
        Args:
            new: the file must not exist. Of several processes that try, one succeeds.
        Raises:
            FileExistsError: it exists.
            OSError: it cannot be opened.
        """
        self.path = path
        self._file = open(path, "xb" if new else "ab", buffering=0)  # noqa: SIM115 as long as the run
        self._bytes, self._digest = 0, hashlib.sha256()

    def fileno(self) -> int:
        """Return the handle of the open file."""
        return self._file.fileno()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def read(self) -> None:
        """Compute the digest of what another process has written; call it once the file is locked."""
        self._bytes = self.path.stat().st_size
        self._digest = hash_start(self.path, self._bytes)

    def append(self, row: Mapping[str, Any]) -> None:
        """Append a line and hand it to the operating system, so that a kill of this process loses nothing.

        Raises:
            OSError: it cannot be written.
        """
        data = f"{dumps(row)}\n".encode()
        try:
            written = self._file.write(data)
        except OSError as error:
            raise OSError(f"{self.path}: {error.strerror}, expected space for a line of metrics") from None
        if written != len(data):
            raise OSError(f"{self.path}: got space for {written} bytes, expected {len(data)} for a line of metrics")
        self._bytes += len(data)
        self._digest.update(data)

    def mark(self) -> dict[str, Any]:
        """Return the size and the digest of all lines so far, for `cut`."""
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}

    def cut(self, size: int) -> None:
        """Drop all but the first `size` bytes, which a mark has counted.

        Raises:
            OSError: the file cannot be written.
        """
        self._file.truncate(size)
        self._file.seek(size)  # a file that this process has made is not in append mode
        self.read()

    def rows(self) -> list[dict[str, Any]]:
        """Return all lines."""
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]
