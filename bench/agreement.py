"""The check before a timing: a contender's outputs must be close to eager's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

OUTPUT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}  # relative L2; only a wrong kernel exceeds it


def expect_close(label: str, outputs: Sequence[Tensor], reference: Sequence[Tensor], dtype: torch.dtype) -> None:
    """Compare outputs one by one.

    Args:
        label: name of the contender, for the message.
        outputs: tensors of the contender.
        reference: tensors of eager.
        dtype: key of OUTPUT_TOLERANCE.
    Raises:
        ValueError: a relative L2 error exceeds the tolerance or is not finite.
    """
    limit = OUTPUT_TOLERANCE[dtype]
    for i, (a, b) in enumerate(zip(outputs, reference, strict=True)):
        error = ((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-30)).item()
        if not error <= limit:
            raise ValueError(f"{label}: result {i} is off eager by {error:.2g}, expected at most {limit}")
