"""Standard output that its reader may close while a long command runs, as `head` does."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from typing import Any

PIPE_EXIT_CODE = 141  # 128 + SIGPIPE: what shells show for a command whose output nobody reads any more


class Output:
    """Standard output as a text stream. A closed output is no error, so that a command can save before it ends.

    Attributes:
        lost: whether standard output was closed by its reader; later text is dropped.
    """

    def __init__(self):
        self.lost, self._said_s = False, time.monotonic()

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stdout, name)

    @property
    def silent_s(self) -> float:
        """Seconds since the last text."""
        return time.monotonic() - self._said_s

    def say(self, text: str) -> None:
        """Print a line and flush it."""
        self.write(f"{text}\n")

    def write(self, text: str) -> int:
        """Write text and flush it."""
        self._said_s = time.monotonic()
        try:
            sys.stdout.write(text)
            sys.stdout.flush()
        except OSError:  # a closed pipe, or a terminal that is gone
            self.lost = True
            discard_output()
        return len(text)

    def flush(self) -> None:
        """Do nothing: `write` has flushed."""


def discard_output() -> None:
    """Send standard output to the null device, so that the flush at exit does not fail again."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # no file behind it, as in tests
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
