"""Seeds of random ops.

A seed is drawn outside of the op, so the op is a function of its inputs: backward, a replayed CUDA graph and a compiled
graph see the mask of the forward pass. Activation checkpointing that restores torch's generator draws the same seed
again. In a CUDA graph the seed lies in device memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from peakgpt.kernels.core.spec import OpSpec, Tensors
from peakgpt.kernels.core.thread_state import ThreadState

_source: ThreadState[Callable[[torch.device], Tensor] | None] = ThreadState("seeds", None)


def draw_seed(device: torch.device) -> Tensor:
    """Draw a seed, (1,) int64 on the device, from torch's generator of that device."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)


def seeds_from(source: Callable[[torch.device], Tensor]) -> contextlib.AbstractContextManager[None]:
    """Take the seeds of random ops from source(device) instead of `draw_seed`. The eager backend gets a seed too.

    A recomputed forward pass uses it to get the same masks. Restoring torch's generator is no alternative: that is not
    possible while a CUDA graph is captured.
    """
    return _source.set_to(source)


def source_is_set() -> bool:
    """Whether `seeds_from` is active."""
    return _source.get_eagerly() is not None


def with_seed(op: OpSpec, tensors: Tensors, params: Mapping[str, Any]) -> Tensors:
    """Return the tensors of a call, with a new seed if the op is random and the caller gave none."""
    index = op.seed_index
    if index is None or params[op.random_param] == 0 or tensors[index] is not None:
        return tensors
    seed = (_source.get() or draw_seed)(tensors[0].device)
    return *tensors[:index], seed, *tensors[index + 1 :]
