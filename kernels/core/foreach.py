"""Foreach: an in-place op on many sets of tensors, in one launch where the backend has one for it.

A backend module offers it with two functions:

    prepare(calls) -> table                    addresses and sizes of the tensors, on the device that reads them
    run_each(table, calls, *shared, **params)  runs the op for every row of the table

Torch's optimizers do the same for lists of tensors (torch._foreach_*).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from peakgpt.kernels.core import backends
from peakgpt.kernels.core.backends import forced_backend
from peakgpt.kernels.core.dispatch import Op, _plain, _transformed

Call = Sequence["Tensor | None"]


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
            calls: the first tensors of the op for each call: all calls in the same dtypes and on one device.
            shared: its other tensors.
            params: its parameters.
        Raises:
            ValueError: tensors or parameters that the op refuses, or a tensor without memory.
        """
        if torch.compiler.is_compiling() or _transformed() or not _plain([*calls[0], *shared]):
            return self._one_by_one(calls, shared, params)
        key = forced_backend(), [0 if t is None else (t.data_ptr(), t.numel()) for call in calls for t in call]
        if key != self.prepared.key:
            self.prepared = self._prepare(key, calls, shared, params)
        if self.prepared.backend is None:
            return self._one_by_one(calls, shared, params)
        self.prepared.backend.run_each(self.prepared.table, calls, *shared, **params)

    def _prepare(self, key: Any, calls: Sequence[Call], shared: Call, params: dict[str, Any]) -> Prepared:
        for call in calls:
            for tensor in call:
                if tensor is not None and tensor.numel() and not tensor.data_ptr():
                    raise ValueError(f"{self.op.name}: a tensor of shape {tuple(tensor.shape)} has no memory")
            self.op.check(*call, *shared, **params)
        tensors = [*calls[0], *shared]
        backend = backends.choose(self.op, forced_backend(), tensors, params, (False,) * len(tensors))
        if not hasattr(backend, "run_each") or _overlap([call[0] for call in calls]):
            return Prepared(key, None, None)
        return Prepared(key, backend, backend.prepare(calls))

    def _one_by_one(self, calls: Sequence[Call], shared: Call, params: dict[str, Any]) -> None:
        for call in calls:
            self.op(*call, *shared, **params)


def _overlap(tensors: Sequence[Tensor | None]) -> bool:
    """Return whether two contiguous tensors share memory."""
    spans = sorted((t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in tensors if t is not None)
    return any(stop > start for (_, stop), (start, _) in zip(spans, spans[1:], strict=False))


def address_table(calls: Sequence[Call]) -> Tensor:
    """Return a row per call: the elements of its first tensor, then the address of each tensor, 0 for None; int64."""
    rows = [[call[0].numel(), *(0 if t is None else t.data_ptr() for t in call)] for call in calls]
    return torch.tensor(rows, dtype=torch.int64)
