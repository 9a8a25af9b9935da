"""Control tags: tokens in front of a text that say what it is to be, never predicted themselves.

    loss = - mean over the text of log p(x_t | tags, x_<t)

A tag is an id of the vocabulary like any other; to generate, the prompt begins with the tags. Madani et al. 2020,
"ProGen: Language Modeling for Protein Generation", arXiv:2004.03497, section 3; Keskar et al. 2019, "CTRL",
arXiv:1909.05858.
"""

from __future__ import annotations

import torch
from torch import Tensor

IGNORE = -100  # what linear_cross_entropy and F.cross_entropy leave out


def prefix_tags(tags: Tensor, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Put tags in front of a training batch.

    Args:
        tags: (B, G), G at least 1, integers.
        ids, targets: (B, T), as Batches gives them: targets[:, t] follows ids[:, t].
    Returns:
        (ids, targets), both (B, G + T). The last tag's target is the text's first token, those of other tags do not
        count.
    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    if tags.dim() != 2 or ids.dim() != 2 or tags.shape[1] < 1 or len(tags) != len(ids) or targets.shape != ids.shape:
        raise ValueError(
            f"prefix_tags: got tags {tuple(tags.shape)}, ids {tuple(ids.shape)}, targets {tuple(targets.shape)}, "
            "expected (B, G), (B, T), (B, T) with G at least 1"
        )
    if tags.dtype.is_floating_point or tags.dtype.is_complex or tags.dtype == torch.bool:
        raise ValueError(f"prefix_tags: tags have dtype {tags.dtype}, expected an integer one")
    tags = tags.to(ids)
    unseen = torch.full_like(tags[:, 1:], IGNORE)
    return torch.cat((tags, ids), 1), torch.cat((unseen, ids[:, :1], targets), 1)
