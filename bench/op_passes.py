"""Inputs of an op, and the passes of it that are timed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from peakgpt.kernels.core.dispatch import OPS

MAX_SETS = 8  # input sets that the calls of a case rotate through


# ---- inputs: random, and together larger than the caches

Inputs = tuple[tuple[Tensor | None, ...], list[Tensor]]  # tensors of a call, upstream gradients of its results


def _cold_bytes(device: torch.device) -> int:
    """Return the size of all input sets together: twice the last-level cache or 64 MiB, so that no input is cached."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    return max(2 * cache, 1 << 26)


def make_inputs(
    name: str, sizes: Mapping[str, int], params: Mapping[str, Any], device: torch.device, dtype: torch.dtype
) -> list[Inputs]:
    """Return up to MAX_SETS sets of inputs of an op.

    Args:
        name: of the op.
        sizes: arguments of its `sample`.
        params: parameters of the call.
        device, dtype: of the inputs.
    """
    first = _inputs(name, sizes, params, device, dtype)
    set_bytes = sum(t.numel() * t.element_size() for t in (*first[0], *first[1]) if t is not None)
    more_sets = min(MAX_SETS - 1, _cold_bytes(device) // max(1, set_bytes))
    return [first, *(_inputs(name, sizes, params, device, dtype) for _ in range(more_sets))]


def sample(
    name: str, sizes: Mapping[str, int], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor | None, ...]:
    """Return the tensors of a call. Floating-point ones require gradients if the op has a backward."""
    tensors = OPS[name].sample(**sizes, device=device, dtype=dtype)
    if not OPS[name].gradient:
        return tensors
    return tuple(t.requires_grad_() if t is not None and t.is_floating_point() else t for t in tensors)


def _inputs(name: str, sizes, params, device: torch.device, dtype: torch.dtype) -> Inputs:
    tensors = sample(name, sizes, device, dtype)
    bound, bound_params = OPS[name].bind(tensors, params)
    outputs, _ = OPS[name].alloc(*bound, needs=(False,) * len(bound), **bound_params)
    return tensors, [torch.randn_like(o) if o.dim() else torch.ones_like(o) for o in outputs]


# ---- passes: (op call, input sets, params) -> function without arguments


def _forward(call, sets: Sequence[Inputs], params) -> Callable[[], Any]:
    sets_in_turn = itertools.cycle(sets)

    def run():
        tensors, _ = next(sets_in_turn)
        with torch.no_grad():
            return call(*tensors, **params)

    return run


def replayed(call, sets: Sequence[Inputs], params) -> Callable[[], Any]:
    """Run the forward of every set in one CUDA graph, because a launch takes longer than a kernel of a few us."""
    if sets[0][0][0].device.type != "cuda":
        return _forward(call, sets, params)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        for tensors, _ in sets:  # compilation and one-time allocations cannot be captured
            call(*tensors, **params)
        with torch.cuda.graph(graph):
            for tensors, _ in sets:
                results = call(*tensors, **params)

    def run():
        graph.replay()
        return results

    return run


def _both(call, sets: Sequence[Inputs], params) -> Callable[[], Any]:
    sets_in_turn = itertools.cycle(sets)

    def run():
        tensors, ups = next(sets_in_turn)
        return torch.autograd.grad(as_tuple(call(*tensors, **params)), _leaves(tensors), ups)

    return run


def _backward(call, sets: Sequence[Inputs], params) -> Callable[[], Any]:
    sets_in_turn = itertools.cycle(
        [(as_tuple(call(*tensors, **params)), _leaves(tensors), ups) for tensors, ups in sets]
    )
    return lambda: torch.autograd.grad(*next(sets_in_turn), retain_graph=True)


# name -> (maker, forwards per call, backwards per call)
PASSES = {"forward": (_forward, 1, 0), "replayed": (replayed, 1, 0), "backward": (_backward, 0, 1),
          "forward+backward": (_both, 1, 1)}  # fmt: skip


def as_tuple(results) -> tuple[Tensor, ...]:
    """Return the outputs of an op as a tuple."""
    return results if isinstance(results, tuple) else (results,)


def _leaves(tensors) -> list[Tensor]:
    return [t for t in tensors if t is not None and t.requires_grad]
