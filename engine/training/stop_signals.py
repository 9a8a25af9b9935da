"""Signals that end a training run between two steps instead of inside one."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

# Ctrl-C, `kill`, and a closed terminal, which Windows does not have.
STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class StopRequest:
    """Whether a signal has asked the run to stop, and which one."""

    signal: int | None = None

    def __call__(self) -> bool:
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """The exit code that shells give a command which this signal ended; 0 without a signal."""
        return 0 if self.signal is None else 128 + self.signal


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn the first Ctrl-C, SIGTERM or SIGHUP into a request to stop; the second one acts as usual, at once.

    A run resumes bit for bit only from a state between two steps, so the training loop checks for the request there.
    SIGTERM or SIGHUP that is ignored, as SIGHUP is under nohup, stays ignored. Main thread only.
    """
    request = StopRequest()

    def stop(number: int, _: Any) -> None:
        request.signal = number
        restore()

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    handlers = {number: signal.getsignal(number) for number in STOPPING}
    previous = {
        number: handler
        for number, handler in handlers.items()
        if handler is not None and (handler is not signal.SIG_IGN or number == signal.SIGINT)
    }
    for number in previous:
        signal.signal(number, stop)
    try:
        yield request
    finally:
        restore()
