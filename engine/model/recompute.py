"""Activation checkpointing: some layers forget what their backward reads, and compute it again.

    "none"       everything is kept
    "norm"       no norm's result is kept: it is formed again from its input, where a product's backward reads it
    "mlp"        no MLP keeps its pre-activation: its first product is computed twice
    "block"      of a block only what goes in, two tensors (B, T, C), is kept; the rest of it is computed twice
    "block/N"    as "block", for the first block of every N

The second pass gives the bits of the first, dropout included. Chen, Xu, Zhang, Guestrin 2016, "Training Deep Nets with
Sublinear Memory Cost", arXiv:1604.06174, section 4.1; what to forget, Korthikanti et al. 2022, "Reducing Activation
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
    """Read a plan: ("none" | "norm" | "mlp" | "block", every how many layers).

    Raises:
        ValueError: it is none of those above.
    """
    what, slash, every = plan.partition("/")
    known = what in ("none", "norm", "mlp", "block") and (what == "block" or not slash)
    if not known or (slash and not (every.isdecimal() and int(every))):
        expected = "none, norm, mlp, block, or block/N for the first block of every N"
        raise ValueError(f"recompute is {plan!r}, expected {expected}")
    return what, int(every or 1)


def set_recompute(model: nn.Module, plan: str) -> None:
    """Say which layers of a GPT forget.

    Raises:
        ValueError: the plan can not be read, or the model has no such blocks.
    """
    what, every = parse(plan)
    blocks = getattr(getattr(model, "transformer", None), "h", ())
    if what != "none" and not all(hasattr(block, "recompute") for block in blocks or (None,)):
        raise ValueError(f"recompute is {plan!r}, expected none for {type(model).__name__}: it has no peakgpt blocks")
    for layer, block in enumerate(blocks):
        if hasattr(block, "recompute"):
            block.recompute = what == "block" and layer % every == 0
            block.forgets_norms = what == "norm"
            for norm in (getattr(block, name, None) for name in ("ln_1", "ln_2")):
                if norm is not None:
                    norm.recompute = what == "norm"
            for part in block.mlp.modules():
                if hasattr(part, "recompute"):
                    part.recompute = what == "mlp"


def forgettable(result: Tensor, form: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The result of form(x), marked: what would keep it for backward in `forgetting` keeps x and forms it again."""
    result._form = functools.partial(form, x.detach())
    return result


def forgetting() -> contextlib.AbstractContextManager[Any]:
    """A context whose operations keep no result that is marked as `forgettable`."""

    def again(kept: Tensor | Callable[[], Tensor]) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        with torch.no_grad():
            return kept()

    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: getattr(tensor, "_form", tensor), again)


def checkpointed(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args), whose insides are forgotten and computed again in backward."""
    contexts = {} if torch.compiler.is_compiling() else {"preserve_rng_state": False, "context_fn": _same_seeds}
    return checkpoint(function, *args, use_reentrant=False, **contexts)


def _same_seeds() -> tuple[Any, Any]:
    """Contexts of the first pass, which notes the seeds that it draws, and of the others, which take those.

    Instead of winding back torch's generator, which can not be done while a CUDA graph is captured.
    """
    seeds: list[Tensor] = []

    def note(device: torch.device) -> Tensor:
        seeds.append(draw_seed(device))
        return seeds[-1]

    return seeds_from(note), _Again(seeds)


class _Again:
    """A context that gives the seeds in their order, from the first one each time it is entered."""

    def __init__(self, seeds: list[Tensor]):
        self.seeds, self.open = seeds, contextlib.ExitStack()

    def __enter__(self) -> None:
        left: Iterator[Tensor] = iter(self.seeds)
        self.open.enter_context(seeds_from(lambda device: next(left)))

    def __exit__(self, *error: Any) -> None:
        self.open.close()
