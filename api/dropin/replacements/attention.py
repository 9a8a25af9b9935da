"""Replacements for attention modules that bypass transformers' AttentionInterface, and for nn.MultiheadAttention."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peakgpt.dropin.attention_function import (
    Mask,
    additive_mask,
    expand_bias,
    masked_attention,
)
from peakgpt.dropin.class_swap import Replacement
from peakgpt.dropin.intact import has_replaced_class, is_plain_tensor
from peakgpt.engine.model.positions import alibi_slopes
from peakgpt.kernels.ops.linear import linear


class TransformersAttention(Replacement):
    """Attention in a model of transformers; its config then selects our mask function."""


class WithWeights(NamedTuple):
    """A mask for `_attn` of GPT-J and GPT-Neo, which has no other argument to ask for the attention weights."""

    mask: Mask | Tensor | None


class GPTJAttention(TransformersAttention):
    """GPT-J, CodeGen and GPT-Neo. They compute attention in the method `_attn`."""

    def forward(self, *args, attention_mask=None, output_attentions=False, **kwargs):
        mask = WithWeights(attention_mask) if output_attentions else attention_mask
        return super().forward(*args, attention_mask=mask, output_attentions=output_attentions, **kwargs)

    def _attn(self, query, key, value, attention_mask=None):
        mask, weights = attention_mask, False
        if isinstance(mask, WithWeights):
            mask, weights = mask.mask, True
        local = getattr(self, "attention_type", None)  # GPT-Neo, which is causal without a mask too
        mask = Mask(causal=local is not None) if mask is None else mask
        if local is not None and isinstance(mask, Tensor):
            bias, mask = additive_mask(mask, query), Mask(causal=True)
        else:
            bias = None
        window = self.config.window_size if local == "local" else None
        scale = 1.0 / self.scale_attn if hasattr(self, "scale_attn") else 1.0
        q, k, v = (t.transpose(1, 2).to(value.dtype) for t in (query, key, value))
        y, p = masked_attention(
            q, k, v, mask, bias, scale=scale, dropout=self.attn_dropout, window=window, weights=weights
        )
        return y.transpose(1, 2), p


class OpenAIGPTAttention(TransformersAttention):
    """GPT-1, with its own causal mask and an additive padding mask."""

    def _attn(self, q, k, v, attention_mask=None, output_attentions=False):
        q, k, v = q.transpose(1, 2), k.permute(0, 3, 1, 2), v.transpose(1, 2)
        y, weights = masked_attention(
            q, k, v, Mask(causal=True), None if attention_mask is None else additive_mask(attention_mask, q),
            scale=None if self.scale else 1.0, dropout=self.attn_dropout, weights=output_attentions,
        )  # fmt: skip
        return [y.transpose(1, 2), weights] if output_attentions else [y.transpose(1, 2)]


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
        q, k, v = self.query_key_value(hidden_states).unflatten(-1, (self.num_heads, 3, self.head_dim)).unbind(3)
        if layer_past is not None:
            k, v = (t.transpose(1, 2) for t in layer_past.update(k.transpose(1, 2), v.transpose(1, 2), self.layer_idx))
        positions = {"alibi": self._peakgpt["slopes"].to(q.device)}
        if not isinstance(attention_mask, Mask) or attention_mask.keys is not None:
            # BLOOM counts positions over valid keys only.
            positions = {"bias": expand_bias(alibi.unflatten(0, (len(q), -1)), q, k)}
        y, weights = masked_attention(
            q, k, v, attention_mask, scale=self.inv_norm_factor, dropout=self.attention_dropout,
            weights=output_attentions, **positions,
        )  # fmt: skip
        y = F.dropout(self.dense(y.flatten(2)), self.hidden_dropout, self.training)
        return residual + y, weights


class MptAttention(TransformersAttention):
    """MPT, with ALiBi. More arguments: output_attentions, which the block passes on (blocks.MptBlock)."""

    @classmethod
    def objection(cls, module: nn.Module, options: dict[str, Any]) -> str | None:
        options["slopes"] = alibi_slopes(module.n_heads, "cpu")
        return None

    def forward(
        self, hidden_states, position_bias, past_key_values=None, attention_mask=None, output_attentions=False, **kwargs
    ):
        qkv = self.Wqkv(hidden_states)
        qkv = qkv.clamp(-self.clip_qkv, self.clip_qkv) if self.clip_qkv else qkv
        q, k, v = qkv.unflatten(-1, (3, self.n_heads, self.head_dim)).unbind(2)
        if past_key_values is not None:
            new = k.transpose(1, 2), v.transpose(1, 2)
            k, v = (t.transpose(1, 2) for t in past_key_values.update(*new, self.layer_idx))
        y, weights = masked_attention(
            q, k, v, Mask(True) if attention_mask is None else attention_mask, scale=self.softmax_scale,
            dropout=self.attn_dropout_p if self.training else 0.0, weights=output_attentions,
            alibi=None if position_bias is None else self._peakgpt["slopes"].to(q.device),
        )  # fmt: skip
        return self.out_proj(y.flatten(2)), weights


class MultiheadAttention(Replacement):
    """nn.MultiheadAttention. As in torch, it reads the weight of `out_proj` and does not call that module."""

    @classmethod
    def objection(cls, module: nn.Module, options: dict[str, Any]) -> str | None:
        if module.in_proj_weight is None:
            return "keys or values have a different width than queries"
        extra_key = module.bias_k is not None or module.add_zero_attn
        return "adds an extra key (add_bias_kv, add_zero_attn)" if extra_key else None

    def _peakgpt_sample(self) -> tuple[Tensor, ...]:
        x = self.in_proj_weight.detach()[:5].unsqueeze(1 - self.batch_first)
        return x, x, x, None, False

    def forward(
        self, query, key, value, key_padding_mask=None, need_weights=True, attn_mask=None, average_attn_weights=True,
        is_causal=False,
    ):  # fmt: skip
        options = {"need_weights": need_weights, "average_attn_weights": average_attn_weights, "is_causal": is_causal}
        if query.dim() == key.dim() == value.dim() == 2:  # no batch
            batch = 1 - self.batch_first
            padding = None if key_padding_mask is None else key_padding_mask[None]
            y, weights = self.forward(
                *(t.unsqueeze(batch) for t in (query, key, value)), padding, attn_mask=attn_mask, **options
            )
            return y.squeeze(batch), None if weights is None else weights.squeeze(0)
        if not self._peakgpt_supports(query, key, value, key_padding_mask, attn_mask, is_causal):
            return super().forward(query, key, value, key_padding_mask, attn_mask=attn_mask, **options)
        w, b = self.in_proj_weight.chunk(3), [None] * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        if query is key is value:
            heads = linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        else:
            heads = [linear(*layer) for layer in zip((query, key, value), w, b, strict=True)]
        if not self.batch_first:
            heads = [t.transpose(0, 1) for t in heads]
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)) for t in heads)
        bias = self._additive_masks(q, attn_mask, key_padding_mask)
        dropout = self.dropout if self.training else 0.0
        y, weights = masked_attention(q, k, v, Mask(False), bias, dropout=dropout, weights=need_weights)
        y = y.flatten(2) if self.batch_first else y.flatten(2).transpose(0, 1)
        weights = weights.mean(1) if weights is not None and average_attn_weights else weights
        return linear(y, self.out_proj.weight, self.out_proj.bias), weights

    def _peakgpt_supports(self, query, key, value, padding, mask, is_causal) -> bool:
        """Return whether forward supports these inputs. The forward of torch says what is wrong with the others."""
        if not (has_replaced_class(self) and has_replaced_class(self.out_proj)):
            return False
        if not query.dim() == key.dim() == value.dim() == 3 or query.is_nested or key.is_nested or value.is_nested:
            return False
        batch, row = (0, 1) if self.batch_first else (1, 0)
        queries, keys = query.shape[row], key.shape[row]
        return (
            all(m is None or m.dtype == torch.bool or m.is_floating_point() for m in (mask, padding))
            and (mask is None or mask.shape[-2:] == (queries, keys))
            and (padding is None or padding.shape == (key.shape[batch], keys))
            and not (is_causal and mask is None)
            and is_plain_tensor(self.in_proj_weight) and is_plain_tensor(self.out_proj.weight)
        )  # fmt: skip

    def _additive_masks(self, q: Tensor, mask: Tensor | None, padding: Tensor | None) -> Tensor | None:
        """Combine both masks into one additive mask, (B or 1, H or 1, T or 1, S). In torch True means masked."""
        masks = []
        if mask is not None:
            mask = mask[None, None] if mask.dim() == 2 else mask.unflatten(0, (-1, self.num_heads))
            masks.append(mask)
        if padding is not None:
            masks.append(padding[:, None, None])
        masks = [additive_mask(~m if m.dtype == torch.bool else m, q) for m in masks]
        return sum(masks).to(q.dtype) if masks else None
