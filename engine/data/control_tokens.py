"""Control tokens: tokens before a sequence that describe it. The model reads them but is not trained to predict them.

    loss = - mean over the sequence of log p(x_t | control tokens, x_<t)

A control token is an id of the vocabulary. To generate, begin the prompt with control tokens. Madani et al. 2020,
"ProGen: Language Modeling for Protein Generation", arXiv:2004.03497, section 3; Keskar et al. 2019, "CTRL",
arXiv:1909.05858.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peakgpt.kernels.ops.linear_cross_entropy import IGNORE_INDEX


def prepend_control_tokens(control: Tensor, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Put control tokens before the sequences of a training batch.

    Args:
        control: (B, G) integers, G at least 1.
        ids, targets: (B, T); targets[:, t] is the token after ids[:, t].
    Returns:
        (ids, targets), both (B, G + T). The target of the last control token is the first token of the sequence; the
        targets of the other control tokens are ignored.
    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    has_tokens = control.dim() == 2 and control.shape[1] >= 1
    if not has_tokens or ids.dim() != 2 or len(control) != len(ids) or targets.shape != ids.shape:
        raise ValueError(
            f"prepend_control_tokens: got control tokens {tuple(control.shape)}, ids {tuple(ids.shape)}, "
            f"targets {tuple(targets.shape)}, expected (B, G), (B, T), (B, T) with G at least 1"
        )
    if control.dtype.is_floating_point or control.dtype.is_complex or control.dtype == torch.bool:
        raise ValueError(f"prepend_control_tokens: control tokens have dtype {control.dtype}, expected integers")
    control = control.to(ids)
    ignored = torch.full_like(control[:, 1:], IGNORE_INDEX)
    return torch.cat((control, ids), 1), torch.cat((ignored, ids[:, :1], targets), 1)
