"""Replacements for attention modules with rotary positions: queries and keys are rotated by the op `rotary`."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peakgpt.dropin.attention_function import Mask, attention_forward, expand_bias, is_known_mask, masked_attention
from peakgpt.dropin.intact import is_intact
from peakgpt.dropin.replacements.attention import TransformersAttention
from peakgpt.kernels.ops.rotary import rotary

Tables = tuple[Tensor, Tensor]  # position_embeddings: cos and sin


class RotaryAttention(TransformersAttention):
    """Llama and others, which call transformers' AttentionInterface.

    Options:
        project: names of the projections.
        out: name of the output projection.
        cache: keyword argument with the KV cache.
        half_tables: whether position_embeddings have one column a pair; else all columns twice, as both halves.
        keywords: keyword arguments of the attention function -> attributes of the module.
        dropout: attribute with the dropout rate after the output projection; None without.
        unsupported: attributes of the module that must be None or False.
    """

    @classmethod
    def objection(cls, module: nn.Module, options: dict[str, Any]) -> str | None:
        values = {name: operator.attrgetter(name)(module) for name in options["unsupported"]}
        return next((f"{name} is {value!r}" for name, value in values.items() if value not in (None, False)), None)

    def forward(self, hidden_states, *args, position_embeddings=None, attention_mask=None, **kwargs):
        # More than one row of position_embeddings: each sequence has its own positions.
        if args or position_embeddings is None or len(position_embeddings[0]) != 1 or not is_known_mask(attention_mask):
            kwargs |= {"position_embeddings": position_embeddings, "attention_mask": attention_mask}
            return super().forward(hidden_states, *args, **kwargs)
        names = self._peakgpt
        q, k, v = self._project(hidden_states)
        if getattr(self, "use_rope", True):  # False in some layers of SmolLM3
            q, k = rotate(position_embeddings, q, k, half_tables=names["half_tables"])
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        cache = kwargs.pop(names["cache"], None)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        kwargs |= {keyword: getattr(self, attribute) for keyword, attribute in names["keywords"].items()}
        dropout = self.attention_dropout if self.training else 0.0
        y, weights = attention_forward(self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        y = getattr(self, names["out"])(y.flatten(2))
        if names["dropout"] is not None:
            y = F.dropout(y, getattr(self, names["dropout"]), self.training)
        return y, weights

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return queries, keys and values, (B, T, H or K, D)."""
        return tuple(getattr(self, name)(x).unflatten(-1, (-1, self.head_dim)) for name in self._peakgpt["project"])


class ByHeadAttention(RotaryAttention):
    """GPT-NeoX: one projection with queries, keys and values head by head."""

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        (name,) = self._peakgpt["project"]
        return getattr(self, name)(x).unflatten(-1, (-1, 3 * self.head_size)).chunk(3, -1)


class PackedAttention(RotaryAttention):
    """Phi-3: one projection with the queries of all heads, then the keys, then the values."""

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        (name,) = self._peakgpt["project"]
        heads, groups = self.config.num_attention_heads, self.num_key_value_heads
        return getattr(self, name)(x).unflatten(-1, (-1, self.head_dim)).split((heads, groups, groups), 2)


class NormedHeadsAttention(RotaryAttention):
    """Qwen3 and Gemma 3: q_norm and k_norm normalize each head."""

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        q, k, v = super()._project(x)
        return self._norm(self.q_norm, q), self._norm(self.k_norm, k), v

    def _norm(self, norm: nn.Module, heads: Tensor) -> Tensor:
        return norm(heads)


class TransposedNormsAttention(NormedHeadsAttention):
    """Gemma 3: q_norm and k_norm get (B, H, T, D); a fused norm gives the same for (B, T, H, D)."""

    def _norm(self, norm: nn.Module, heads: Tensor) -> Tensor:
        return norm(heads) if is_intact(norm) else norm(heads.transpose(1, 2)).transpose(1, 2)


class NormedAttention(RotaryAttention):
    """OLMo 2 and 3: q_norm and k_norm normalize all heads together."""

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        q, k, v = (getattr(self, name)(x) for name in self._peakgpt["project"])
        return tuple(t.unflatten(-1, (-1, self.head_dim)) for t in (self.q_norm(q), self.k_norm(k), v))


class FalconAttention(TransformersAttention):
    """Falcon, which computes attention itself: rotary positions or ALiBi, heads packed by groups."""

    def forward(
        self, hidden_states, alibi, attention_mask, position_ids=None, layer_past=None, use_cache=False,
        output_attentions=False, position_embeddings=None, **kwargs,
    ):  # fmt: skip
        heads = self.query_key_value(hidden_states).unflatten(-1, (self.num_kv_heads, -1, self.head_dim))
        q, k, v = heads[..., :-2, :].flatten(2, 3), heads[..., -2, :], heads[..., -1, :]  # (B, T, H or K, D)
        if alibi is None:
            q, k = rotate(position_embeddings, q, k)
        if layer_past is not None:
            k, v = (t.transpose(1, 2) for t in layer_past.update(k.transpose(1, 2), v.transpose(1, 2), self.layer_idx))
        bias = None
        if alibi is not None and not isinstance(attention_mask, Tensor):  # else transformers has added it to the mask
            bias = expand_bias(alibi.unflatten(0, (len(q), -1)) * self.inv_norm_factor, q, k)
        y, weights = masked_attention(
            q, k, v, Mask(True) if attention_mask is None else attention_mask, bias, weights=output_attentions,
            # As in transformers, which never drops weights without ALiBi.
            dropout=0.0 if alibi is None else self.attention_dropout,
        )  # fmt: skip
        return self.dense(y.flatten(2)), weights


def rotate(tables: Tables, *heads: Tensor, half_tables: bool = False) -> tuple[Tensor, ...]:
    """Rotate queries and keys, (B, T, H, D), by cos and sin, (1 or B, T, R): in eager torch if B rows differ.

    Args:
        half_tables: whether the tables have R / 2 columns; else both halves of their columns are equal.
    """
    if len(tables[0]) == 1:
        cos, sin = (t[0] if half_tables else t[0, :, : t.shape[2] // 2] for t in tables)
        return tuple(rotary(t, cos, sin, heads=t.shape[2]) for t in heads)
    cos, sin = (t[:, :, None] for t in tables)
    return tuple(_rotate_rows(t, cos, sin) for t in heads)


def _rotate_rows(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rotated, rest = x.split((cos.shape[-1], x.shape[-1] - cos.shape[-1]), -1)
    first, second = rotated.chunk(2, -1)
    return torch.cat((rotated * cos + torch.cat((-second, first), -1) * sin, rest), -1)
