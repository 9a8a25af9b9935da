"""Foreach: an in-place op on many sets of tensors, in one launch where the backend has one for it.

A backend module offers it with two functions:

    prepare(table, device) -> prepared table         table: (calls, 1 + tensors) int64 on the CPU: the elements of the
                                                     first tensor, then the address of each tensor, 0 for None
    run_each(table, calls, *shared, **params)        runs the op for every row of a prepared table

Torch's optimizers do the same for lists of tensors (torch._foreach_*).
"""

from __future__ import annotations

import array
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from peakgpt.kernels.core import backends
from peakgpt.kernels.core.autograd import transformed
from peakgpt.kernels.core.backends import forced_backend
from peakgpt.kernels.core.dispatch import Op, is_plain

Call = Sequence["Tensor | None"]


profiler_enabled = torch._C._autograd._profiler_enabled


@dataclass(frozen=True, eq=False)
class Prepared:
    """What a list of tensors needs for its launch.

    Args:
        key: forced backend, sizes and addresses of the list.
        backend: the module that runs it, or None: the calls run one by one.
        table: from `backend.prepare`.
    """

    key: Any
    backend: ModuleType | None
    table: Any


class Foreach:
    """Runs one op on lists of tensors. It keeps the table of the last list, because most lists come again.

    Attributes:
        prepared: of the last list, a new object after each change. A CUDA graph that holds it may read its table.
    """

    def __init__(self, op: Op[..., Any]):
        self.op = op
        self.prepared = Prepared(None, None, None)

    def __call__(self, calls: Sequence[Call], *shared: Tensor | None, **params: Any) -> None:
        """Run op(*call, *shared, **params) for each call; one after the other where their first tensors overlap.

        Args:
            calls: the first tensors of the op for each call. They must fit together as the op demands, and have the
                same dtypes and device in all calls: only the first call is checked.
            shared: its other tensors.
            params: its parameters.
        Raises:
            ValueError: tensors or parameters that the op refuses, or a tensor without memory.
        """
        if torch.compiler.is_compiling() or transformed() or not is_plain([*calls[0], *shared]):
            return self._one_by_one(calls, shared, params)
        rows = array.array("q")
        for call in calls:
            rows.append(call[0].numel())
            rows.extend([0 if t is None else t.data_ptr() for t in call])
        key = forced_backend(), rows
        if key != self.prepared.key:
            self.prepared = self._prepare(key, calls, shared, params)
        if self.prepared.backend is None:
            return self._one_by_one(calls, shared, params)
        if profiler_enabled():  # record_function costs 10 us without a profiler, too
            with torch.profiler.record_function(f"peakgpt::{self.op.name}"):
                return self.prepared.backend.run_each(self.prepared.table, calls, *shared, **params)
        self.prepared.backend.run_each(self.prepared.table, calls, *shared, **params)

    def _prepare(self, key: Any, calls: Sequence[Call], shared: Call, params: dict[str, Any]) -> Prepared:
        forced, rows = key
        self.op.check(*calls[0], *shared, **params)
        if rows.count(0) > len(calls) * sum(t is None for t in calls[0]):
            self._expect_memory(calls)
        tensors = [*calls[0], *shared]
        backend = backends.choose(self.op, forced, tensors, params, (False,) * len(tensors))
        columns = 1 + len(calls[0])
        writes_first = self.op.tensor_names[0] in self.op.mutates
        overlap = writes_first and _overlap(rows[1::columns], rows[::columns], calls[0][0].element_size())
        if overlap or not hasattr(backend, "run_each"):
            return Prepared(key, None, None)
        table = torch.frombuffer(rows, dtype=torch.int64).view(-1, columns)
        return Prepared(key, backend, backend.prepare(table, calls[0][0].device))

    def _expect_memory(self, calls: Sequence[Call]) -> None:
        for call in calls:
            for name, t in zip(self.op.tensor_names, call, strict=False):
                if t is not None and t.numel() and not t.data_ptr():
                    raise ValueError(f"{self.op.name}: {name} has shape {tuple(t.shape)} and no memory")

    def _one_by_one(self, calls: Sequence[Call], shared: Call, params: dict[str, Any]) -> None:
        for call in calls:
            self.op(*call, *shared, **params)


def _overlap(addresses: Sequence[int], counts: Sequence[int], element_size: int) -> bool:
    """Return whether two contiguous tensors share memory."""
    spans = sorted(zip(addresses, counts, strict=True))
    return any(start + count * element_size > after for (start, count), (after, _) in itertools.pairwise(spans))
