"""LayerNorm and RMSNorm on the fused ops, with torch's parameters."""

from __future__ import annotations

from torch import Tensor, nn

from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.model.plain import fusable, is_plain, plain_parameters
from peakgpt.engine.model.recompute import recomputable
from peakgpt.kernels.ops.norm import add_layernorm, add_rmsnorm, layernorm, rmsnorm


@fusable
class LayerNorm(nn.LayerNorm):
    """LayerNorm over the last axis."""

    recompute = False  # set by engine/model/recompute.py

    def __init__(self, n_embd: int, eps: float = 1e-5, *, bias: bool = True, device=None, dtype=None):
        super().__init__(n_embd, eps=eps, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x, (..., C)."""
        y = layernorm(x, self.weight, self.bias, eps=self.eps)
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
        total, y = add_layernorm(x, residual, p["weight"], p["bias"], eps=norm.eps)
    elif (p := plain_parameters(norm, RMSNorm)) is not None:
        total, y = add_rmsnorm(x, residual, p["weight"], eps=norm.eps, offset=norm.offset)
    else:
        total = x + residual
        return total, norm(total)
    return total, recomputable(y, norm.forward, total) if norm.recompute else y


def make_norm(config: GPTConfig) -> LayerNorm | RMSNorm:
    """Build the norm of a model: `config.norm` chooses the class."""
    if config.norm == "rms":
        return RMSNorm(config.n_embd, config.layer_norm_epsilon, offset=config.norm_offset)
    return LayerNorm(config.n_embd, config.layer_norm_epsilon, bias=config.has_bias("norm"))
