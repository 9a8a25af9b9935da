"""Gradients that keep their memory between updates, for `accumulate_into`: no allocation, no second pass.

All gradients of one dtype and device are parts of one block, so that one operator zeroes them or adds them to others.
In a small model an operator for each tensor takes longer than its arithmetic, because each wakes the other threads.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

ALIGNMENT_BYTES = 64  # a cache line, which two gradients would share


class GradientMemory:
    """A gradient per parameter of an optimizer, zeroed before each update."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer
        self._blocks: list[Tensor] = []
        self._memory: dict[Tensor, Tensor] = {}
        self._versions: dict[Tensor, int] = {}

    def zero(self) -> Mapping[Tensor, Tensor]:
        """Give every parameter that requires one a gradient of zeros.

        Returns:
            The gradients by parameter, for `accumulate_into`. Those of parameters with hooks are left out: autograd
            runs the hooks and adds to the gradient.
        """
        trained = [p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad]
        same = list(map(id, trained)) == list(map(id, self._memory))
        if not same or not all(itertools.starmap(_fits, self._memory.items())):
            self._replace(trained)
        for block in self._blocks:
            block.zero_()
        for parameter, grad in self._memory.items():
            parameter.grad = grad
            self._versions[parameter] = grad._version
        return {parameter: grad for parameter, grad in self._memory.items() if not has_hooks(parameter)}

    def _replace(self, parameters: Sequence[Tensor]) -> None:
        """Make gradients for these parameters, and free the ones before."""
        for parameter, grad in self._memory.items():
            if parameter.grad is grad:
                parameter.grad = None  # of a parameter that is frozen now, the optimizer would use it once more
        self._blocks, self._memory, self._versions = [], {}, {}
        kinds = dict.fromkeys((parameter.dtype, parameter.device) for parameter in parameters)
        with _disable_current_modes():  # a recording writes zeros to the block, and does not make it anew
            for kind in kinds:
                self._blocks.append(_block([p for p in parameters if (p.dtype, p.device) == kind], self._memory))
        self._memory = {parameter: self._memory[parameter] for parameter in parameters}

    def add(self, others: Sequence[GradientMemory]) -> None:
        """Add the gradients of others, in their order, and give the parameters these gradients again."""
        for other in others:
            for block, other_block in zip(self._blocks, other._blocks, strict=True):
                block.add_(other_block)  # what is not written is zero
            written = [self._memory[p] for p, grad in other._memory.items() if other._is_written(p, grad)]
            torch.autograd.graph.increment_version(written)
        for parameter, grad in self._memory.items():
            parameter.grad = grad

    def _is_written(self, parameter: Tensor, grad: Tensor) -> bool:
        return grad._version != self._versions[parameter]

    def drop_unwritten(self) -> None:
        """Set a gradient that nothing was added to since `zero` to None, so that the optimizer skips its parameter."""
        for parameter, grad in self._memory.items():
            if parameter.grad is grad and not self._is_written(parameter, grad):
                parameter.grad = None


def has_hooks(parameter: Tensor) -> bool:
    """Return whether someone has hooked the gradient of a parameter."""
    return bool(parameter._backward_hooks or parameter._post_accumulate_grad_hooks)


def _block(parameters: Sequence[Tensor], memory: dict[Tensor, Tensor]) -> Tensor:
    """Return a block with a gradient for each parameter, in the format of `torch.zeros_like`; add them to `memory`.

    The parameters have one dtype and device. A gradient counts its own versions, not those of the block.
    """
    unit = ALIGNMENT_BYTES // parameters[0].element_size()
    ends = [0, *itertools.accumulate(-(-parameter.numel() // unit) * unit for parameter in parameters)]
    block = torch.zeros(ends[-1], dtype=parameters[0].dtype, device=parameters[0].device)
    for parameter, begin in zip(parameters, ends, strict=False):
        strides = torch.empty_like(parameter, device="meta").stride()
        memory[parameter] = block.as_strided(parameter.shape, strides, begin).data
    return block


def _fits(parameter: Tensor, grad: Tensor) -> bool:
    same_format = grad.stride() == parameter.stride() or not parameter.is_contiguous()
    same_place = grad.device == parameter.device and grad.dtype == parameter.dtype
    return same_format and same_place and grad.shape == parameter.shape
