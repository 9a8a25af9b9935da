"""From logits to the next token.

    p = softmax(z / temperature)      token = argmax_v p_v / e_v,   e_v ~ Exp(1)

top-k keeps the k largest logits (Fan et al. 2018, arXiv:1805.04833), top-p the fewest tokens whose probabilities
reach p (Holtzman et al. 2020, arXiv:1904.09751). The race of exponentials draws from p as torch.multinomial does,
without its host sync.
"""

from __future__ import annotations

import torch
from torch import Tensor


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise ValueError for a parameter out of range."""
    if not temperature >= 0:
        raise ValueError(f"sampling: temperature is {temperature}, expected at least 0 (0 is greedy)")
    if top_k is not None and top_k < 1:
        raise ValueError(f"sampling: top_k is {top_k}, expected at least 1, or None")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"sampling: top_p is {top_p}, expected 0 < top_p <= 1, or None")


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Choose a token a row.

    Args:
        logits: (B, V).
        temperature: 0 takes the largest logit, and the rest does not matter.
        top_k, top_p: what may be chosen; top_k first.
        generator: on the logits' device; torch's own where None.
    Returns:
        (B,) int64
    """
    if temperature == 0:
        return logits.argmax(-1)
    p = probabilities(logits, temperature, top_k, top_p)
    return (p / torch.empty_like(p).exponential_(generator=generator)).argmax(-1)


def probabilities(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """(B, V) float32: what `sample` draws from, at a temperature above 0."""
    z = logits.float() / temperature
    if top_k is not None and top_k < z.shape[-1]:
        z = z.masked_fill(z < z.topk(top_k).values[:, -1:], float("-inf"))
    p = z.softmax(-1)
    if top_p is None:
        return p
    ordered, order = p.sort(descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    kept = ordered.masked_fill(before >= top_p, 0.0)
    return torch.zeros_like(p).scatter_(-1, order, kept / kept.sum(-1, keepdim=True))
