"""Standard output that its reader may close while a long command runs, as `head` does."""

from __future__ import annotations

import contextlib
import os
import sys
import time

PIPE_EXIT_CODE = 141  # 128 + SIGPIPE: what shells show for a command whose output nobody reads any more


class Output:
    """Prints lines. A closed output is no error, so that a command can save before it ends.

    Attributes:
        lost: whether standard output was closed by its reader; later lines are dropped.
    """

    def __init__(self):
        self.lost, self._said_s = False, time.monotonic()

    @property
    def silent_s(self) -> float:
        """Seconds since the last line."""
        return time.monotonic() - self._said_s

    def say(self, text: str) -> None:
        """Print a line and flush it."""
        self._said_s = time.monotonic()
        try:
            print(text, flush=True)
        except OSError:  # a closed pipe, or a terminal that is gone
            self.lost = True
            discard_output()


def discard_output() -> None:
    """Send standard output to the null device, so that the flush at exit does not fail again."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # no file behind it, as in tests
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
