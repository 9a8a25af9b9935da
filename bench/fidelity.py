"""How near a contender's next-token probabilities are to those of the same model in float32."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MOST_POSITIONS = 256  # of all streams together: the logits of one case fit in 51 MB with GPT-2's vocabulary


@dataclass(frozen=True)
class Fidelity:
    """Divergence from float32 over the positions of some texts.

        KL(P, Q) = sum_v P(v) (ln P(v) - ln Q(v))    P: float32, Q: the contender

    Args:
        positions: number of positions.
        kl: mean KL of a position, in nats.
        kl_q25, kl_median, kl_q75: quartiles over the positions.
        top1: share of the positions at which both have the same most likely token, 0 to 1.
    """

    positions: int
    kl: float
    kl_q25: float
    kl_median: float
    kl_q75: float
    top1: float

    @classmethod
    def of(cls, logits: Tensor, truth: Tensor) -> Fidelity:
        """Compare logits with those of float32.

        Args:
            logits, truth: (..., V).
        Raises:
            ValueError: the shapes differ, or logits are not finite.
        """
        if logits.shape != truth.shape:
            raise ValueError(f"fidelity: logits have shape {tuple(logits.shape)}, expected {tuple(truth.shape)}")
        rows = zip(logits.flatten(0, -2), truth.flatten(0, -2), strict=True)
        kl = torch.stack([_divergence(*row) for row in rows])
        if not kl.isfinite().all():
            raise ValueError(f"fidelity: logits of {int((~kl.isfinite()).sum())} positions are not finite")
        quartiles = kl.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=kl.dtype)).tolist()
        same = (logits.argmax(-1) == truth.argmax(-1)).double().mean()
        return cls(len(kl), float(kl.mean()), *quartiles, float(same))


def positions_of(streams: int, tokens: int) -> int:
    """Return how many tokens of each stream are compared."""
    return max(1, min(tokens, MOST_POSITIONS // streams))


def _divergence(logits: Tensor, truth: Tensor) -> Tensor:
    """KL of one position in float64; a sum that rounding makes negative is 0."""
    log_p, log_q = (row.double().log_softmax(-1) for row in (truth, logits))
    return (log_p.exp() * (log_p - log_q)).sum().clamp(min=0.0)
