"""Cases of `bench ops`: an op at one size, its inputs, and the passes that are timed."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from peakgpt.kernels.core.dispatch import OPS

MAX_SETS = 8  # of inputs that the calls of a case rotate through


@dataclass(frozen=True)
class OpCase:
    """An op at one size.

    Args:
        op: its name.
        sizes: of its sample; defaults are those of GPT-2 124M at 4 x 256 tokens.
        params: parameters in addition to the typical ones of the op.
        passes: keys of PASSES; None means forward, and forward+backward if the op has a gradient.
        checked: sizes at which values are compared if eager does not fit at `sizes`; eager is then not timed.
    """

    op: str
    sizes: Mapping[str, int] = field(default_factory=dict)
    params: Mapping[str, Any] = field(default_factory=dict)
    passes: tuple[str, ...] | None = None
    checked: Mapping[str, int] | None = None

    @property
    def directions(self) -> tuple[str, ...]:
        return self.passes or (("forward",) if not OPS[self.op].gradient else ("forward", "forward+backward"))

    @property
    def arguments(self) -> dict[str, Any]:
        """Parameters that differ from the defaults of the op."""
        packed = {"n_head": self.sizes["heads"]} if self.op == "attention_qkv" and "heads" in self.sizes else {}
        return {**OPS[self.op].typical, **packed, **self.params}


def choose_cases(ops: Sequence[str], sizes: Sequence[str] = (), passes: Sequence[str] | None = None) -> list[OpCase]:
    """Return cases of the chosen ops, sizes and passes.

    Args:
        ops: names.
        sizes: "NAME=N", applied to every op.
        passes: keys of PASSES; None means the default of OpCase.
    Raises:
        ValueError: an op does not have that size, or it is not a positive number.
    """
    chosen = {}
    for size in sizes:
        name, _, value = size.partition("=")
        if not value.isdecimal() or int(value) < 1:
            raise ValueError(f"bench ops: got --size {size!r}, expected NAME=N with N at least 1")
        chosen[name] = int(value)
    for op in ops:
        known = [n for n, p in inspect.signature(OPS[op].sample).parameters.items() if p.kind != p.VAR_KEYWORD]
        if unknown := [name for name in chosen if name not in known]:
            raise ValueError(f"bench ops: got size {unknown[0]!r} for {op}, expected {', '.join(known)}")
    return [OpCase(op, chosen, passes=tuple(passes) if passes else None) for op in ops]


# ---- inputs: random, and together larger than the caches

Inputs = tuple[tuple[Tensor | None, ...], list[Tensor]]  # tensors of a call, upstream gradients of its results


def _cold_bytes(device: torch.device) -> int:
    """Return the size of all input sets together: twice the last-level cache or 64 MiB, so that no input is cached."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    return max(2 * cache, 1 << 26)


def make_inputs(case: OpCase, device: torch.device, dtype: torch.dtype) -> list[Inputs]:
    """Return up to MAX_SETS sets of inputs. Floating-point tensors require gradients if the op has a backward."""
    first = _inputs(case, device, dtype)
    set_bytes = sum(t.numel() * t.element_size() for t in (*first[0], *first[1]) if t is not None)
    more = min(MAX_SETS - 1, _cold_bytes(device) // max(1, set_bytes))
    return [first, *(_inputs(case, device, dtype) for _ in range(more))]


def _inputs(case: OpCase, device: torch.device, dtype: torch.dtype) -> Inputs:
    op = OPS[case.op]
    tensors = op.sample(**case.sizes, device=device, dtype=dtype)
    bound, params = op.bind(tensors, case.arguments)
    outputs, _ = op.alloc(*bound, needs=(False,) * len(bound), **params)
    ups = [torch.randn_like(o) if o.dim() else torch.ones_like(o) for o in outputs]
    if op.gradient:
        tensors = tuple(t.requires_grad_() if t is not None and t.is_floating_point() else t for t in tensors)
    return tensors, ups


# ---- passes: (op call, input sets, params) -> function without arguments


def _forward(call, sets: Sequence[Inputs], params) -> Callable[[], Any]:
    sets_in_turn = itertools.cycle(sets)

    def run():
        tensors, _ = next(sets_in_turn)
        with torch.no_grad():
            return call(*tensors, **params)

    return run


def replayed(call, sets: Sequence[Inputs], params) -> Callable[[], Any]:
    """Run the forward of every set in one CUDA graph, because a launch takes longer than a kernel of few us."""
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
