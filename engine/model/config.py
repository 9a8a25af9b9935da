"""GPTConfig: the sizes of a GPT and the variants of its layers, under the names of nanoGPT and transformers' GPT-2."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from peakgpt.kernels.ops.mlp import ACTIVATIONS, GATES

SIZES = ("n_layer", "n_head", "n_kv_head", "n_embd", "head_dim", "block_size", "vocab_size", "n_inner", "word_dim")
OPTIONAL_SIZES = ("n_kv_head", "head_dim", "n_inner", "word_dim")  # None means a size derived from the others
FLAGS = ("embedding_norm", "rotary_interleaved", "scale_by_layer", "gated_mlp", "tied_head", "head_bias")
POSITIVE = ("layer_norm_epsilon", "rotary_base", "logit_scale")
PENALTIES = ("z_loss", "balance_loss")
RATES = ("dropout", "embedding_dropout", "attention_dropout")
CHOICES = {
    "norm": ("layer", "rms"),
    "position": ("learned", "rotary", "alibi", "transformer_xl", "relative_bias"),
    "residual": ("pre_norm", "post_norm", "parallel", "parallel_two_norms"),
}
BIASED = ("qkv", "out", "mlp", "norm")  # parts that can have a bias; "norm" includes the norms outside of the blocks


@dataclass(kw_only=True, frozen=True)
class GPTConfig:
    """Sizes and variants of one GPT. The defaults are GPT-2's smallest model.

    Args:
        n_layer, n_head, n_embd: L blocks, H query heads, model width C.
        n_kv_head: K key and value heads, a divisor of n_head; None means n_head.
        head_dim: width D of a head; None means n_embd / n_head.
        n_inner: width F of the MLP; None means 4 n_embd.
        block_size: maximum sequence length, in tokens.
        vocab_size: V.
        word_dim: width of the token embedding. If it differs from n_embd, linear layers project to n_embd and back.
            None means n_embd.
        norm: "layer" (LayerNorm) or "rms" (RMSNorm, without bias).
        embedding_norm: normalize the token embedding before the first block.
        position: "learned": a table of embeddings. "rotary": rotated queries and keys. "alibi": slopes on the scores.
            "transformer_xl": relative keys, with parameters in each layer. "relative_bias": T5's bias on the scores by
            distance, with parameters in each layer.
        position_offset: row of the learned table for the first token.
        rotary_dim: number of rotated features of a head, even; None means head_dim.
        rotary_interleaved: rotate features 2 i and 2 i + 1 as a pair (GPT-J) instead of i and i + rotary_dim / 2.
        rotary_base: pair i of n rotates by base^(-i/n) radians a token.
        windows: for each layer the number of keys that a query attends to, including its own; None means all. A shorter
            tuple is repeated to n_layer entries.
        attention_scale: factor on q k^T; None means 1 / sqrt(head_dim).
        scale_by_layer: divide that factor by i + 1 in layer i.
        residual: how the branches of a block are connected:
            "pre_norm": x += attn(norm(x)), x += mlp(norm(x)); a norm before the head.
            "post_norm": x = norm(x + attn(x)), x = norm(x + mlp(x)); no norm before the head.
            "parallel": x += attn(norm(x)) + mlp(norm(x)) with one norm; "parallel_two_norms": with two.
        activation: "gelu_tanh", "gelu_erf" or "relu"; with gated_mlp also "silu".
        gated_mlp: the activation is applied to a third projection of the MLP, the gate.
        experts: number E of experts in every `experts_every`-th layer, which replace its MLP and are not gated; 0 for
            none.
        experts_per_token: number of experts that compute each token.
        balance_loss: factor on the experts' balance loss, which is added to the loss in training.
        layer_norm_epsilon: added to the variance (LayerNorm) or the mean square (RMSNorm).
        bias: True, False, or the parts that have a bias: "qkv", "out", "mlp", "norm".
        tied_head: the head shares its weight with the token embedding.
        head_bias: an untied head has a bias.
        logit_scale: factor on the logits.
        label_smoothing: share of a target's probability that is spread over the vocabulary, in training.
        z_loss: factor on logsumexp(logits)^2, which is added to the loss in training.
        dropout: probability after each branch, in training.
        embedding_dropout, attention_dropout: probability after the embedding, and of an attention weight; None means
            dropout.
    Raises:
        ValueError: a value out of range, or values that do not fit each other.
    """

    n_layer: int = 12
    n_head: int = 12
    n_kv_head: int | None = None
    n_embd: int = 768
    head_dim: int | None = None
    n_inner: int | None = None
    block_size: int = 1024
    vocab_size: int = 50257
    word_dim: int | None = None
    norm: str = "layer"
    embedding_norm: bool = False
    position: str = "learned"
    position_offset: int = 0
    rotary_dim: int | None = None
    rotary_interleaved: bool = False
    rotary_base: float = 10000.0
    windows: tuple[int | None, ...] = (None,)
    attention_scale: float | None = None
    scale_by_layer: bool = False
    residual: str = "pre_norm"
    activation: str = "gelu_tanh"
    gated_mlp: bool = False
    experts: int = 0
    experts_every: int = 2
    experts_per_token: int = 2
    balance_loss: float = 0.01
    layer_norm_epsilon: float = 1e-5
    bias: bool | tuple[str, ...] = True
    tied_head: bool = True
    head_bias: bool = False
    logit_scale: float = 1.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    dropout: float = 0.0
    embedding_dropout: float | None = None
    attention_dropout: float | None = None

    def __post_init__(self):
        self._check_sizes()
        for name, allowed in CHOICES.items():
            self._require(name, getattr(self, name) in list(allowed), f"one of {', '.join(allowed)}")
        for name in FLAGS:
            self._require(name, isinstance(getattr(self, name), bool), "True or False")
        for name in POSITIVE:
            self._require(name, _is_number(getattr(self, name)) and getattr(self, name) > 0, "more than 0, and finite")
        for name in PENALTIES:
            self._require(name, _is_number(getattr(self, name)) and getattr(self, name) >= 0, "at least 0, and finite")
        is_share = _is_number(self.label_smoothing) and 0 <= self.label_smoothing < 1
        self._require("label_smoothing", is_share, "0 <= label_smoothing < 1")
        scale = self.attention_scale
        self._require("attention_scale", scale is None or _is_number(scale), "None or a finite number")
        self._require("head_bias", not (self.head_bias and self.tied_head), "False with tied_head")
        self._check_mlp()
        self._check_position()
        self._check_bias()
        self._check_windows()
        for name in RATES:
            if getattr(self, name) is None:
                self._set(**{name: self.dropout})
            is_rate = _is_number(getattr(self, name)) and 0 <= getattr(self, name) < 1
            self._require(name, is_rate, f"0 <= {name} < 1")

    def _check_sizes(self) -> None:
        for name in SIZES:
            value = getattr(self, name)
            is_derived = value is None and name in OPTIONAL_SIZES
            self._require(name, is_derived or _is_count(value), "a positive integer")
        self._require(
            "n_embd", self.head_dim is not None or self.n_embd % self.n_head == 0, f"a multiple of n_head {self.n_head}"
        )
        self._set(
            n_kv_head=self.n_kv_head or self.n_head,
            head_dim=self.head_dim or self.n_embd // self.n_head,
            n_inner=self.n_inner or 4 * self.n_embd,
            word_dim=self.word_dim or self.n_embd,
        )
        self._require("n_kv_head", self.n_head % self.n_kv_head == 0, f"a divisor of n_head {self.n_head}")

    def _check_mlp(self) -> None:
        allowed = GATES if self.gated_mlp and not self.experts else ACTIVATIONS
        self._require("activation", self.activation in allowed, f"one of {', '.join(allowed)}")
        if self.experts == 0 and not isinstance(self.experts, bool):
            return
        for name in ("experts", "experts_every", "experts_per_token"):
            self._require(name, _is_count(getattr(self, name)), "a positive integer")
        self._require("experts_per_token", self.experts_per_token <= self.experts, f"at most experts {self.experts}")
        self._require("experts_every", self.experts_every <= self.n_layer, f"at most n_layer {self.n_layer}")

    def _check_position(self) -> None:
        if self.position == "rotary":
            if self.rotary_dim is None:
                self._set(rotary_dim=self.head_dim)
            is_even = _is_count(self.rotary_dim) and self.rotary_dim % 2 == 0
            is_valid = is_even and self.rotary_dim <= self.head_dim
            self._require("rotary_dim", is_valid, f"an even number up to head_dim {self.head_dim}")
        else:
            self._require("rotary_dim", self.rotary_dim is None, f"None as position is {self.position}")
        offset = self.position_offset
        is_valid = offset == 0 or (_is_count(offset) and self.position == "learned")
        self._require("position_offset", is_valid, "0, or more with learned positions")

    def _check_bias(self) -> None:
        if not isinstance(self.bias, bool):
            is_known = isinstance(self.bias, tuple | list) and set(self.bias) <= set(BIASED)
            self._require("bias", is_known, f"True or False, or some of {', '.join(BIASED)}")
            parts = tuple(part for part in BIASED if part in self.bias)
            self._set(bias={BIASED: True, (): False}.get(parts, parts))
        self._require("bias", self.norm != "rms" or not self.has_bias("norm"), "no bias of norms, as norm is rms")

    def _check_windows(self) -> None:
        windows = self.windows
        is_sequence = isinstance(windows, tuple | list) and len(windows) > 0
        is_valid = is_sequence and all(window is None or _is_count(window) for window in windows)
        self._require("windows", is_valid, "positive integers or None, at least one")
        self._set(windows=tuple(windows[layer % len(windows)] for layer in range(self.n_layer)))

    def _require(self, name: str, condition: bool, expected: str) -> None:
        if not condition:
            raise ValueError(f"GPTConfig: {name} is {getattr(self, name)!r}, expected {expected}")

    def _set(self, **values: Any) -> None:
        """Set fields of the frozen dataclass: replace None and short forms by full values."""
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name: transformers' name, which PEFT calls."""
        return asdict(self)

    def get_text_config(self) -> GPTConfig:
        """Return this config: transformers' name for the config of the language model, which PEFT asks for."""
        return self

    def has_bias(self, part: str) -> bool:
        """Return whether a part, one of BIASED, has a bias."""
        return self.bias is True or (self.bias is not False and part in self.bias)

    def has_experts(self, layer: int) -> bool:
        """Return whether a layer, 0 .. L - 1, has experts: the last one of every `experts_every` layers does."""
        return bool(self.experts) and (layer + 1) % self.experts_every == 0

    def scale(self, layer: int) -> float | None:
        """Return the factor on q k^T of a layer; None means 1 / sqrt(head_dim)."""
        if not self.scale_by_layer:
            return self.attention_scale
        scale = self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale
        return scale / (layer + 1)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
