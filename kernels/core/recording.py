"""Whether this thread records its kernel calls to replay them later, and checks that each replay repeats.

kernels/cpu/recording.py records. A recorded step runs no Python, so a check of values must be a part of the recording.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from peakgpt.kernels.core.thread_state import ThreadState


class CannotRecord(RuntimeError):
    """A function cannot be recorded, or runs as fast without; the message says why."""


class Recorder(Protocol):
    """What records the calls of a thread."""

    def append(self, call: Callable[[], Any]) -> None:
        """Call a function at this place of each replay."""

    def capture_parallel(self, functions: Sequence[Callable[[], Tensor]]) -> list[Tensor]:
        """Record functions that run at the same time; [] if their order counts."""


_recorder: ThreadState[Recorder | None] = ThreadState("recorder", None)
record_with = _recorder.set_to  # a context manager
recorder = _recorder.get_eagerly  # the recorder of this thread, or None


def is_recording() -> bool:
    """Return whether this thread records."""
    return recorder() is not None


def run_or_record(check: Callable[..., Any], *args: Any, **options: Any) -> None:
    """Call a function that reads values of tensors now, or in each replay if this thread records."""
    running = recorder()
    if running is None:
        check(*args, **options)
    else:
        running.append(functools.partial(check, *args, **options))
