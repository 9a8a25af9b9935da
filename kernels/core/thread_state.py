"""State that a `with` block sets for the calls of its thread only.

For CUDA tensors autograd runs backward, with any recomputed forward pass, in threads of its own. torch copies the
objects of `torch._C._stash_obj_in_tls` to them from the thread that calls backward. torch.compile cannot trace this
function. It traces the attributes of a `threading.local`, and guards on their values in the calling thread.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


class ThreadState(Generic[T]):
    """A value for the calls of one thread, and for the calls that autograd's threads make for it."""

    def __init__(self, name: str, default: T):
        """
        Args:
            name: unique in the process.
            default: the value outside of all blocks.
        """
        self._key, self._default, self._traced = f"peakgpt.{name}", default, _Traced(default)
        self._blocks, self._lock = 0, threading.Lock()

    def get(self) -> T:
        """Return the value that the innermost block of this thread has set."""
        return self._traced.value if torch.compiler.is_compiling() else self.get_eagerly()

    def get_eagerly(self) -> T:
        """Return the same in code that torch.compile does not trace, 0.1 us faster."""
        # No thread is in a block in most calls, so the first test is enough for them.
        return torch._C._get_obj_in_tls(self._key) if self._blocks and self._is_set() else self._default

    @contextlib.contextmanager
    def set_to(self, value: T) -> Iterator[None]:
        """Set the value inside the block."""
        outer, outer_traced, was_set = self.get(), self._traced.value, self._is_set()
        self._count(1)
        torch._C._stash_obj_in_tls(self._key, value)
        self._traced.value = value
        try:
            yield
        finally:
            self._traced.value = outer_traced
            if was_set:
                torch._C._stash_obj_in_tls(self._key, outer)
            else:
                torch._C._remove_obj_from_tls(self._key)
            self._count(-1)

    def _is_set(self) -> bool:
        return torch._C._is_key_in_tls(self._key)

    def _count(self, change: int) -> None:
        with self._lock:
            self._blocks += change


class _Traced(threading.local):
    def __init__(self, value: object):
        self.value = value  # set for every thread: torch.compile does not guard on an attribute of the class
