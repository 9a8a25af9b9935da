"""GPTConfig: the sizes of a GPT and the variants of its layers, under the names of nanoGPT and transformers' GPT-2."""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass
from typing import Any

from peakgpt.engine.model.rope_scaling import complete, switch_length
from peakgpt.engine.settings.setting import check_settings, setting
from peakgpt.kernels.ops.mlp import ACTIVATIONS, GATES

PENALTIES = ("label_smoothing", "z_loss", "balance_loss")
RATES = ("dropout", "embedding_dropout", "attention_dropout")
TRAINING_ONLY = (*RATES, *PENALTIES)  # fields that change neither weights nor what the model computes in inference
BIASED = ("qkv", "out", "mlp", "norm")  # parts that can have a bias; "norm" includes the norms outside of the blocks

_field = functools.partial(setting, section="model")
_size = functools.partial(_field, at_least=1, metavar="N")
_rate = functools.partial(_field, at_least=0, below=1, metavar="RATE")
_factor = functools.partial(_field, at_least=0, metavar="FACTOR")
WITH_ROTARY = {"position": ("rotary",)}
WITH_EXPERTS = {"experts": None}
MAX_EXPERTS = 1 << 13  # a damaged file could ask for more than the names of its tensors fit into memory


@dataclass(kw_only=True, frozen=True)
class GPTConfig:
    """Sizes and variants of one GPT. The defaults are GPT-2's smallest model.

    The declarations say what each field means. How the branches of a block are connected (`residual`):
        "pre_norm": x += attn(norm(x)), x += mlp(norm(x)); a norm before the head.
        "post_norm": x = norm(x + attn(x)), x = norm(x + mlp(x)); no norm before the head.
        "parallel": x += attn(norm(x)) + mlp(norm(x)) with one norm; "parallel_two_norms": with two.
        "sandwich_norm": x += norm(attn(norm(x))), x += norm(mlp(norm(x))); a norm before the head.
        "output_norm": x += norm(attn(x)), x += norm(mlp(x)); a norm before the head.

    Raises:
        ValueError: a value out of range, or values that do not fit each other.
    """

    n_layer: int = _size(12, "number L of blocks")
    n_head: int = _size(12, "number H of query heads")
    n_kv_head: int | None = _size(None, "number K of key and value heads, a divisor of n_head; none: n_head")
    n_embd: int = _size(768, "model width C")
    head_dim: int | None = _size(None, "width D of a head; none: n_embd / n_head")
    n_inner: int | None = _size(None, "width F of the MLP; none: 4 n_embd")
    block_size: int = _size(1024, "maximum sequence length, in tokens")
    vocab_size: int = _size(50257, "vocabulary size V, at least the tokenizer's", automatic="the tokenizer's")
    word_dim: int | None = _size(
        None, "width of the token embedding, which linear layers project to n_embd and back; none: n_embd"
    )
    norm: str = _field("layer", "layer (LayerNorm) or rms (RMSNorm, without bias)", choices=("layer", "rms"))
    norm_offset: float = _field(
        0.0, "constant that rms norms add to their weights, which start at 1 - norm_offset", metavar="OFFSET",
        only_with={"norm": ("rms",)},
    )
    norm_weight: bool = _field(
        True, "norms have a weight; false: LayerNorm without parameters", only_with={"norm": ("layer",)}
    )
    embedding_norm: bool = _field(False, "normalize the token embedding before the first block")
    embedding_scale: float = _field(
        1.0, "factor on the token embedding, rounded to its dtype; not with learned positions", above=0,
        metavar="FACTOR",
    )  # fmt: skip
    position: str = _field(
        "learned", "learned: a table of embeddings; rotary: rotated queries and keys; alibi: slopes on the scores; "
        "transformer_xl: relative keys with parameters in each layer; relative_bias: T5's bias on the scores by "
        "distance, with parameters in each layer",
        choices=("learned", "rotary", "alibi", "transformer_xl", "relative_bias"), metavar="KIND",
    )  # fmt: skip
    position_offset: int = _field(
        0, "row of the learned table for the first token", at_least=0, only_with={"position": ("learned",)}
    )
    rotary_dim: int | None = _field(
        None, "number of rotated features of a head, even; none: head_dim", at_least=2, metavar="N",
        only_with=WITH_ROTARY,
    )  # fmt: skip
    rotary_interleaved: bool = _field(
        False, "rotate features 2 i and 2 i + 1 as a pair (GPT-J) instead of i and i + rotary_dim / 2",
        only_with=WITH_ROTARY,
    )  # fmt: skip
    rotary_base: float = _field(
        10000.0, "pair i of n rotates by base^(-i/n) radians a token", above=0, at_most=1e12, only_with=WITH_ROTARY
    )
    rope_scaling: dict[str, Any] | None = _field(  # noqa: RUF009
        None, "how the frequencies are scaled for long texts: rope_type (linear, dynamic, llama3, yarn, longrope) and "
        "its parameters, under transformers' names; none: not at all", metavar="JSON", only_with=WITH_ROTARY,
    )  # fmt: skip
    local_rotary_base: float | None = _field(
        None, "base of the layers with a window, whose frequencies are not scaled; none: as the others", above=0,
        at_most=1e12, metavar="BASE", only_with=WITH_ROTARY,
    )  # fmt: skip
    rotary_layers: tuple[bool, ...] = _field(
        (True,), "for each layer whether it rotates; false: it has no positions; a shorter list is repeated to n_layer "
        "entries", only_with=WITH_ROTARY,
    )  # fmt: skip
    alibi_scale: float = _field(
        1.0, "factor on the slopes of ALiBi", above=0, metavar="FACTOR", only_with={"position": ("alibi",)}
    )
    windows: tuple[int | None, ...] = _size(
        (None,), "for each layer the number of keys that a query attends to, including its own; none: all; a shorter "
        "list is repeated to n_layer entries",
    )  # fmt: skip
    qkv_clip: float | None = _field(
        None, "limit of the queries, keys and values after their projection, -limit to limit; none: no limit", above=0,
        metavar="LIMIT",
    )  # fmt: skip
    attention_scale: float | None = _field(None, "factor on q k^T; none: 1 / sqrt(head_dim)", metavar="FACTOR")
    scale_by_layer: bool = _field(False, "divide that factor by i + 1 in layer i")
    attention_softcap: float | None = _field(
        None, "limit of the scaled scores of attention, softcap * tanh(score / softcap); none: no limit", above=0
    )
    attention_sinks: bool = _field(
        False, "each head has a learned logit that takes part in its softmax and has no value"
    )
    qk_norm: str = _field(
        "none", "rms norm of queries and keys before their rotation: none; head: of each head, with one weight for all "
        "query heads and one for all key heads; full: of all query heads together and of all key heads together",
        choices=("none", "head", "full"), metavar="KIND",
    )  # fmt: skip
    residual: str = _field(
        "pre_norm", "how the branches of a block are connected: pre_norm, post_norm, parallel with one or two norms, "
        "sandwich_norm (norms before and after each branch), or output_norm (after each branch, before it is added)",
        choices=("pre_norm", "post_norm", "parallel", "parallel_two_norms", "sandwich_norm", "output_norm"),
        metavar="KIND",
    )  # fmt: skip
    activation: str = _field("gelu_tanh", "gelu_tanh, gelu_erf or relu; with gated_mlp also silu or clamped_swiglu")
    gated_mlp: bool = _field(False, "the activation is applied to a third projection of the MLP, the gate")
    experts: int = _field(
        0, "number E of experts in every experts_every-th layer, which replace its MLP", at_least=0, at_most=MAX_EXPERTS
    )
    experts_every: int = _size(2, "distance between layers with experts", only_with=WITH_EXPERTS)
    mlp_only_layers: tuple[int, ...] = _field(
        (), "layers, counted from 0, that have an MLP where experts_every would give them experts", at_least=0,
        metavar="LAYER", only_with=WITH_EXPERTS,
    )  # fmt: skip
    experts_per_token: int = _size(2, "number of experts that compute each token", only_with=WITH_EXPERTS)
    expert_inner: int | None = _size(None, "width F of an expert; none: n_inner", only_with=WITH_EXPERTS)
    gated_experts: bool = _field(False, "as gated_mlp, for the experts", only_with=WITH_EXPERTS)
    normalize_experts: bool = _field(
        True, "divide the weights of a token's experts by their sum (norm_topk_prob)", only_with=WITH_EXPERTS
    )
    router_bias: bool = _field(False, "the router has a bias", only_with=WITH_EXPERTS)
    balance_loss: float = _factor(
        0.01, "factor on the experts' balance loss, which is added to the loss in training", only_with=WITH_EXPERTS
    )
    balance_over: str = _field(
        "layer", "layer: the first choices of each layer are balanced; model: all choices of all layers together, as "
        "transformers' Mixtral does", choices=("layer", "model"), only_with=WITH_EXPERTS,
    )  # fmt: skip
    layer_norm_epsilon: float = _field(1e-5, "added to the variance (LayerNorm) or the mean square (RMSNorm)", above=0)
    bias: bool | tuple[str, ...] = _field(True, "true, false, or the parts that have a bias: qkv, out, mlp, norm")
    tied_head: bool = _field(True, "the head shares its weight with the token embedding")
    head_bias: bool = _field(False, "an untied head has a bias")
    logit_scale: float = _field(1.0, "factor on the logits", above=0, metavar="FACTOR")
    logit_softcap: float | None = _field(
        None, "limit of the scaled logits: limit * tanh(logits / limit); none: no limit", above=0, metavar="LIMIT"
    )
    label_smoothing: float = _rate(
        0.0, "share of a target's probability that is spread over the vocabulary, in training", metavar="SHARE"
    )
    z_loss: float = _factor(0.0, "factor on logsumexp(logits)^2, which is added to the loss in training")
    dropout: float = _rate(0.0, "probability after each branch, in training")
    embedding_dropout: float | None = _rate(None, "probability after the embedding; none: dropout")
    attention_dropout: float | None = _rate(None, "probability of an attention weight; none: dropout")

    def __post_init__(self):
        for name in ("windows", "rotary_layers", "mlp_only_layers", "bias"):
            if isinstance(getattr(self, name), list):  # of a JSON file
                self._set(**{name: tuple(getattr(self, name))})
        check_settings(self)
        self._check_sizes()
        self._require("head_bias", not (self.head_bias and self.tied_head), "false with tied_head")
        self._check_mlp()
        self._check_position()
        self._check_bias()
        self._check_layers()
        self._check_rotary()
        for name in RATES:
            if getattr(self, name) is None:
                self._set(**{name: self.dropout})

    def _check_sizes(self) -> None:
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
        allowed = GATES if self.gated_mlp and (self.gated_experts or not self.experts) else ACTIVATIONS
        self._require("activation", self.activation in allowed, f"one of {', '.join(allowed)}")
        if not self.experts:
            self._require("gated_experts", not self.gated_experts, "false without experts")
            return
        self._set(expert_inner=self.expert_inner or self.n_inner)
        self._require("experts_per_token", self.experts_per_token <= self.experts, f"at most experts {self.experts}")
        self._require("experts_every", self.experts_every <= self.n_layer, f"at most n_layer {self.n_layer}")
        self._set(mlp_only_layers=tuple(sorted(set(self.mlp_only_layers))))
        is_valid = all(layer < self.n_layer for layer in self.mlp_only_layers)
        self._require("mlp_only_layers", is_valid, f"layers below n_layer {self.n_layer}")

    def _check_position(self) -> None:
        if self.position == "rotary":
            if self.rotary_dim is None:
                self._set(rotary_dim=self.head_dim)
            is_valid = self.rotary_dim % 2 == 0 and self.rotary_dim <= self.head_dim
            self._require("rotary_dim", is_valid, f"an even number up to head_dim {self.head_dim}")
        else:
            self._require("rotary_dim", self.rotary_dim is None, f"None as position is {self.position}")
        is_valid = self.embedding_scale == 1.0 or self.position != "learned"
        self._require("embedding_scale", is_valid, "1 with learned positions")
        is_valid = self.position_offset == 0 or self.position == "learned"
        self._require("position_offset", is_valid, "0, or more with learned positions")
        is_valid = self.alibi_scale == 1.0 or self.position == "alibi"
        self._require("alibi_scale", is_valid, f"1.0 as position is {self.position}")

    def _check_bias(self) -> None:
        if not isinstance(self.bias, bool):
            is_known = set(self.bias) <= set(BIASED)
            self._require("bias", is_known, f"true or false, or some of {', '.join(BIASED)}")
            parts = tuple(part for part in BIASED if part in self.bias)
            self._set(bias={BIASED: True, (): False}.get(parts, parts))
        self._require("bias", self.norm != "rms" or not self.has_bias("norm"), "no bias of norms, as norm is rms")
        self._require("norm_offset", self.norm == "rms" or self.norm_offset == 0.0, "0, as norm is layer")
        self._require("norm_weight", self.norm_weight or self.norm == "layer", "true, as norm is rms")
        needs_weight = self.has_bias("norm") and not self.norm_weight
        self._require("bias", not needs_weight, "no bias of norms, as norm_weight is false")

    def _check_layers(self) -> None:
        for name in ("windows", "rotary_layers"):
            values = getattr(self, name)
            self._require(name, len(values) > 0, "at least one")
            self._set(**{name: tuple(values[layer % len(values)] for layer in range(self.n_layer))})

    def _check_rotary(self) -> None:
        is_rotary = self.position == "rotary"
        has_windows = any(window is not None for window in self.windows)
        self._require("rope_scaling", is_rotary or self.rope_scaling is None, "none without rotary positions")
        self._require("rotary_layers", is_rotary or all(self.rotary_layers), "true without rotary positions")
        is_valid = self.local_rotary_base is None or (is_rotary and has_windows)
        self._require("local_rotary_base", is_valid, "none without rotary positions and windows")
        if self.rope_scaling is not None:
            sizes = {"pairs": self.rotary_dim // 2, "base": self.rotary_base, "block_size": self.block_size}
            try:
                self._set(rope_scaling=complete(self.rope_scaling, **sizes))
            except ValueError as error:
                raise ValueError(f"GPTConfig: rope_scaling: {error}") from None

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
        """Return whether a layer, 0 .. L - 1, has experts: the last one of every `experts_every` layers does, unless
        it is one of `mlp_only_layers`.
        """  # fmt: skip
        is_expert_layer = (layer + 1) % self.experts_every == 0 and layer not in self.mlp_only_layers
        return bool(self.experts) and is_expert_layer

    def scale(self, layer: int) -> float | None:
        """Return the factor on q k^T of a layer; None means 1 / sqrt(head_dim)."""
        if not self.scale_by_layer:
            return self.attention_scale
        scale = self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale
        return scale / (layer + 1)

    @property
    def switch_length(self) -> int | None:
        """The most tokens of a text with the short factors of longrope; None if all texts have the same factors."""
        return switch_length(self.rope_scaling, self.block_size)

    def rotary_table(self, layer: int) -> int | None:
        """Return which angles a layer rotates by: 0 those of rotary_base, 1 those of local_rotary_base, None none."""
        if self.position != "rotary" or not self.rotary_layers[layer]:
            return None
        return int(self.local_rotary_base is not None and self.windows[layer] is not None)
