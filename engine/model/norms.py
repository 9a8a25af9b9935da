"""LayerNorm and RMSNorm on the fused ops, with torch's parameters."""

from __future__ import annotations

from torch import Tensor, nn

from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.model.plain import fusable, is_plain, plain_parameters
from peakgpt.engine.model.recompute import recomputable
from peakgpt.kernels.ops.norm import add_layernorm, add_rmsnorm, layernorm, rmsnorm

# config.residual -> the norms of a block: ln_1 and ln_2 before its two branches, the others after them. Those of
# "post_norm" normalize the sums.
BLOCK_NORMS = {
    "pre_norm": ("ln_1", "ln_2"),
    "post_norm": ("ln_1", "ln_2"),
    "parallel": ("ln_1",),
    "parallel_two_norms": ("ln_1", "ln_2"),
    "sandwich_norm": ("ln_1", "ln_1_out", "ln_2", "ln_2_out"),
    "output_norm": ("ln_1_out", "ln_2_out"),
}


@fusable
class LayerNorm(nn.LayerNorm):
    """LayerNorm over the last axis."""

    recompute = False  # set by engine/model/recompute.py

    def __init__(
        self, n_embd: int, eps: float = 1e-5, *, elementwise_affine: bool = True, bias: bool = True, device=None,
        dtype=None,
    ):  # fmt: skip
        super().__init__(n_embd, eps, elementwise_affine, bias, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x, (..., C)."""
        y = layernorm(x, _weight(self.weight, x), self.bias, eps=self.eps)
        return recomputable(y, self.forward, x) if self.recompute and is_plain(self, LayerNorm) else y


@fusable
class RMSNorm(nn.RMSNorm):
    """RMSNorm over the last axis."""

    recompute = False  # set by engine/model/recompute.py
    offset = 0.0

    def __init__(self, n_embd: int, eps: float | None = None, *, offset: float = 0.0, device=None, dtype=None):
        """
        Args:
            n_embd: C.
            eps: added to the mean square; None as in torch.
            offset: added to the weight, which starts at 1 - offset.
        """
        super().__init__(n_embd, eps=eps, device=device, dtype=dtype)
        if offset:
            self.offset = offset
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weight so that its sum with the offset is 1."""
        nn.init.constant_(self.weight, 1.0 - self.offset)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x, (..., C)."""
        y = rmsnorm(x, self.weight, eps=self.eps, offset=self.offset)
        return recomputable(y, self.forward, x) if self.recompute and is_plain(self, RMSNorm) else y


def add_norm(norm: nn.Module, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Add the output of a branch to the residual stream and normalize the sum, in one kernel if the norm is plain.

    Args:
        norm: LayerNorm, RMSNorm, or what stands in the place of one and then runs its own forward.
        x: (..., C), the output of a branch. Under autocast it has the lower precision while the residual stream stays
            float32; it is cast to the dtype of the stream.
        residual: (..., C).
    Returns:
        (sum, normed), both (..., C).
    """
    x = x.to(residual.dtype)
    if (p := plain_parameters(norm, LayerNorm)) is not None:
        total, y = add_layernorm(x, residual, _weight(p["weight"], x), p["bias"], eps=norm.eps)
    elif (p := plain_parameters(norm, RMSNorm)) is not None:
        total, y = add_rmsnorm(x, residual, p["weight"], eps=norm.eps, offset=norm.offset)
    else:
        total = x + residual
        return total, norm(total)
    return total, recomputable(y, norm.forward, total) if norm.recompute else y


def _weight(weight: Tensor | None, x: Tensor) -> Tensor:
    """Return the weight of a norm of x, (..., C); the ops expect one, so a norm without a weight has ones."""
    return x.new_ones(x.shape[-1]) if weight is None else weight


def make_norm(config: GPTConfig) -> LayerNorm | RMSNorm:
    """Build the norm of a model: `config.norm` chooses the class."""
    if config.norm == "rms":
        return RMSNorm(config.n_embd, config.layer_norm_epsilon, offset=config.norm_offset)
    options = {"elementwise_affine": config.norm_weight, "bias": config.has_bias("norm")}
    return LayerNorm(config.n_embd, config.layer_norm_epsilon, **options)
