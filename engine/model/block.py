"""One layer of a GPT: attention and MLP with their norms, added to the residual stream.

The add of a branch and the norm after it are one kernel (`add_norm`). So `run_blocks` lets a block end with the norm of
the next block: it receives its input normalized, and returns the input of the next block normalized. A block that was
hooked, wrapped or replaced is called instead, with and for hidden states alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peakgpt.engine.model.attention import CausalSelfAttention
from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.model.experts import Experts
from peakgpt.engine.model.kv_cache import AttentionCache
from peakgpt.engine.model.mlp import GELUMLP, GatedMLP
from peakgpt.engine.model.norms import BLOCK_NORMS, add_norm, make_norm
from peakgpt.engine.model.plain import fusable, is_plain
from peakgpt.engine.model.positions import NO_POSITIONS, Positions
from peakgpt.engine.model.recompute import checkpoint_block, recompute_marked
from peakgpt.engine.model.relative_positions import RELATIVE
from peakgpt.kernels.ops.dropout import dropout

Branch = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Pass:
    """What the blocks of one forward pass share. Not a tuple: wrappers of blocks copy, move and cast those.

    Args:
        cache: KV cache; None in training.
        positions: positions of the tokens.
        balance: how each layer uses its experts is appended, see engine/model/experts.py.
    """

    cache: AttentionCache | None = None
    positions: Positions = NO_POSITIONS
    balance: list[Tensor] | None = None


ALONE = Pass()


@fusable
class Block(nn.Module):
    """One layer of a GPT. `run_blocks` chains the blocks."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        c = config
        self._add_norms(c, "ln_1")
        self.attn = CausalSelfAttention(
            c.n_embd, c.n_head, n_kv_head=c.n_kv_head, head_dim=c.head_dim, bias=c.has_bias("qkv"),
            out_bias=c.has_bias("out"), window=c.windows[layer], scale=c.scale(layer), softcap=c.attention_softcap,
            qkv_clip=c.qkv_clip, sinks=c.attention_sinks, dropout=c.attention_dropout,
            qk_norm=c.qk_norm, norm_eps=c.layer_norm_epsilon, norm_offset=c.norm_offset,
            relative=RELATIVE[c.position](c) if c.position in RELATIVE else None, rotary_table=c.rotary_table(layer),
        )  # fmt: skip
        self._add_norms(c, "ln_2")
        options = {"bias": c.has_bias("mlp"), "activation": c.activation}
        make_mlp = GatedMLP if c.gated_mlp else GELUMLP
        self.mlp = Experts(c) if c.has_experts(layer) else make_mlp(c.n_embd, c.n_inner, **options)
        self.dropout, self.residual = c.dropout, c.residual
        self.recompute = self.recompute_norms = False  # set by engine/model/recompute.py

    def _add_norms(self, config: GPTConfig, branch: str) -> None:
        for name in BLOCK_NORMS[config.residual]:
            if name.startswith(branch):
                self.add_module(name, make_norm(config))

    def forward(self, x: Tensor, layer: int = 0, shared: Pass = ALONE) -> Tensor:
        """Run one layer.

        Args:
            x: (B, T, C), the hidden states.
            layer: index of the layer in the cache.
            shared: what all layers of this forward pass share.
        Returns:
            (B, T, C), the hidden states after the layer.
        """
        return self.run(x, None, None, layer, shared)[0]

    def run(
        self, x: Tensor, h: Tensor | None, next_norm: nn.Module | None, layer: int, shared: Pass
    ) -> tuple[Tensor, Tensor | None]:
        """Run one layer, and the norm after it.

        Args:
            x: (B, T, C), the hidden states.
            h: (B, T, C), x normalized by ln_1; None if that is left to this block, and with post_norm.
            next_norm: ln_1 of the next layer, or ln_f; None if the next layer is left to compute it.
            layer, shared: as in `forward`.
        Returns:
            (x, h) for the next layer.
        """
        cache, positions = shared.cache, shared.positions
        p = self.dropout if self.training and cache is None else 0.0

        def attn(h: Tensor) -> Tensor:
            return _dropout(self.attn(h, cache, layer, positions), p)

        def mlp(h: Tensor) -> Tensor:
            y = self.mlp(h, shared.balance, positions.start) if _has_experts(self.mlp) else self.mlp(h)
            return _dropout(y, p)

        run = RESIDUALS[self.residual]
        saves_activations = cache is None and torch.is_grad_enabled()
        if self.recompute and saves_activations:
            return checkpoint_block(run, self, x, h, next_norm, attn, mlp)
        if self.recompute_norms and saves_activations:
            with recompute_marked():
                return run(self, x, h, next_norm, attn, mlp)
        return run(self, x, h, next_norm, attn, mlp)


def run_blocks(blocks: nn.ModuleList, x: Tensor, last_norm: nn.Module | None, shared: Pass) -> Tensor:
    """Run all blocks and the last norm.

    Args:
        blocks: Blocks, or modules that are called as `Block.forward`.
        x: (B, T, C), the embedding.
        last_norm: ln_f; None with post_norm.
        shared: see Pass.
    Returns:
        (B, T, C)
    """
    h, plain = None, [is_plain(block, Block) for block in blocks]
    for layer, block in enumerate(blocks):
        if not plain[layer]:
            x, h = block(x, layer, shared), None
            continue
        is_last = layer + 1 == len(plain)
        next_norm = last_norm if is_last else blocks[layer + 1]._modules.get("ln_1") if plain[layer + 1] else None
        x, h = block.run(x, h, next_norm, layer, shared)
    if last_norm is None:
        return x
    return last_norm(x) if h is None else h


def _pre_norm(block: Block, x: Tensor, h: Tensor | None, next_norm: nn.Module | None, attn: Branch, mlp: Branch):
    x, h = add_norm(block.ln_2, attn(block.ln_1(x) if h is None else h), x)
    return _add(mlp(h), x, next_norm)


def _post_norm(block: Block, x: Tensor, h: None, next_norm: nn.Module | None, attn: Branch, mlp: Branch):
    _, x = add_norm(block.ln_1, attn(x), x)
    return add_norm(block.ln_2, mlp(x), x)[1], None


def _sandwich_norm(block: Block, x: Tensor, h: Tensor | None, next_norm: nn.Module | None, attn: Branch, mlp: Branch):
    x, h = add_norm(block.ln_2, block.ln_1_out(attn(block.ln_1(x) if h is None else h)), x)
    return _add(block.ln_2_out(mlp(h)), x, next_norm)


def _output_norm(block: Block, x: Tensor, h: Tensor | None, next_norm: nn.Module | None, attn: Branch, mlp: Branch):
    x = x + block.ln_1_out(attn(x)).to(x.dtype)
    return _add(block.ln_2_out(mlp(x)), x, next_norm)


def _parallel(block: Block, x: Tensor, h: Tensor | None, next_norm: nn.Module | None, attn: Branch, mlp: Branch):
    h = block.ln_1(x) if h is None else h
    return _add(attn(h) + mlp(h), x, next_norm)


def _parallel_two_norms(
    block: Block, x: Tensor, h: Tensor | None, next_norm: nn.Module | None, attn: Branch, mlp: Branch
):
    h = block.ln_1(x) if h is None else h
    return _add(attn(h) + mlp(block.ln_2(x)), x, next_norm)


def _add(branch: Tensor, x: Tensor, next_norm: nn.Module | None) -> tuple[Tensor, Tensor | None]:
    """Add the last branch of a block to the residual stream, and normalize the sum if the next norm is known."""
    return (x + branch.to(x.dtype), None) if next_norm is None else add_norm(next_norm, branch, x)


# config.residual -> how the branches are connected to the residual stream
RESIDUALS = {
    "pre_norm": _pre_norm,
    "post_norm": _post_norm,
    "parallel": _parallel,
    "parallel_two_norms": _parallel_two_norms,
    "sandwich_norm": _sandwich_norm,
    "output_norm": _output_norm,
}


def _has_experts(mlp: nn.Module) -> bool:
    """Return whether an MLP is, or wraps, Experts: these also take `balance`."""
    if isinstance(mlp, Experts | GELUMLP | GatedMLP):
        return isinstance(mlp, Experts)
    return any(isinstance(part, Experts) for part in mlp.modules())


def _dropout(x: Tensor, p: float) -> Tensor:
    return dropout(x, p=p) if p else x
