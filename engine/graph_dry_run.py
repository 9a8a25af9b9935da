"""DryRun: test on a CPU whether a function could be captured as a CUDA graph.

It replaces `CudaGraph`. A replay runs the function again and raises an error if a graph would be impossible, or would
silently reuse a value of the captured call.
"""

from __future__ import annotations

import re
import sys
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class DryRun:
    """A graph for tests on a CPU: a replay runs the function and checks its calls of torch.

    No call may bring a value to the host, or make a tensor from a host value. Every call must equal that of the
    first replay, numbers included, since a graph would reuse them. Outputs are the same tensors in each replay.
    """

    def __init__(self) -> None:
        self.outputs: list[Tensor] | None = None
        self.calls: list[Any] = []

    def warm_up(self, function):
        """Run the function without checks."""
        return function()

    def capture(self, function):
        """Store the function."""
        self.function = function

    def replay(self):
        """Run the function with checks.

        Raises:
            RuntimeError: a call that waits for the device, or that differs from the one of the first replay.
        """
        with _CheckCalls() as check:
            outputs = self.function()
        if self.outputs is None:
            self.calls, self.outputs = check.calls, [output.clone() for output in outputs]
            return self.outputs
        for i, (call, captured) in enumerate(zip(check.calls, self.calls, strict=False)):
            if call != captured:
                raise RuntimeError(f"call {i} of the replay is {call}, expected {captured} as captured")
        if len(check.calls) != len(self.calls):
            raise RuntimeError(f"the replay makes {len(check.calls)} calls, expected {len(self.calls)} as captured")
        for static, output in zip(self.outputs, outputs, strict=True):
            static.copy_(output)
        return self.outputs


# These functions bring a value to the host, or host data to a device.
SYNCHRONIZING = frozenset({
    "item", "tolist", "numpy", "cpu", "cuda", "nonzero", "argwhere", "equal", "allclose", "is_nonzero", "unique",
    "unique_consecutive", "masked_select", "bincount", "__bool__", "__int__", "__float__", "__index__", "__complex__",
    "tensor", "as_tensor", "from_numpy", "pin_memory",
})  # fmt: skip
# Callers that may synchronize: Triton's interpreter, whose tensors are numpy arrays, and checks that read values on a
# CPU only: those of kernels/core/check.py, and functions named _check... in a contract.
MAY_SYNCHRONIZE = re.compile(r"triton\.|interpreter|peakgpt\.kernels\.(core\.check\.|ops\.\w+\._check)")


class _CheckCalls(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(function, "__name__", str(function))
        module, caller = _caller()
        if not MAY_SYNCHRONIZE.match(f"{module}.{caller}"):
            masked = name in ("__getitem__", "__setitem__") and _has_mask(args[1])
            if name in SYNCHRONIZING or masked:
                raise RuntimeError(f"{module} calls {name} inside a graphed function, expected no synchronization")
            self.calls.append((module, name, _numbers(args), _numbers(tuple(kwargs.items()))))
        if function is Tensor.backward:  # a mode is off while it handles a call, here during the whole backward pass
            with self:
                return _backward(args[0])
        return function(*args, **kwargs)


def _backward(loss: Tensor) -> None:
    """Run loss.backward() without torch function modes: its own dispatch to them would turn this mode off again."""
    engine = torch.autograd.Variable._execution_engine
    engine.run_backward((loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True,
                        accumulate_grad=True)  # fmt: skip


def _caller() -> tuple[str, str]:
    """Return the module and the function that called torch."""
    frame = sys._getframe(2)
    while frame is not None and (
        frame.f_globals.get("__name__", "").startswith(("torch.", "contextlib"))
        or frame.f_code.co_name in ("<genexpr>", "<listcomp>")
    ):
        frame = frame.f_back
    return ("", "") if frame is None else (frame.f_globals.get("__name__", ""), frame.f_code.co_name)


def _has_mask(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, Tensor) and part.dtype == torch.bool for part in parts)


def _numbers(value: Any) -> Any:
    """Return what a graph would capture of an argument: numbers and strings by value, tensors by shape."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, tuple | list):
        return tuple(_numbers(v) for v in value)
    return value if isinstance(value, int | float | str | None) else str(type(value))
