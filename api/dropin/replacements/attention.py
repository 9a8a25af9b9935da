"""Replacements for attention modules that bypass transformers' AttentionInterface, and for nn.MultiheadAttention."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peakgpt.dropin.attention_function import Mask, additive_mask, attention_forward, expand_bias, masked_attention
from peakgpt.dropin.class_swap import Replacement, linear_layout, linear_weight
from peakgpt.engine.model.positions import alibi_slopes
from peakgpt.kernels.ops.attention import attention
from peakgpt.kernels.ops.linear import linear
from peakgpt.kernels.ops.rotary import rotary


class TransformersAttention(Replacement):
    """Attention in a model of transformers; its config then selects our mask function."""


class RotaryAttention(TransformersAttention):
    """Llama, GPT-NeoX and others with rotary positions.

    Options: project: names of the q, k, v projections, or of one packed projection; out: name of the output projection;
    cache: keyword argument with the KV cache.
    """

    def forward(self, hidden_states, *args, position_embeddings=None, attention_mask=None, **kwargs):
        # More than one row of position_embeddings: each sequence has its own positions.
        if args or position_embeddings is None or len(position_embeddings[0]) != 1:
            kwargs |= {"position_embeddings": position_embeddings, "attention_mask": attention_mask}
            return super().forward(hidden_states, *args, **kwargs)
        names = self._peakgpt
        q, k, v = self._project(hidden_states)
        tables = [t[0, :, : t.shape[2] // 2] for t in position_embeddings]  # both halves are equal in transformers
        q, k = (rotary(t, *tables, heads=t.shape[2]) for t in (q, k))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        cache = kwargs.pop(names["cache"], None)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        dropout = self.attention_dropout if self.training else 0.0
        y, _ = attention_forward(self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        return getattr(self, names["out"])(y.flatten(2)), None

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return queries, keys and values, (B, T, H or K, D)."""
        layers = [getattr(self, name) for name in self._peakgpt["project"]]
        if len(layers) == 1:
            return layers[0](x).unflatten(-1, (-1, 3 * self.head_size)).chunk(3, -1)
        return tuple(layer(x).unflatten(-1, (-1, self.head_dim)) for layer in layers)


class GPTJAttention(TransformersAttention):
    """GPT-J and GPT-Neo, which compute attention in a method `_attn`."""

    def forward(self, *args, output_attentions=False, **kwargs):
        _reject_output_attentions(output_attentions)
        return super().forward(*args, **kwargs)

    def _attn(self, query, key, value, attention_mask=None):
        if not isinstance(attention_mask, Mask):
            mask = None if attention_mask is None else additive_mask(attention_mask, query)
            return super()._attn(query, key, value, mask)
        window = self.config.window_size if getattr(self, "attention_type", "") == "local" else None
        scale = 1.0 / self.scale_attn if hasattr(self, "scale_attn") else 1.0
        q, k, v = (t.transpose(1, 2) for t in (query, key, value))
        dropout = self.attn_dropout.p if self.training else 0.0
        q, k = q.to(v.dtype), k.to(v.dtype)
        y = masked_attention(q, k, v, attention_mask, scale=scale, dropout=dropout, window=window)
        return y.transpose(1, 2), None


class OpenAIGPTAttention(TransformersAttention):
    """GPT-1, with its own causal mask and an additive padding mask."""

    def _attn(self, q, k, v, attention_mask=None, output_attentions=False):
        if output_attentions:
            return super()._attn(q, k, v, attention_mask, output_attentions)
        q, k, v = q.transpose(1, 2), k.permute(0, 3, 1, 2), v.transpose(1, 2)
        y = attention(
            q, k, v, scale=None if self.scale else 1.0, bias=expand_bias(attention_mask, q, k),
            dropout=self.attn_dropout.p if self.training else 0.0,
        )  # fmt: skip
        return [y.transpose(1, 2)]


class BloomAttention(TransformersAttention):
    """BLOOM, with ALiBi and the residual inside the module."""

    @classmethod
    def objection(cls, module: nn.Module, options: dict[str, Any]) -> str | None:
        if module.pretraining_tp > 1 and module.slow_but_exact:
            return "sums partial products in slices (pretraining_tp, slow_but_exact)"
        options["slopes"] = alibi_slopes(module.num_heads, "cpu")
        return None

    def forward(
        self, hidden_states, residual, alibi, attention_mask, layer_past=None, use_cache=False, output_attentions=False,
        **kwargs,
    ):  # fmt: skip
        _reject_output_attentions(output_attentions)
        q, k, v = self.query_key_value(hidden_states).unflatten(-1, (self.num_heads, 3, self.head_dim)).unbind(3)
        if layer_past is not None:
            k, v = (t.transpose(1, 2) for t in layer_past.update(k.transpose(1, 2), v.transpose(1, 2), self.layer_idx))
        positions = {"alibi": self._peakgpt["slopes"].to(q.device)}
        if not isinstance(attention_mask, Mask) or attention_mask.keys is not None:
            # BLOOM counts positions over valid keys only.
            positions = {"bias": expand_bias(alibi.unflatten(0, (len(q), -1)), q, k)}
        dropout = self.attention_dropout.p if self.training else 0.0
        y = masked_attention(q, k, v, attention_mask, scale=self.inv_norm_factor, dropout=dropout, **positions)
        y = F.dropout(self.dense(y.flatten(2)), self.hidden_dropout, self.training)
        return residual + y, None


def _reject_output_attentions(output_attentions: Any) -> None:
    if output_attentions:
        raise ValueError("attention: got output_attentions=True, expected False: a patched model keeps no weights")


class MultiheadAttention(Replacement):
    """nn.MultiheadAttention with need_weights=False, as nn.TransformerEncoderLayer calls it."""

    @classmethod
    def objection(cls, module: nn.Module, options: dict[str, Any]) -> str | None:
        if module.in_proj_weight is None:
            return "keys or values have a different width than queries"
        own = module.bias_k is not None or module.add_zero_attn
        return "adds an extra key (add_bias_kv, add_zero_attn)" if own else None

    def _peakgpt_sample(self) -> tuple[Tensor, ...]:
        x = self.in_proj_weight.detach()[:5].unsqueeze(1 - self.batch_first)
        return x, x, x, None, False

    def forward(
        self, query, key, value, key_padding_mask=None, need_weights=True, attn_mask=None, average_attn_weights=True,
        is_causal=False,
    ):  # fmt: skip
        if need_weights or query.dim() != 3 or linear_layout(self.out_proj) is None:
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        w, b = self.in_proj_weight.chunk(3), [None] * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        if query is key is value:
            heads = linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        else:
            heads = [linear(*layer) for layer in zip((query, key, value), w, b, strict=True)]
        if not self.batch_first:
            heads = [t.transpose(0, 1) for t in heads]
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)) for t in heads)
        bias = self._additive_masks(q, attn_mask, key_padding_mask)
        y = attention(
            q, k, v, causal=False, bias=expand_bias(bias, q, k), dropout=self.dropout if self.training else 0.0
        ).flatten(2)  # fmt: skip
        y = y if self.batch_first else y.transpose(0, 1)
        return linear(y, linear_weight(self.out_proj), self.out_proj.bias), None

    def _additive_masks(self, q: Tensor, mask: Tensor | None, padding: Tensor | None) -> Tensor | None:
        """Combine both masks into one additive mask, (B or 1, H or 1, T or 1, S). In torch True means masked."""
        masks = []
        if mask is not None:
            mask = mask[None, None] if mask.dim() == 2 else mask.unflatten(0, (-1, self.num_heads))
            masks.append(mask)
        if padding is not None:
            masks.append(padding[:, None, None])
        masks = [m if m.dtype.is_floating_point else additive_mask(~m, q) for m in masks]
        total = sum(masks) if masks else None
        # The sum of two masks may overflow, and masks of torch hold -inf: a fully masked row would be NaN.
        return None if total is None else total.to(q.dtype).clamp(min=torch.finfo(q.dtype).min)
