"""The memory of an optimizer's parameters: one flat buffer each for values, gradients, remainders and moments.

Parameters become views of one buffer, their gradients views of another. PyTorch lets people replace a gradient, set it
to None, or assign to a parameter between two steps; the `gather_*` methods copy such values back into the buffers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peakgpt.kernels.ops.adamw import split

ALIGN = 64  # elements: each parameter starts on a cache line, and on the 16 bytes that vector loads and TMA need
SPLIT_ELEMENTS = 1 << 18  # elements split into a bfloat16 and a remainder at a time: it takes several times the memory
MOMENTS = ("exp_avg", "exp_avg_sq")


class FlatBuffer:
    """The parameters of one group, dtype and device, end to end; gradients, remainders and moments in the same layout.

    Attributes:
        param, grad: (N,), N the padded number of elements.
        remainder: (N,) int16, the low half of the float32 master of a bfloat16 parameter; None for other dtypes.
        exp_avg, exp_avg_sq: (N,) float32 or wider.
        states: a dict per parameter with its views of these, and its step count.
    """

    def __init__(self, parameters: list[nn.Parameter], dtype: torch.dtype | None):
        """
        Args:
            parameters: all of one dtype, on one device.
            dtype: of the buffer; parameters of another dtype are cast. None: the parameters' own.
        """
        first = parameters[0]
        dtype = dtype or first.dtype
        wide = torch.promote_types(dtype, torch.float32)
        self.parameters = parameters
        self.spans, end = [], 0
        for parameter in parameters:
            self.spans.append(slice(end, end + parameter.numel()))
            end += -(-parameter.numel() // ALIGN) * ALIGN
        self.param = torch.zeros(end, dtype=dtype, device=first.device)
        self.remainder = None if dtype == wide else torch.zeros_like(self.param, dtype=torch.int16)
        # Parameters share a step counter as long as they are updated together; `runs` splits it.
        step = torch.zeros((), dtype=wide, device=first.device)
        self.states: list[dict[str, Tensor]] = [{"step": step} for _ in parameters]
        self.param_views = self._views(self.param)
        if self.remainder is not None:
            self._add_to_states("remainder", self.remainder)
        for i in range(len(parameters)):
            self._adopt(i)
        # Allocated only now, when the parameters' old memory is free again.
        self.grad = torch.zeros_like(self.param)
        self.exp_avg = torch.zeros(end, dtype=wide, device=first.device)
        self.exp_avg_sq = torch.zeros_like(self.exp_avg)
        self._add_to_states("exp_avg", self.exp_avg)
        self._add_to_states("exp_avg_sq", self.exp_avg_sq)
        # .data: a view shares its base's version counter, and each gradient needs its own counter.
        self.grad_views = [view.data for view in self._views(self.grad)]
        self.had_gradient = [p.requires_grad for p in parameters]  # in the last step
        self.zeroed_versions = [-1] * len(parameters)  # of a gradient that zero_grad made equivalent to None, or -1

    def _views(self, buffer: Tensor) -> list[Tensor]:
        return [buffer[span].view(p.shape) for span, p in zip(self.spans, self.parameters, strict=True)]

    def _add_to_states(self, name: str, buffer: Tensor) -> None:
        for state, view in zip(self.states, self._views(buffer), strict=True):
            state[name] = view

    @torch.no_grad()
    def _adopt(self, i: int) -> None:
        """Copy the current value of parameter i into the buffer, and make the parameter a view of it."""
        parameter = self.parameters[i]
        self._write_master(i, parameter.detach())
        grad, parameter.grad = parameter.grad, None  # a parameter that has a gradient cannot change its dtype
        parameter.data = self.param_views[i]
        parameter.grad = None if grad is None else grad.to(parameter.dtype)

    def _write_master(self, i: int, master: Tensor) -> None:
        """Set parameter i, and its remainder if there is one, from a float32 value."""
        if self.remainder is None:
            self.param_views[i].copy_(master)
            return
        high, low = self.param_views[i].view(-1), self.states[i]["remainder"].view(-1)
        pieces = (half.split(SPLIT_ELEMENTS) for half in (high, low, master.reshape(-1)))
        for high_piece, low_piece, piece in zip(*pieces, strict=True):
            new_high, new_low = split(piece.float())
            high_piece.copy_(new_high)
            low_piece.copy_(new_low)

    def gather_parameters(self) -> None:
        """Copy parameters that were replaced since the last step into the buffer.

        Raises:
            ValueError: a parameter has another dtype or device than before.
        """
        for i, (parameter, view) in enumerate(zip(self.parameters, self.param_views, strict=True)):
            if parameter.dtype != view.dtype or parameter.device != view.device:
                raise ValueError(
                    f"AdamW: a parameter is now {parameter.dtype} on {parameter.device}, expected {view.dtype} on "
                    f"{view.device} as when the optimizer was built"
                )
            if parameter.data_ptr() != view.data_ptr():
                self._adopt(i)

    def gather_gradients(self) -> None:
        """Copy gradients that were replaced since the last step into the buffer.

        Raises:
            ValueError: a sparse gradient.
        """
        for i, (parameter, view) in enumerate(zip(self.parameters, self.grad_views, strict=True)):
            grad = parameter.grad
            if grad is None or _is_view(grad, view):
                continue
            if grad.layout != torch.strided:
                raise ValueError(f"AdamW: got a gradient of layout {grad.layout}, expected a dense one")
            parameter.grad = view.copy_(grad)
            self.zeroed_versions[i] = -1

    def gradients(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (parameter, gradient) for each gradient that is a view of the buffer."""
        for parameter, view in zip(self.parameters, self.grad_views, strict=True):
            if parameter.requires_grad and parameter.grad is not None and _is_view(parameter.grad, view):
                yield parameter, parameter.grad

    def _has_gradient(self, i: int) -> bool:
        """Return whether parameter i has a gradient that was written to since zero_grad(set_to_none=True)."""
        grad = self.parameters[i].grad
        return grad is not None and grad._version != self.zeroed_versions[i]

    def runs(self) -> list[tuple[slice, Tensor]]:
        """Return the runs of neighboring parameters to update together: (slice of the buffers, step counter) each.

        All parameters of a run have a gradient and the same step count. A counter that would belong to
        two runs, or also to parameters without gradients, is cloned, so that each counter advances alone.
        """
        runs, used = [], set()
        self.had_gradient = [self._has_gradient(i) for i in range(len(self.parameters))]
        for (has_gradient, _), members in itertools.groupby(
            range(len(self.parameters)), lambda i: (self.had_gradient[i], id(self.states[i]["step"]))
        ):
            indices = list(members)
            step = self.states[indices[0]]["step"]
            if id(step) in used:
                step = step.clone()
                for i in indices:
                    self.states[i]["step"] = step
            used.add(id(step))
            if has_gradient:
                runs.append((slice(self.spans[indices[0]].start, self.spans[indices[-1]].stop), step))
        return runs

    def zero_grad(self, set_to_none: bool) -> None:
        """Zero the gradients. A parameter that had none in this step and in the last one gets None; others get a view.

        Args:
            set_to_none: treat the zeros as None until they are written to.
        """
        has_gradient = [self._has_gradient(i) for i in range(len(self.parameters))]
        self.grad.zero_()
        for i, (parameter, view) in enumerate(zip(self.parameters, self.grad_views, strict=True)):
            if not (has_gradient[i] or self.had_gradient[i]):
                parameter.grad = None
                continue
            if parameter.grad is None or not _is_view(parameter.grad, view):
                parameter.grad = view
            self.zeroed_versions[i] = -1 if has_gradient[i] and not set_to_none else parameter.grad._version

    def load(self, entries: list[Mapping[str, Any]]) -> None:
        """Copy one optimizer state per parameter into the buffers; an empty one stands for zeros."""
        self.gather_parameters()
        counters: dict[float, Tensor] = {}
        for i, (state, entry) in enumerate(zip(self.states, entries, strict=True)):
            count = float(entry.get("step", 0))
            state["step"] = counters.setdefault(count, torch.full_like(state["step"], count))
            for name in MOMENTS:
                state[name].copy_(entry[name]) if entry else state[name].zero_()
            if "remainder" in state and "remainder" in entry:
                state["remainder"].copy_(entry["remainder"])
            elif "remainder" in state and "master" in entry:  # written by a version that did not split masters
                self._write_master(i, entry["master"])


def _is_view(tensor: Tensor, view: Tensor) -> bool:
    """Return whether a tensor is the same memory as a view of the buffer."""
    return tensor.layout == torch.strided and tensor.data_ptr() == view.data_ptr() and tensor.stride() == view.stride()
