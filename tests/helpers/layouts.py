"""Layouts of tensors with given values, for tests that compare each of them with a contiguous tensor."""

import torch
from torch import Tensor

STEP = 2
OFFSET, TRANSPOSED, ODD, NEGATED = "offset", "transposed", "odd", "negated"


def layouts(tensor: Tensor) -> list[tuple]:
    """Return the arguments of `lay_out` that apply to a tensor."""
    axes = range(tensor.dim())
    found = [("spread", axis) for axis in axes] + [("expanded", axis) for axis in axes] + [(OFFSET,)]
    found += [(TRANSPOSED,)] if tensor.dim() > 1 else []
    found += [(NEGATED,)] if tensor.dtype == torch.float32 and tensor.numel() > 1 else []
    return found + [(ODD,)] * (1 in tensor.shape)


def poison(dtype: torch.dtype) -> float | int:
    """Return a value that no test's tensor holds: NaN, or an id out of range."""
    return float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max


def lay_out(tensor: Tensor, layout: str, axis: int = 0) -> Tensor:
    """Return the values of a tensor in a layout.

    spread: every second index of an axis; the others hold poison. expanded: stride 0 along an axis, so all indices have
    the values of the first. offset: the storage begins one element earlier. transposed: reversed order of axes in
    memory. odd: axes of size 1 have strides that no contiguous tensor has. negated: the imaginary part of a conjugated
    tensor, whose memory holds the values with the other sign.
    """
    if layout == "spread":
        shape = list(tensor.shape)
        shape[axis] = shape[axis] * STEP + 1
        wide = torch.full(shape, poison(tensor.dtype), dtype=tensor.dtype)
        view = wide[(slice(None),) * axis + (slice(1, None, STEP),)]
        return view.copy_(tensor)
    if layout == "expanded":
        return tensor.narrow(axis, 0, min(1, tensor.shape[axis])).clone().expand(tensor.shape)
    if layout == OFFSET:
        return torch.full((tensor.numel() + 1,), poison(tensor.dtype), dtype=tensor.dtype)[1:].view(tensor.shape).copy_(
            tensor
        )
    if layout == TRANSPOSED:
        order = list(reversed(range(tensor.dim())))
        return tensor.permute(order).clone(memory_format=torch.contiguous_format).permute(order)
    if layout == NEGATED:
        return torch.complex(torch.full_like(tensor, torch.nan), -tensor).conj().imag
    strides = [7 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    return tensor.clone().as_strided(tensor.shape, strides)


def intact(view: Tensor) -> bool:
    """Whether all elements of the storage that a view made by `lay_out` does not show are still poison."""
    base = view._base
    if base is None or base.dtype != view.dtype:
        return True
    hidden = torch.ones(base.untyped_storage().nbytes() // base.element_size(), dtype=torch.bool)
    hidden.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(False)
    rest = base.flatten()[hidden[: base.numel()]]
    return bool((rest.isnan() if base.is_floating_point() else rest == poison(base.dtype)).all())
