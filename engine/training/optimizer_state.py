"""The state of one parameter in an optimizer: made on its first step, moved along when the parameter changes, loaded.

    step                   () float32, updates so far; AdamW only
    exp_avg, exp_avg_sq    float32 or wider; AdamW only
    momentum_buffer        float32 or wider; Muon only
    remainder              int16, the low half of the float32 master of a bfloat16 parameter (kernels/ops/adamw.py)

All tensors have memory of their own, in the parameter's shape and, for AdamW, its memory format; the names are those of
torch.optim.AdamW and torch.optim.Muon.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peakgpt.kernels.ops.adamw import DTYPES, join, split


@dataclass(frozen=True)
class Moments:
    """The running means that an optimizer keeps for each parameter.

    Args:
        optimizer: its name in error messages.
        names: of tensors in the parameter's shape.
        counts_steps: whether the state has a step too.
    """

    optimizer: str
    names: tuple[str, ...]
    counts_steps: bool = False

    @property
    def all_names(self) -> tuple[str, ...]:
        """The names of all entries but the remainder."""
        return ("step", *self.names) if self.counts_steps else self.names


ADAMW = Moments("AdamW", ("exp_avg", "exp_avg_sq"), counts_steps=True)
MUON = Moments("Muon", ("momentum_buffer",))
SPLIT_ELEMENTS = 1 << 18  # elements split into a bfloat16 and a remainder at a time: it takes several times the memory
WIDE = {dtype: torch.promote_types(dtype, torch.float32) for dtype in DTYPES}  # dtype of the moments


def update_tensors(parameter: nn.Parameter, state: dict[str, Tensor]) -> tuple[Tensor | None, ...]:
    """Return the arguments of the op `adamw` for a parameter with a gradient, and make its state fit.

    Returns:
        (param, grad, remainder, exp_avg, exp_avg_sq, step), contiguous. `param` is the parameter's memory, or a
        contiguous copy if its elements have gaps.
    Raises:
        ValueError: a sparse gradient, or a parameter whose dtype or shape has changed to one that does not fit.
    """
    grad, moment = parameter.grad, state.get("exp_avg")
    if (
        moment is None or moment.dtype != WIDE.get(parameter.dtype) or moment.device != parameter.device
        or moment.shape != parameter.shape or ("remainder" in state) != (parameter.dtype == torch.bfloat16)
    ):  # fmt: skip
        _fit(state, parameter, ADAMW)
    _check_grad(parameter, ADAMW)
    moment, square, remainder = state["exp_avg"], state["exp_avg_sq"], state.get("remainder")
    if (
        type(parameter) is nn.Parameter and parameter.is_contiguous() and grad.is_contiguous()
        and moment.is_contiguous() and square.is_contiguous() and (remainder is None or remainder.is_contiguous())
    ):  # fmt: skip
        return parameter, grad, remainder, moment, square, state["step"]
    return _in_memory_order(parameter, state)


def matrix_tensors(parameter: nn.Parameter, state: dict[str, Tensor]) -> tuple[Tensor | None, ...]:
    """Return the arguments of the op `muon` for a parameter of matrices with a gradient, and make its state fit.

    Returns:
        (param, grad, remainder, momentum_buffer), contiguous, so in the order of their rows. `param` is the parameter's
        memory, or a copy if it is not contiguous.
    Raises:
        ValueError: as `update_tensors`.
    """
    _fit(state, parameter, MUON)
    _check_grad(parameter, MUON)
    for name in ("remainder", *MUON.names):
        if name in state:
            state[name] = state[name].contiguous()
    tensors = parameter, parameter.grad, state.get("remainder"), state["momentum_buffer"]
    return tuple(None if t is None else _plain(t).contiguous() for t in tensors)


def _check_grad(parameter: nn.Parameter, moments: Moments) -> None:
    grad = parameter.grad
    if grad.layout != torch.strided or grad.dtype != parameter.dtype:
        raise ValueError(f"{moments.optimizer}: got a gradient of layout {grad.layout} in {grad.dtype}, expected a "
                         f"dense one in {parameter.dtype}")  # fmt: skip


def _in_memory_order(parameter: nn.Parameter, state: dict[str, Tensor]) -> tuple[Tensor | None, ...]:
    """Return the tensors as one axis, in the order of the parameter's memory; a tensor in another order is copied."""
    order = torch.empty_like(parameter, device="meta").stride()
    if order != parameter.stride():  # it has gaps
        order = torch.empty(parameter.shape, device="meta").stride()
    for name in (*ADAMW.names, "remainder"):
        if name in state and state[name].stride() != order:
            state[name] = _reordered(state[name], order)
    like_parameter = (parameter, parameter.grad, *(state.get(name) for name in ("remainder", *ADAMW.names)))
    return *(None if t is None else _flat(_reordered(t, order)) for t in like_parameter), state["step"]


def _reordered(tensor: Tensor, stride: tuple[int, ...]) -> Tensor:
    if tensor.stride() == stride:
        return tensor
    return torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _flat(tensor: Tensor) -> Tensor:
    return _plain(tensor).as_strided((tensor.numel(),), (1,))


def _plain(tensor: Tensor) -> Tensor:
    """Return a tensor without its class. torch.compile does not trace as_subclass, and continues wrongly after it."""
    plain = tensor.detach()
    return plain if type(plain) is Tensor else plain.as_subclass(Tensor)


def _fit(state: dict[str, Tensor], parameter: nn.Parameter, moments: Moments) -> None:
    """Make the state if the parameter is new; else move it to the parameter's new device or dtype."""
    wide, optimizer = WIDE.get(parameter.dtype), moments.optimizer
    if wide is None:
        raise ValueError(f"{optimizer}: a parameter is now {parameter.dtype}, expected float32, bfloat16 or float64")
    if moments.names[0] not in state:
        if moments.counts_steps:
            state["step"] = torch.zeros((), dtype=wide, device=parameter.device)
        for name in moments.names:
            state[name] = torch.zeros_like(parameter, dtype=wide, requires_grad=False)
    for name in moments.names:
        if state[name].shape != parameter.shape:
            raise ValueError(
                f"{optimizer}: a parameter has shape {tuple(parameter.shape)} and {name} has "
                f"{tuple(state[name].shape)}, expected the same: build a new optimizer after a change of shape"
            )
    for name in moments.all_names:
        state[name] = state[name].to(parameter.device, wide)
    if parameter.dtype != torch.bfloat16:
        state.pop("remainder", None)
    elif "remainder" in state:
        state["remainder"] = state["remainder"].to(parameter.device)
    else:
        state["remainder"] = torch.zeros_like(parameter, dtype=torch.int16, requires_grad=False)


def split_pieces(master: Tensor) -> tuple[Tensor, Tensor]:
    """Split a float32 master into (bfloat16 parameter, int16 remainder) of its memory format, piece by piece."""
    high, low = (torch.empty_like(master, dtype=dtype) for dtype in (torch.bfloat16, torch.int16))
    flat = (_flat(t).split(SPLIT_ELEMENTS) for t in (high, low, _reordered(master, high.stride())))
    for high_piece, low_piece, piece in zip(*flat, strict=True):
        new_high, new_low = split(piece.float())
        high_piece.copy_(new_high)
        low_piece.copy_(new_low)
    return high, low


def master_of(parameter: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """Return the float32 master of a parameter; the parameter itself if it is not bfloat16."""
    value, remainder = parameter.detach(), state.get("remainder")
    if value.dtype != torch.bfloat16:
        return value
    return value.float() if remainder is None else join(value, remainder.to(value.device))


def check_entry(
    i: int, entry: Mapping[str, Any] | None, parameter: Tensor, moments: Moments
) -> Mapping[str, Any]:  # fmt: skip
    """Return a copy of entry i of a state dict.

    It is empty, or has only a remainder, if the parameter never had a gradient.

    Raises:
        ValueError: the entry is another optimizer's, or does not fit the parameter.
    """
    entry = dict(entry or {})  # a state dict holds the optimizer's own dicts
    missing = [name for name in moments.all_names if name not in entry]
    if missing and set(entry) - {"remainder"}:
        expected = ", ".join(moments.all_names)
        raise ValueError(f"{moments.optimizer}: state {i} has {', '.join(entry)}, expected {expected}")
    for name in (*moments.names, "remainder", "master"):
        if name in entry and entry[name].shape != parameter.shape:
            raise ValueError(
                f"{moments.optimizer}: {name} of state {i} has shape {tuple(entry[name].shape)}, expected "
                f"{tuple(parameter.shape)}"
            )
    if "remainder" in entry and entry["remainder"].dtype != torch.int16:
        got = entry["remainder"].dtype
        raise ValueError(f"{moments.optimizer}: remainder of state {i} has dtype {got}, expected torch.int16")
    return entry


def loaded_entry(
    entry: Mapping[str, Any], remainder: Tensor | None, parameter: nn.Parameter, moments: Moments
) -> dict[str, Tensor]:
    """Return a parameter's state as a copy of an entry that `check_entry` has passed.

    Args:
        entry: of a state dict.
        remainder: of a bfloat16 parameter, taken if the entry has none, as one of torch.optim.AdamW.
        parameter: gets the high half of a master that was saved unsplit.
    """
    state, wide = {}, WIDE[parameter.dtype]
    if moments.names[0] in entry:
        if moments.counts_steps:
            state["step"] = torch.full((), float(entry["step"]), dtype=wide, device=parameter.device)
        for name in moments.names:
            state[name] = torch.empty_like(parameter, dtype=wide, requires_grad=False).copy_(entry[name])
    if parameter.dtype != torch.bfloat16:
        return state
    if "remainder" in entry:
        remainder = torch.empty_like(parameter, dtype=torch.int16, requires_grad=False).copy_(entry["remainder"])
    elif "master" in entry:  # written by a version that did not split masters
        high, remainder = split_pieces(entry["master"].to(parameter.device))
        parameter.copy_(high)
    return state if remainder is None else {**state, "remainder": remainder}
