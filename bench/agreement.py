"""The check before a timing: a contender's outputs must be close to eager's, or closer to float64 than eager's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

OUTPUT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}  # relative L2; only a wrong kernel exceeds it


def expect_close(
    label: str,
    outputs: Sequence[Tensor],
    reference: Sequence[Tensor],
    dtype: torch.dtype,
    truth: Callable[[], Sequence[Tensor]] | None = None,
) -> None:
    """Compare outputs one by one.

    Eager in a half precision may itself be off by more than the tolerance: a reduction over many rows in bfloat16. So a
    difference from eager counts only if the contender is also off the truth, by more than the tolerance and by more
    than twice eager's error.

    Args:
        label: name of the contender, for the message.
        outputs: tensors of the contender.
        reference: tensors of eager.
        dtype: key of OUTPUT_TOLERANCE.
        truth: returns the tensors in float64; called only if a difference exceeds the tolerance. None: eager decides.
    Raises:
        ValueError: a relative L2 error exceeds the limit or is not finite.
    """
    limit = OUTPUT_TOLERANCE[dtype]
    differences = [_relative_error(a, b) for a, b in zip(outputs, reference, strict=True)]
    if all(difference <= limit for difference in differences):
        return
    errors, limits, judge = differences, [limit] * len(differences), ""
    if truth is not None:
        true = truth()
        errors = [_relative_error(a, t) for a, t in zip(outputs, true, strict=True)]
        limits = [max(limit, 2 * _relative_error(b, t)) for b, t in zip(reference, true, strict=True)]
        judge = ", and off float64 by {:.2g}"
    for i, (difference, error, allowed) in enumerate(zip(differences, errors, limits, strict=True)):
        if not error <= allowed:
            off = f"off eager by {difference:.2g}, expected at most {allowed:.2g}{judge.format(error)}"
            raise ValueError(f"{label}: result {i} is {off}")


def _relative_error(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)).item()
