"""Progress lines of a long command on standard output."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time

SILENCE_S = 10.0  # a line is printed at least this often
PIPE_EXIT_CODE = 141  # 128 + SIGPIPE: what shells show for a command whose output nobody reads any more


class ProgressLines:
    """Prints lines at once, and says every SILENCE_S what is being done if nothing else was printed.

    Attributes:
        activity: what the lines between say, such as "training".
        lost: whether standard output was closed by its reader; later lines are dropped.
    """

    def __init__(self, activity: str, silence_s: float = SILENCE_S):
        self.activity, self.lost = activity, False
        self._silence_s, self._start_s = silence_s, time.monotonic()
        self._last_s = self._start_s
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="progress", daemon=True)

    def __enter__(self) -> ProgressLines:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def say(self, text: str) -> None:
        """Print a line and flush it. A closed output sets `lost`; it never raises."""
        with self._lock:
            self._last_s = time.monotonic()
            try:
                print(text, flush=True)
            except OSError:  # a closed pipe, or a terminal that is gone
                self.lost = True
                discard_output()

    @property
    def is_due(self) -> bool:
        """Whether the last line is SILENCE_S old."""
        return time.monotonic() - self._last_s >= self._silence_s

    def _watch(self) -> None:
        while not self._ended.wait(max(0.0, self._last_s + self._silence_s - time.monotonic())):
            if self.is_due:
                self.say(f"{self.activity}, {time.monotonic() - self._start_s:.0f} s")


def discard_output() -> None:
    """Send standard output to the null device, so that the flush at exit does not fail again."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # no file behind it, as in tests
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
