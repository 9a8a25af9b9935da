"""One layer of a GPT: attention and MLP with their norms, added to the residual stream.

Each layer ends with the norm of the next one: the add of a branch and the norm after it are one kernel (`add_norm`).
So a block receives its normalized input, and returns the input of the next block normalized by the next block's norm.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from peakgpt.engine.model.attention import CausalSelfAttention
from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.model.experts import Experts
from peakgpt.engine.model.kv_cache import AttentionCache
from peakgpt.engine.model.mlp import GELUMLP, GatedMLP
from peakgpt.engine.model.norms import LayerNorm, RMSNorm, make_norm
from peakgpt.engine.model.positions import NO_POSITIONS, Positions
from peakgpt.engine.model.recompute import checkpoint_block, recompute_marked
from peakgpt.engine.model.relative_positions import RELATIVE
from peakgpt.kernels.ops.dropout import dropout

Branch = Callable[[Tensor], Tensor]


class Block(nn.Module):
    """One layer of a GPT. `Transformer` chains the blocks."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        c = config
        self.ln_1 = make_norm(c)
        self.attn = CausalSelfAttention(
            c.n_embd, c.n_head, n_kv_head=c.n_kv_head, head_dim=c.head_dim, bias=c.has_bias("qkv"),
            out_bias=c.has_bias("out"), window=c.windows[layer], scale=c.scale(layer), dropout=c.attention_dropout,
            relative=RELATIVE[c.position](c) if c.position in RELATIVE else None,
        )  # fmt: skip
        if c.residual != "parallel":
            self.ln_2 = make_norm(c)
        options = {"bias": c.has_bias("mlp"), "activation": c.activation}
        if c.has_experts(layer):
            make_expert = lambda: GELUMLP(c.n_embd, c.n_inner, **options)  # noqa: E731
            self.mlp = Experts(c.n_embd, c.experts, c.experts_per_token, make_expert)
        else:
            self.mlp = (GatedMLP if c.gated_mlp else GELUMLP)(c.n_embd, c.n_inner, **options)
        self.dropout, self.layer, self.residual = c.dropout, layer, c.residual
        self.recompute = self.recompute_norms = False  # set by engine/model/recompute.py

    def forward(
        self, x: Tensor, h: Tensor, next_norm: LayerNorm | RMSNorm | None, cache: AttentionCache | None = None,
        positions: Positions = NO_POSITIONS, balance_losses: list[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Run one layer.

        Args:
            x: (B, T, C), the residual stream.
            h: (B, T, C), x normalized by ln_1; x itself if the norms come after the branches (post_norm).
            next_norm: ln_1 of the next layer, or ln_f; unused with post_norm.
            cache: KV cache; None in training.
            positions: positions of the tokens.
            balance_losses: the balance loss of this layer's experts is appended.
        Returns:
            (x, h) for the next layer.
        """
        p = self.dropout if self.training and cache is None else 0.0

        def attn(h: Tensor) -> Tensor:
            return _dropout(self.attn(h, cache, self.layer, positions), p)

        def mlp(h: Tensor) -> Tensor:
            y = self.mlp(h, balance_losses, positions.start) if isinstance(self.mlp, Experts) else self.mlp(h)
            return _dropout(y, p)

        run = RESIDUALS[self.residual]
        saves_activations = cache is None and torch.is_grad_enabled()
        if self.recompute and saves_activations:
            return checkpoint_block(run, self, x, h, next_norm, attn, mlp)
        if self.recompute_norms and saves_activations:
            with recompute_marked():
                return run(self, x, h, next_norm, attn, mlp)
        return run(self, x, h, next_norm, attn, mlp)


def _pre_norm(block: Block, x: Tensor, h: Tensor, next_norm: nn.Module, attn: Branch, mlp: Branch):
    x, h = block.ln_2.add_norm(attn(h), x)
    return next_norm.add_norm(mlp(h), x)


def _post_norm(block: Block, x: Tensor, h: Tensor, next_norm: None, attn: Branch, mlp: Branch):
    _, h = block.ln_1.add_norm(attn(h), h)
    _, h = block.ln_2.add_norm(mlp(h), h)
    return h, h


def _parallel(block: Block, x: Tensor, h: Tensor, next_norm: nn.Module, attn: Branch, mlp: Branch):
    return next_norm.add_norm(attn(h) + mlp(h), x)


def _parallel_two_norms(block: Block, x: Tensor, h: Tensor, next_norm: nn.Module, attn: Branch, mlp: Branch):
    return next_norm.add_norm(attn(h) + mlp(block.ln_2(x)), x)


# config.residual -> how the branches are connected to the residual stream
RESIDUALS = {
    "pre_norm": _pre_norm,
    "post_norm": _post_norm,
    "parallel": _parallel,
    "parallel_two_norms": _parallel_two_norms,
}


def _dropout(x: Tensor, p: float) -> Tensor:
    return dropout(x, p=p) if p else x
