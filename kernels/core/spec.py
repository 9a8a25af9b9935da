"""The data of an op: what its contract declares, and what follows from the signature of its eager function."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Tensors = Sequence[Tensor | None]
Params = Mapping[str, Any]


class Cost(NamedTuple):
    """The least work of one call: FLOPs and bytes of device memory traffic, forward and backward.

    Forward is a call under no_grad. Backward includes writing the tensors that forward saves for it.
    """

    flops: int
    bytes: int
    backward_flops: int
    backward_bytes: int
    written: int  # part of bytes: the outputs, or the tensors that the op mutates
    backward_written: int  # part of backward_bytes: the gradients, and the tensors saved for backward


class OpSpec:
    """An op's contract. `peakgpt.kernels.core.dispatch.op` documents the arguments."""

    name: str
    tensor_names: tuple[str, ...]
    param_names: tuple[str, ...]
    outputs: tuple[str, ...]

    def __init__(
        self,
        eager: Callable[..., Any],
        *,
        cost: Callable[..., Cost],
        sample: Callable[..., tuple[Any, ...]],
        check: Callable[..., None],
        alloc: Callable[..., tuple[Sequence[Tensor], Sequence[Tensor]]],
        typical: Params,
        saved_for_backward: Sequence[str] | Callable[..., Sequence[str]],
        strided: Sequence[str],
        outputs: Sequence[str],
        autocast: str | None,
        autocast_exempt: Sequence[str],
        mutates: Sequence[str],
        grad_in_forward: Callable[..., Sequence[str]] | None,
        random_param: str | None,
        gradient: bool,
        differentiable: Callable[..., Any] | None,
        restore: Callable[[Tensors, Sequence[Tensor | None]], Tensors],
        matmul_flops: Callable[..., int] | None,
        counted_as: Params,
        counted: Callable[..., Any] | None,
    ):
        functools.update_wrapper(self, eager)
        self.name, self.eager = eager.__name__, eager
        self.alloc, self.check, self.cost, self.sample, self.typical = alloc, check, cost, sample, dict(typical)
        self.outputs, self.mutates = () if mutates else tuple(outputs), frozenset(mutates)
        self.autocast, self.autocast_exempt = autocast, frozenset(autocast_exempt)
        self.grad_in_forward, self.random_param, self.gradient = grad_in_forward, random_param, gradient and not mutates
        self.differentiable, self.restore = differentiable or eager, restore
        self.matmul_flops, self.counted_as, self.counted = matmul_flops, dict(counted_as), counted or eager
        self.signature = inspect.signature(eager, eval_str=True)
        arguments = self.signature.parameters
        self.tensor_names = tuple(n for n, a in arguments.items() if a.annotation in (Tensor, Tensor | None))
        self.required = frozenset(n for n in self.tensor_names if arguments[n].annotation is Tensor)
        self.param_names = tuple(n for n in arguments if n not in self.tensor_names)
        self.seed_index = self.tensor_names.index("seed") if random_param else None
        self._names, self._param_set = tuple(arguments), frozenset(self.param_names)
        self._positional = sum(a.kind is a.POSITIONAL_OR_KEYWORD for a in arguments.values())
        self._defaults = {n: a.default for n, a in arguments.items() if a.default is not a.empty}
        self._param_defaults = {n: v for n, v in self._defaults.items() if n in self.param_names}
        self.contiguous_inputs = tuple(i for i, n in enumerate(self.tensor_names) if n not in strided)
        self.contiguous_grads = tuple(i for i, n in enumerate(self.outputs) if n not in strided)
        self._tensors_first = self._names[: len(self.tensor_names)] == self.tensor_names
        self._saved = saved_for_backward
        self._saved_always = None if callable(saved_for_backward) else self._flags(saved_for_backward)

    def bind(self, args: Sequence[Any], kwargs: Params) -> tuple[tuple[Tensor | None, ...], dict[str, Any]]:
        """Split the arguments of a call into tensors, in the order of `tensor_names`, and parameters by name.

        Raises:
            TypeError: an argument is missing or unknown.
        """
        if self._tensors_first and len(args) == len(self.tensor_names):  # a layer's usual call: saves 2 us
            params = {**self._param_defaults, **kwargs}
            if params.keys() == self._param_set:
                return tuple(args), params
        values = {**self._defaults, **dict(zip(self._names, args, strict=False)), **kwargs}
        if len(args) > self._positional or len(values) != len(self._names) or len(args) + len(kwargs) > len(values):
            try:
                self.signature.bind(*args, **kwargs)
            except TypeError as error:
                raise TypeError(f"{self.name}: {error}, expected {', '.join(self._names)}") from None
        return tuple(values[n] for n in self.tensor_names), {n: values[n] for n in self.param_names}

    def saved_flags(self, tensors: Tensors, params: Params) -> tuple[tuple[bool, ...], tuple[bool, ...]]:
        """One flag for each input and one for each output of this call: whether backward reads it."""
        return self._saved_always or self._flags(self._saved(*tensors, **params))

    def run_eager(self, tensors: Tensors, params: Params) -> Any:
        """Call the eager function with bound arguments."""
        return self.eager(**dict(zip(self.tensor_names, tensors, strict=True)), **params)

    def run_counted(self, tensors: Tensors, params: Params) -> Any:
        """Call the function whose matrix products are counted: the eager function, or one that reads no values."""
        return self.counted(**dict(zip(self.tensor_names, tensors, strict=True)), **params)

    def run_differentiable(self, tensors: Tensors, params: Params) -> Any:
        """Call the eager function in operations that torch can differentiate any number of times."""
        return self.differentiable(**dict(zip(self.tensor_names, tensors, strict=True)), **params)

    def increment_versions(self, tensors: Tensors) -> None:
        """Tell autograd that the op has written the tensors in `mutates`: it does not see what a kernel writes."""
        named = zip(self.tensor_names, tensors, strict=True)
        torch.autograd.graph.increment_version([t for n, t in named if n in self.mutates and t is not None])

    def _flags(self, names: Sequence[str]) -> tuple[tuple[bool, ...], tuple[bool, ...]]:
        return tuple(n in names for n in self.tensor_names), tuple(n in names for n in self.outputs)


def short_lived(like: Tensor, *shape: int) -> Tensor:
    """Allocate a result that is freed before tensors that are allocated later. Requests 128 bytes more than it needs.

    glibc's posix_memalign searches for a block that is 96 bytes larger than the request. So it cannot reuse a freed
    block for a tensor of the same size, and the block stays unused between tensors that live longer: 84 MiB in a
    float32 training step of GPT-2 124M.
    """
    return like.new_empty(math.prod(shape) + 128 // like.element_size()).resize_(shape)
