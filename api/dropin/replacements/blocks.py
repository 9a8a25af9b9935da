"""Replacements for whole transformer blocks: they save the calls between modules in a decode step."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peakgpt.dropin.attention_function import attention_forward, is_known_mask
from peakgpt.dropin.class_swap import Replacement, linear_layout, linear_weight
from peakgpt.dropin.replacements.layers import BaseMLP, add_norm, is_intact_norm, sum_and_norm
from peakgpt.engine.model.plain import has_own_call
from peakgpt.kernels.ops.linear import linear
from peakgpt.kernels.ops.norm import layernorm


class GPT2Block(Replacement):
    """The block of GPT-2, with residual and second norm fused. Runs the original forward if a submodule was changed."""

    @classmethod
    def objection(cls, module: nn.Module, options: dict[str, Any]) -> str | None:
        options["attn"] = type(module.attn)
        return None

    def forward(self, hidden_states, past_key_values=None, attention_mask=None, encoder_hidden_states=None, **kwargs):
        if encoder_hidden_states is not None or not (is_known_mask(attention_mask) and self._peakgpt_intact()):
            return super().forward(hidden_states, past_key_values, attention_mask, encoder_hidden_states, **kwargs)
        parts = self._modules
        attn, mlp, first, second = parts["attn"], parts["mlp"], parts["ln_1"], parts["ln_2"]
        qkv_proj, out_proj = attn._modules["c_attn"], attn._modules["c_proj"]
        kwargs.pop("encoder_attention_mask", None)
        x, shape = hidden_states, (*hidden_states.shape[:-1], 3, attn.num_heads, attn.head_dim)
        h = layernorm(x, first.weight, first.bias, eps=first.eps)
        q, k, v = linear(h, linear_weight(qkv_proj), qkv_proj.bias).view(shape).permute(2, 0, 3, 1, 4).unbind(0)
        if past_key_values is not None:
            cache = getattr(past_key_values, "self_attention_cache", past_key_values)
            k, v = cache.update(k, v, attn.layer_idx)
        dropout = attn.attn_dropout.p if attn.training else 0.0
        y, _ = attention_forward(attn, q, k, v, attention_mask, dropout, attn.scaling, **kwargs)
        y = attn.resid_dropout(linear(y.flatten(2), linear_weight(out_proj), out_proj.bias))
        x, h = sum_and_norm(second, y, x)
        return x + mlp(h)

    def _peakgpt_intact(self) -> bool:
        """Return whether nothing has changed the attention, its projections and the norms."""
        parts = self._modules
        attn = parts["attn"]
        return (
            type(attn) is self._peakgpt["attn"] and not has_own_call(attn)
            and is_intact_norm(parts["ln_1"]) and is_intact_norm(parts["ln_2"])
            and bool(linear_layout(attn._modules["c_attn"]) and linear_layout(attn._modules["c_proj"]))
        )  # fmt: skip


class MptBlock(Replacement):
    """The block of MPT, which passes output_attentions on."""

    def forward(
        self, hidden_states, position_bias, attention_mask, layer_past=None, use_cache=False, output_attentions=False,
        **kwargs,
    ):  # fmt: skip
        y, weights = self.attn(
            self.norm_1(hidden_states), position_bias=position_bias, attention_mask=attention_mask,
            past_key_values=layer_past, output_attentions=output_attentions,
        )  # fmt: skip
        x, h = sum_and_norm(self.norm_2, self.resid_attn_dropout(y), hidden_states)
        return self.ffn(h, x), weights


class InlineMLPBlock(BaseMLP):
    """A block that holds the two layers of its MLP directly and its dropout rates as numbers."""

    def _dropout(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)

    def _feed_forward(self, x: Tensor) -> Tensor:
        y = self._fused(x)
        if y is None:
            y = self.activation_fn(self.fc1(x))
            y = self.fc2(F.dropout(y, getattr(self, "activation_dropout", 0.0), self.training))
        return self._dropout(y)


class OPTLayer(InlineMLPBlock):
    """The decoder layer of OPT, with pre-norm or post-norm (350m)."""

    def forward(self, hidden_states, attention_mask=None, past_key_values=None, use_cache=False, position_ids=None,
                **kwargs):  # fmt: skip
        first, second, x = self.self_attn_layer_norm, self.final_layer_norm, hidden_states
        y, _ = self.self_attn(
            hidden_states=first(x) if self.do_layer_norm_before else x, past_key_values=past_key_values,
            position_ids=position_ids, attention_mask=attention_mask, **kwargs,
        )  # fmt: skip
        if self.do_layer_norm_before:
            x, h = sum_and_norm(second, self._dropout(y), x)
            return x + self._feed_forward(h)
        x = add_norm(first, self._dropout(y), x)
        return add_norm(second, self._feed_forward(x), x)


class BartLayer(InlineMLPBlock):
    """The encoder and decoder layers of BART."""

    def forward(
        self, hidden_states, attention_mask=None, encoder_hidden_states=None, encoder_attention_mask=None,
        past_key_values=None, use_cache=True, **kwargs,
    ):  # fmt: skip
        x = hidden_states
        # The original forward of the encoder checks for overflow.
        if x.dtype == torch.float16 and encoder_hidden_states is None:
            return super().forward(x, attention_mask, **kwargs)
        y, _ = self.self_attn(x, past_key_values=past_key_values, attention_mask=attention_mask, **kwargs)
        x = add_norm(self.self_attn_layer_norm, self._dropout(y), x)
        if encoder_hidden_states is not None:
            y, _ = self.encoder_attn(
                x, key_value_states=encoder_hidden_states, attention_mask=encoder_attention_mask,
                past_key_values=past_key_values, **kwargs,
            )  # fmt: skip
            x = add_norm(self.encoder_attn_layer_norm, self._dropout(y), x)
        return add_norm(self.final_layer_norm, self._feed_forward(x), x)
