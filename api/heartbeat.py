"""A line at least every 10 seconds from a long command, also where standard output is a pipe.

`Heartbeat` watches a stream. If nothing was written for INTERVAL_S seconds, a thread writes one line with the phase of
the command, so that no part of a command has to report by itself. Lines reach a pipe at once.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, TextIO

INTERVAL_S = 8.0
POLL_S = 1.0

_running: ContextVar[Heartbeat | None] = ContextVar("heartbeat", default=None)


class Heartbeat:
    """A text stream that writes through to another one, and knows when it was last written to."""

    def __init__(self, stream: TextIO, phase: str, clock: Callable[[], float] = time.monotonic):
        """
        Args:
            stream: gets the text.
            phase: what the command does, in a few words.
            clock: seconds.
        """
        self._stream, self._clock, self._lock = stream, clock, threading.Lock()
        self._written_s = clock()
        self.enter(phase)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write text; flush at the end of a line."""
        with self._lock:
            count = self._stream.write(text)
            if "\n" in text:
                self._stream.flush()
            self._written_s = self._clock()
        return count

    def close(self) -> None:
        """Flush. The standard stream stays open: absl's log handler takes this object for a file, and closes it."""
        self._stream.flush()

    def enter(self, phase: str) -> None:
        """Begin another phase."""
        self._phase, self._phase_s = phase, self._clock()

    def beat(self) -> None:
        """Write a line if the stream was silent for INTERVAL_S seconds."""
        if self._clock() - self._written_s >= INTERVAL_S:
            self.write(f"{self._phase}: {self._clock() - self._phase_s:.0f} s\n")


@contextlib.contextmanager
def heartbeat(name: str, phase: str) -> Iterator[None]:
    """Watch a standard stream while a command runs.

    Args:
        name: "stdout", or "stderr" for a command whose output other programs read.
        phase: the first phase.
    """
    before = getattr(sys, name)
    stream, stop = Heartbeat(before, phase), threading.Event()

    def run() -> None:
        while not stop.wait(POLL_S):
            with contextlib.suppress(OSError, ValueError):  # nobody reads the stream any more
                stream.beat()

    thread = threading.Thread(target=run, name="heartbeat", daemon=True)
    setattr(sys, name, stream)
    token = _running.set(stream)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        _running.reset(token)
        setattr(sys, name, before)


def enter_phase(phase: str) -> None:
    """Name what the running command does now; without effect if no heartbeat runs."""
    if (stream := _running.get()) is not None:
        stream.enter(phase)
