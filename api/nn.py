"""Layers on fused kernels for any PyTorch model, and the loss of a language model as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peakgpt.engine.model.attention import CausalSelfAttention
from peakgpt.engine.model.mlp import GELUMLP, GatedMLP
from peakgpt.engine.model.norms import LayerNorm, RMSNorm
from peakgpt.kernels.ops.linear_cross_entropy import linear_cross_entropy

__all__ = ["GELUMLP", "CausalSelfAttention", "GatedMLP", "LayerNorm", "LinearCrossEntropyLoss", "RMSNorm"]


class LinearCrossEntropyLoss(nn.Module):
    """The head and the cross entropy of a language model as one module, without storing the logits.

    Computes `F.cross_entropy(hidden @ weight.T, targets)`. To tie the head to a token embedding, assign its
    parameter: `loss.weight = embedding.weight`.
    """

    def __init__(
        self, vocab_size: int, n_embd: int, *, ignore_index: int = -100, reduction: str = "mean",
        label_smoothing: float = 0.0, z_loss: float = 0.0, softcap: float | None = None, device=None, dtype=None,
    ):  # fmt: skip
        """
        Args:
            vocab_size: V.
            n_embd: C.
            ignore_index: targets with this value are ignored: no loss, no gradient, not counted in the mean.
            reduction: "mean" over targets that are not ignored, "sum", or "none".
            label_smoothing: share of the target probability that is spread over the whole vocabulary, 0 to 1.
            z_loss: factor of the term logsumexp(logits)^2 of the loss.
            softcap: limit of the logits: softcap * tanh(logits / softcap); None: no limit.
            device, dtype: of the weight (V, C). It is initialized from N(0, 0.02^2), as in GPT-2.
        Raises:
            ValueError: an unknown reduction.
        """
        super().__init__()
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"LinearCrossEntropyLoss: reduction is {reduction!r}, expected mean, sum or none")
        self.weight = nn.Parameter(torch.empty(vocab_size, n_embd, device=device, dtype=dtype).normal_(0.0, 0.02))
        self.ignore_index, self.reduction = ignore_index, reduction
        self.label_smoothing, self.z_loss, self.softcap = label_smoothing, z_loss, softcap

    def forward(self, hidden: Tensor, targets: Tensor, loss_weight: Tensor | None = None) -> Tensor:
        """Compute the loss.

        Args:
            hidden: (..., C), dtype of the weight, or a lower precision under autocast.
            targets: (...) int64 or int32, already shifted.
            loss_weight: (...) float32, a factor for the loss of each target; None means 1.
        Returns:
            float32: a scalar, or (...) with reduction "none".
        Raises:
            ValueError: shapes, dtypes or devices that do not fit; on the CPU also a target out of range.
        """
        return linear_cross_entropy(
            hidden, self.weight, targets, loss_weight, ignore_index=self.ignore_index, reduction=self.reduction,
            label_smoothing=self.label_smoothing, z_loss=self.z_loss, softcap=self.softcap,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """Describe the sizes, as nn.Linear does."""
        return f"vocab_size={self.weight.shape[0]}, n_embd={self.weight.shape[1]}, reduction={self.reduction}"
