"""Gradients that keep their memory between updates, for `accumulate_into`: no allocation, no second pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes


class GradientMemory:
    """A gradient per parameter of an optimizer, zeroed before each update."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer
        self._memory: dict[Tensor, Tensor] = {}
        self._versions: dict[Tensor, int] = {}

    def zero(self) -> Mapping[Tensor, Tensor]:
        """Give every parameter that requires one a gradient of zeros.

        Returns:
            The gradients by parameter, for `accumulate_into`. Those of parameters with hooks are left out: autograd
            runs the hooks and adds to the gradient.
        """
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if not parameter.requires_grad:
                    if parameter.grad is self._memory.pop(parameter, ()):
                        parameter.grad = None  # the optimizer would use the last gradient once more
                    continue
                grad = self._memory.get(parameter)
                if grad is None or not _fits(grad, parameter):
                    with _disable_current_modes():  # a recording writes zeros to it, and does not make it anew
                        self._memory[parameter] = torch.zeros_like(parameter, requires_grad=False)
        torch._foreach_zero_(list(self._memory.values()))
        for parameter, grad in self._memory.items():
            parameter.grad = grad
            self._versions[parameter] = grad._version
        return {parameter: grad for parameter, grad in self._memory.items() if not has_hooks(parameter)}

    def add(self, others: Sequence[GradientMemory]) -> None:
        """Add the gradients of others, in their order, and give the parameters these gradients again."""
        for other in others:
            written = [parameter for parameter, grad in other._memory.items() if other._is_written(parameter, grad)]
            if written:
                torch._foreach_add_([self._memory[p] for p in written], [other._memory[p] for p in written])
            torch.autograd.graph.increment_version([self._memory[p] for p in written])
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


def _fits(grad: Tensor, parameter: Tensor) -> bool:
    same_format = grad.stride() == parameter.stride() or not parameter.is_contiguous()
    same_place = grad.device == parameter.device and grad.dtype == parameter.dtype
    return same_format and same_place and grad.shape == parameter.shape
