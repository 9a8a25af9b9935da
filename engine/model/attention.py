"""The attention layer of a GPT on the fused ops, with GPT-2's parameter names."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peakgpt.engine.model.fp8 import fp8_linear
from peakgpt.engine.model.kv_cache import AttentionCache
from peakgpt.engine.model.norms import RMSNorm
from peakgpt.engine.model.plain import fusable, plain_parameters, run_linear
from peakgpt.engine.model.positions import NO_POSITIONS, Positions
from peakgpt.engine.model.state_dicts import ModuleWithConv1D
from peakgpt.kernels.ops.attention import attention, attention_qkv
from peakgpt.kernels.ops.attention_math import default_scale
from peakgpt.kernels.ops.linear import linear
from peakgpt.kernels.ops.qk_norm import qk_norm
from peakgpt.kernels.ops.rotary import rotary


@fusable
class CausalSelfAttention(ModuleWithConv1D):
    """Causal attention: c_attn computes queries, keys and values in one product, c_proj mixes the heads."""

    ALIASES = (
        {"c_attn": ("in_proj_",), "c_proj": ("out_proj.",)},
        {"c_attn": ("q_proj.", "k_proj.", "v_proj."), "c_proj": ("out_proj.",)},
        {"c_attn": ("q_proj.", "k_proj.", "v_proj."), "c_proj": ("o_proj.",)},
    )

    def __init__(
        self, n_embd: int, n_head: int, *, n_kv_head: int | None = None, head_dim: int | None = None,
        bias: bool = True, out_bias: bool | None = None, window: int | None = None, scale: float | None = None,
        softcap: float | None = None, qkv_clip: float | None = None, sinks: bool = False, dropout: float = 0.0,
        qk_norm: str = "none", norm_eps: float | None = None, norm_offset: float = 0.0,
        relative: nn.Module | None = None, rotary_table: int | None = 0, device=None, dtype=None,
    ):  # fmt: skip
        """
        Args:
            n_embd: C.
            n_head: H query heads.
            n_kv_head: K key and value heads, a divisor of H; None means H.
            head_dim: D; None means C / H.
            bias: whether c_attn has a bias.
            out_bias: whether c_proj has a bias; None means the same as c_attn.
            window: number of keys that a query attends to, including its own; None means all.
            scale: factor on q k^T; None means 1 / sqrt(D).
            softcap: limit of the scaled scores: softcap * tanh(score / softcap); None means no limit.
            qkv_clip: limit of queries, keys and values after their projection, -limit to limit; None means no limit.
            sinks: whether each query head has a learned logit, the parameter `sinks` (H,), that takes part in its
                softmax and has no value. It starts at zero.
            dropout: probability of dropping an attention weight in training.
            qk_norm: RMSNorm of queries and keys before their rotation: "none"; "head", of each head with weights (D,);
                "full", of all query heads together with a weight (H D,), and of all key heads.
            norm_eps, norm_offset: of these norms, as in RMSNorm.
            relative: RelativeKeys or RelativeBias of engine/model/relative_positions.py; None without them.
            rotary_table: number of the pair (cos, sin) in Positions.rotary; None if this layer does not rotate.
        Raises:
            ValueError: sizes that do not fit each other.
        """
        super().__init__()
        self.n_head, self.n_kv_head = n_head, n_kv_head or n_head
        if n_head % self.n_kv_head or (head_dim is None and n_embd % n_head):
            raise ValueError(
                f"CausalSelfAttention: n_embd {n_embd}, n_head {n_head}, n_kv_head {self.n_kv_head}, "
                "expected n_head to divide n_embd and n_kv_head to divide n_head"
            )
        self.head_dim, self.dropout, self.fp8 = head_dim or n_embd // n_head, dropout, False
        self.window, self.scale, self.softcap, self.qkv_clip = window, scale, softcap, qkv_clip
        self.rotary_table, self.qk_norm = rotary_table, qk_norm
        logits = nn.Parameter(torch.zeros(n_head, device=device, dtype=dtype)) if sinks else None
        self.register_parameter("sinks", logits)
        if relative is not None:
            self.relative = relative
        packed = (n_head + 2 * self.n_kv_head) * self.head_dim
        out_bias = bias if out_bias is None else out_bias
        self.c_attn = nn.Linear(n_embd, packed, bias=bias, device=device, dtype=dtype)
        self.c_proj = nn.Linear(n_head * self.head_dim, n_embd, bias=out_bias, device=device, dtype=dtype)
        if qk_norm not in ("none", "head", "full"):
            raise ValueError(f"CausalSelfAttention: qk_norm is {qk_norm!r}, expected none, head or full")
        if qk_norm != "none":
            q_heads, k_heads = (n_head, self.n_kv_head) if qk_norm == "full" else (1, 1)
            options = {"offset": norm_offset, "device": device, "dtype": dtype}
            self.q_norm = RMSNorm(q_heads * self.head_dim, norm_eps, **options)
            self.k_norm = RMSNorm(k_heads * self.head_dim, norm_eps, **options)

    def forward(
        self, x: Tensor, cache: AttentionCache | None = None, layer: int = 0, positions: Positions = NO_POSITIONS
    ) -> Tensor:
        """Attend from each token to itself and the tokens before it.

        Args:
            x: (B, T, C).
            cache: KV cache with the keys and values of the tokens before x; those of x are appended.
            layer: index of this layer in the cache.
            positions: positions of the tokens of x, for models whose attention depends on them.
        Returns:
            (B, T, C)
        """
        qkv = self._linear(self.c_attn, x).unflatten(-1, (-1, self.head_dim))  # (B, T, H + 2 K, D)
        if self.qkv_clip is not None:
            qkv = qkv.clamp(-self.qkv_clip, self.qkv_clip)
        weights = None
        if self.qk_norm != "none":
            qkv, weights = self._norms(qkv)
        dropout = self.dropout if self.training and cache is None else 0.0
        if cache is not None or dropout or positions.need_unpacked_qkv:
            y = self._unpacked(qkv, weights, cache, layer, positions, dropout)
        else:
            y = self._packed(qkv, weights, positions)
        return self._linear(self.c_proj, y.flatten(2))  # (B, T, H D) -> (B, T, C)

    def _norms(self, qkv: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Return qkv and the weights of q_norm and k_norm; if one is not plain, the normalized qkv and None."""
        parameters = [plain_parameters(norm, RMSNorm) for norm in (self.q_norm, self.k_norm)]
        if None not in parameters and self.q_norm.eps == self.k_norm.eps and self.q_norm.offset == self.k_norm.offset:
            return qkv, tuple(p["weight"] for p in parameters)
        q, k, v = self._split(qkv)
        joint = self.qk_norm == "full"
        q, k = (n(t.flatten(2) if joint else t).reshape(t.shape) for n, t in ((self.q_norm, q), (self.k_norm, k)))
        return torch.cat((q, k, v), 2), None

    def _packed(self, qkv: Tensor, weights: tuple[Tensor, Tensor] | None, positions: Positions) -> Tensor:
        """Run norms, rotary embedding and attention as one op on packed queries, keys and values."""
        options = {} if weights is None else {"norm_eps": self.q_norm.eps, "norm_offset": self.q_norm.offset}
        return attention_qkv(
            qkv, *(self._angles(positions) or (None, None)), positions.cu_seqlens, *(weights or (None, None)),
            self.sinks, n_head=self.n_head, interleaved=positions.interleaved, window=self.window, scale=self.scale,
            softcap=self.softcap, **options,
        )  # fmt: skip

    def _unpacked(
        self, qkv: Tensor, weights: tuple[Tensor, Tensor] | None, cache: AttentionCache | None, layer: int,
        positions: Positions, dropout: float,
    ) -> Tensor:  # fmt: skip
        """Run attention with a KV cache, dropout, a bias or left padding."""
        tables, heads, shape = self._angles(positions), self.n_head + self.n_kv_head, qkv.shape[:2]
        if tables is not None and len(tables[0]) > shape[1]:  # one row for each token of the batch
            qkv = qkv.flatten(0, 1)[None]
        if weights is not None:
            qk, v = qkv.split((heads, self.n_kv_head), 2)
            q, k = qk_norm(
                qk, *weights, *(tables or (None, None)), n_head=self.n_head, interleaved=positions.interleaved,
                eps=self.q_norm.eps, offset=self.q_norm.offset,
            ).split((self.n_head, self.n_kv_head), 2)  # fmt: skip
        else:
            if tables is not None:
                qkv = rotary(qkv, *tables, heads=heads, interleaved=positions.interleaved)
            q, k, v = self._split(qkv)
        if qkv.shape[:2] != shape:
            q, k, v = (t[0].unflatten(0, shape) for t in (q, k, v))
        bias = None
        if positions.relative is not None:
            q, bias = self.relative(q, positions.relative, default_scale(self.head_dim, self.scale))
        options = {"window": self.window, "scale": self.scale, "softcap": self.softcap, "alibi": positions.alibi,
                   "bias": bias, "sinks": self.sinks, "kv_start": positions.start}  # fmt: skip
        if cache is None:
            return attention(q, k, v, dropout=dropout, cu_seqlens=positions.cu_seqlens, **options)
        return cache.attend(layer, q, k, v, **options)

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return qkv.split((self.n_head, self.n_kv_head, self.n_kv_head), dim=2)

    def _angles(self, positions: Positions) -> tuple[Tensor, Tensor] | None:
        """Return cos and sin of this layer's angles, (T, R / 2) or (B T, R / 2); None if it does not rotate."""
        is_rotary = positions.rotary and self.rotary_table is not None
        return positions.rotary[self.rotary_table] if is_rotary else None

    def _linear(self, layer: nn.Module, x: Tensor) -> Tensor:
        return run_linear(layer, x, fp8_linear if self.fp8 and self.training else linear)
