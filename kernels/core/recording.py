"""Whether this thread records its kernel calls to replay them later, and checks that a replay must repeat.

kernels/cpu/recording.py records. A recorded step runs no Python, so a check of values must be a part of the recording.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from peakgpt.kernels.core.thread_state import ThreadState

Append = Callable[[Callable[[], Any]], None]

_append: ThreadState[Append | None] = ThreadState("recording", None)
record_to = _append.set_to  # a context manager; takes the function that appends a call to the recording


def is_recording() -> bool:
    """Return whether this thread records."""
    return _append.get_eagerly() is not None


def run_or_record(check: Callable[..., Any], *args: Any, **options: Any) -> None:
    """Call a function that reads values of tensors now, or in each replay if this thread records."""
    append = _append.get_eagerly()
    if append is None:
        check(*args, **options)
    else:
        append(functools.partial(check, *args, **options))
