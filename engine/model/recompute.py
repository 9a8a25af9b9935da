"""Activation checkpointing: do not save some activations for backward, recompute them there.

    "none"       save all activations
    "norm"       do not save the outputs of norms: where backward needs one, recompute it from the norm's input
    "mlp"        do not save the pre-activations of the MLPs: backward computes their first product a second time
    "block"      of each block save the two inputs (B, T, C) only: backward runs the whole block a second time
    "block/N"    as "block", for the first block of every N

The second pass gives the bits of the first, dropout included. Chen, Xu, Zhang, Guestrin 2016, "Training Deep Nets with
Sublinear Memory Cost", arXiv:1604.06174, section 4.1; what to recompute: Korthikanti et al. 2022, "Reducing Activation
Recomputation in Large Transformer Models", arXiv:2205.05198.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peakgpt.kernels.core.dispatch import draw_seed, seeds_from


def parse(plan: str) -> tuple[str, int]:
    """Read a recompute plan.

    Args:
        plan: "none", "norm", "mlp", "block" or "block/N".
    Returns:
        (kind, N): "block/4" gives ("block", 4); N is 1 for the other plans.
    Raises:
        ValueError: an unknown plan.
    """
    kind, slash, every = plan.partition("/")
    known = kind in ("none", "norm", "mlp", "block") and (kind == "block" or not slash)
    if not known or (slash and not (every.isdecimal() and int(every))):
        expected = "none, norm, mlp, block, or block/N for the first block of every N"
        raise ValueError(f"recompute is {plan!r}, expected {expected}")
    return kind, int(every or 1)


def set_recompute(model: nn.Module, plan: str) -> None:
    """Set which activations of a GPT are recomputed.

    Args:
        model: a Transformer; another module only with the plan "none".
        plan: see `parse`.
    Raises:
        ValueError: an unknown plan, or a model without Blocks.
    """
    kind, every = parse(plan)
    blocks = getattr(getattr(model, "transformer", None), "h", ())
    if kind != "none" and not all(hasattr(block, "recompute") for block in blocks or (None,)):
        raise ValueError(f"recompute is {plan!r}, expected none for {type(model).__name__}: it has no peakgpt blocks")
    for layer, block in enumerate(blocks):
        if hasattr(block, "recompute"):
            block.recompute = kind == "block" and layer % every == 0
            block.recompute_norms = kind == "norm"
            for norm in [module for name, module in block.named_children() if name.startswith("ln_")]:
                norm.recompute = kind == "norm"
            for part in block.mlp.modules():
                if hasattr(part, "recompute"):
                    part.recompute = kind == "mlp"


def recomputable(result: Tensor, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Mark a tensor as recomputable: inside `recompute_marked`, autograd saves x instead of it.

    Args:
        result: function(x).
        function: runs again in backward, without gradients.
        x: the input.
    Returns:
        result.
    """
    x = x.detach()  # has the version of the original, which every change in place raises
    result._recompute = functools.partial(_recomputed, function, x, x._version), result._version
    return result


def _recomputed(function: Callable[[Tensor], Tensor], x: Tensor, version: int) -> Tensor:
    if x._version != version:
        raise RuntimeError(
            f"recompute: the input of a norm, {tuple(x.shape)}, was changed in place after the norm read it, expected "
            "it unchanged until backward"
        )
    return function(x)


def recompute_marked() -> contextlib.AbstractContextManager[Any]:
    """Return a context in which autograd does not save tensors marked by `recomputable`, but recomputes them."""

    def unpack(saved: Tensor | Callable[[], Tensor]) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        with torch.no_grad():
            return saved()

    def pack(tensor: Tensor) -> Tensor | Callable[[], Tensor]:
        recompute, version = getattr(tensor, "_recompute", (tensor, None))
        return recompute if tensor._version == version else tensor  # a hook may have changed it in place

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def checkpoint_block(function: Callable[..., Any], *args: Any) -> Any:
    """Return function(*args), whose activations are recomputed in backward with the same dropout seeds."""
    contexts = {} if torch.compiler.is_compiling() else {"preserve_rng_state": False, "context_fn": _seed_contexts}
    return checkpoint(function, *args, use_reentrant=False, **contexts)


def _seed_contexts() -> tuple[Any, Any]:
    """Return two contexts: the first records the seeds that the forward pass draws, the second replays them.

    torch's own way, rewinding its generator, is impossible while a CUDA graph is captured.
    """
    seeds: list[Tensor] = []

    def draw_and_record(device: torch.device) -> Tensor:
        seeds.append(draw_seed(device))
        return seeds[-1]

    return seeds_from(draw_and_record), _ReplaySeeds(seeds)


class _ReplaySeeds:
    """A context that yields the recorded seeds in order. Each entry starts from the first seed."""

    def __init__(self, seeds: list[Tensor]):
        self.seeds, self.stack = seeds, contextlib.ExitStack()

    def __enter__(self) -> None:
        remaining: Iterator[Tensor] = iter(self.seeds)
        self.stack.enter_context(seeds_from(lambda device: next(remaining)))

    def __exit__(self, *error: Any) -> None:
        self.stack.close()
