"""What a GPT is, as data: sizes and choices under the names that GPT readers know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peakgpt.kernels.ops.mlp import ACTIVATIONS, GATES

SIZES = ("n_layer", "n_head", "n_kv_head", "n_embd", "head_dim", "block_size", "vocab_size", "n_inner", "word_dim")
RATES = ("dropout", "embedding_dropout", "attention_dropout")
CHOICES = {
    "norm": ("layer", "rms"),
    "position": ("learned", "rotary", "alibi", "transformer_xl", "relative_bias"),
    "residual": ("pre_norm", "post_norm", "parallel", "parallel_two_norms"),
}
BIASED = ("qkv", "out", "mlp", "norm")  # parts of a block; "norm" stands for the norms outside of blocks too


@dataclass(kw_only=True, frozen=True)
class GPTConfig:
    """Sizes and choices of one GPT; the defaults are GPT-2's smallest.

    Args:
        n_layer, n_head, n_embd: L blocks, H query heads, C features.
        n_kv_head: K key and value heads, dividing n_head; None means n_head.
        head_dim: D features a head; None means n_embd / n_head.
        n_inner: F features inside the MLP; None means 4 n_embd.
        block_size: the longest sequence, in tokens.
        vocab_size: V.
        word_dim: features of a token's embedding, projected to and from n_embd where it is another; None means n_embd.
        norm: "layer", or "rms", which takes no mean and has no bias.
        embedding_norm: whether the token embedding is normalised before the first block.
        position: "learned" table, "rotary" queries and keys, "alibi" slopes on the scores, "transformer_xl" relative
            keys, or "relative_bias" on the scores by distance, T5's; the last two are a layer's own.
        position_offset: row of the learned table that the first token takes.
        rotary_dim: features of a head that are rotated, even; None means head_dim.
        rotary_interleaved: whether neighbours are rotated as a pair (GPT-J), or feature i with i + rotary_dim / 2.
        rotary_base: pair i of n turns by base^(-i/n) a token.
        windows: keys that a query sees in each layer, itself counted, None for all; repeated to n_layer entries.
        attention_scale: factor on q k^T; None means 1 / sqrt(head_dim).
        scale_by_layer: whether layer i divides that factor by i + 1.
        residual: what a block adds to what:
            "pre_norm": x += attn(norm(x)), x += mlp(norm(x)); a last norm before the head.
            "post_norm": x = norm(x + attn(x)), x = norm(x + mlp(x)); no last norm.
            "parallel": x += attn(norm(x)) + mlp(norm(x)) with one norm, "parallel_two_norms" with one for each branch.
        activation: "gelu_tanh", "gelu_erf" or "relu"; of a gate also "silu".
        gated_mlp: whether the activation is that of a gate, a third projection of the MLP.
        experts: E MLPs, not gated, in place of that of every `experts_every`-th layer; 0 for none.
        experts_per_token: how many of them a token goes through.
        balance_loss: factor on the experts' balance, added to the loss while training.
        layer_norm_epsilon: added to the variance, or to the mean square.
        bias: whether layers and norms have one, or the parts that do: "qkv", "out", "mlp", "norm".
        tied_head: whether the head is the token embedding. head_bias: whether an untied head has a bias.
        logit_scale: factor on the logits.
        z_loss: factor on the square of the log of the softmax's denominator, added to the loss while training.
        dropout: probability after each branch, while training.
        embedding_dropout, attention_dropout: after the embedding, and of an attention weight; None means dropout.
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
    z_loss: float = 0.0
    dropout: float = 0.0
    embedding_dropout: float | None = None
    attention_dropout: float | None = None

    def __post_init__(self):
        optional = ("n_kv_head", "head_dim", "n_inner", "word_dim")
        for name in SIZES:
            value = getattr(self, name)
            if not _is_count(value) and not (value is None and name in optional):
                raise ValueError(f"GPTConfig: {name} is {value!r}, expected a positive integer")
        if self.head_dim is None and self.n_embd % self.n_head:
            raise ValueError(f"GPTConfig: n_embd is {self.n_embd}, expected a multiple of n_head {self.n_head}")
        self._settle(
            n_kv_head=self.n_kv_head or self.n_head,
            head_dim=self.head_dim or self.n_embd // self.n_head,
            n_inner=self.n_inner or 4 * self.n_embd,
            word_dim=self.word_dim or self.n_embd,
        )
        if self.n_head % self.n_kv_head:
            raise ValueError(f"GPTConfig: n_kv_head is {self.n_kv_head}, expected a divisor of n_head {self.n_head}")
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"GPTConfig: {name} is {getattr(self, name)!r}, expected one of {', '.join(allowed)}")
        for name in ("embedding_norm", "rotary_interleaved", "scale_by_layer", "gated_mlp", "tied_head", "head_bias"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"GPTConfig: {name} is {getattr(self, name)!r}, expected True or False")
        for name in ("layer_norm_epsilon", "rotary_base", "logit_scale"):
            if not getattr(self, name) > 0:
                raise ValueError(f"GPTConfig: {name} is {getattr(self, name)}, expected more than 0")
        if not self.z_loss >= 0:
            raise ValueError(f"GPTConfig: z_loss is {self.z_loss}, expected at least 0")
        if self.head_bias and self.tied_head:
            raise ValueError("GPTConfig: head_bias is True with a tied head, expected tied_head False beside it")
        self._check_mlp()
        self._check_position()
        self._check_bias()
        self._check_windows()
        for name in RATES:
            rate = self.dropout if getattr(self, name) is None else getattr(self, name)
            if not 0 <= rate < 1:
                raise ValueError(f"GPTConfig: {name} is {rate}, expected 0 <= {name} < 1")
            self._settle(**{name: rate})

    def _check_mlp(self) -> None:
        allowed = GATES if self.gated_mlp and not self.experts else ACTIVATIONS
        if self.activation not in allowed:
            raise ValueError(f"GPTConfig: activation is {self.activation!r}, expected one of {', '.join(allowed)}")
        if self.experts == 0 and not isinstance(self.experts, bool):
            return
        for name in ("experts", "experts_every", "experts_per_token"):
            if not _is_count(getattr(self, name)):
                raise ValueError(f"GPTConfig: {name} is {getattr(self, name)!r}, expected a positive integer")
        if self.experts_per_token > self.experts or self.experts_every > self.n_layer:
            raise ValueError(
                f"GPTConfig: experts_per_token is {self.experts_per_token} and experts_every {self.experts_every}, "
                f"expected at most experts {self.experts} and n_layer {self.n_layer}"
            )
        if not self.balance_loss >= 0:
            raise ValueError(f"GPTConfig: balance_loss is {self.balance_loss}, expected at least 0")

    def _check_position(self) -> None:
        rotary = self.position == "rotary"
        if not rotary and self.rotary_dim is not None:
            raise ValueError(
                f"GPTConfig: rotary_dim is {self.rotary_dim}, expected None as position is {self.position}"
            )
        if rotary and self.rotary_dim is None:
            self._settle(rotary_dim=self.head_dim)
        if rotary and (not _is_count(self.rotary_dim) or self.rotary_dim % 2 or self.rotary_dim > self.head_dim):
            raise ValueError(
                f"GPTConfig: rotary_dim is {self.rotary_dim!r}, expected an even number up to head_dim {self.head_dim}"
            )
        offset = self.position_offset
        if offset != 0 and not (_is_count(offset) and self.position == "learned"):
            raise ValueError(f"GPTConfig: position_offset is {offset!r}, expected 0, or more with learned positions")

    def _check_bias(self) -> None:
        if not isinstance(self.bias, bool):
            self._check_biased_parts()
        if self.norm == "rms" and self.has_bias("norm"):
            raise ValueError(f"GPTConfig: bias is {self.bias} with norm rms, which has none, expected it without norm")

    def _check_biased_parts(self) -> None:
        if not isinstance(self.bias, tuple | list) or not set(self.bias) <= set(BIASED):
            raise ValueError(
                f"GPTConfig: bias is {self.bias!r}, expected True or False, or some of {', '.join(BIASED)}"
            )
        parts = tuple(part for part in BIASED if part in self.bias)
        self._settle(bias={BIASED: True, (): False}.get(parts, parts))

    def _check_windows(self) -> None:
        windows = self.windows
        sequence = isinstance(windows, tuple | list) and len(windows) > 0
        if not sequence or not all(window is None or _is_count(window) for window in windows):
            raise ValueError(f"GPTConfig: windows is {windows!r}, expected positive integers or None, at least one")
        self._settle(windows=tuple(windows[layer % len(windows)] for layer in range(self.n_layer)))

    def _settle(self, **values: Any) -> None:
        """Replace what was left open by what it means."""
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def has_bias(self, part: str) -> bool:
        """Whether a part, one of BIASED, has a bias."""
        return self.bias is True or (self.bias is not False and part in self.bias)

    def has_experts(self, layer: int) -> bool:
        """Whether a layer, counted from 0, has experts: the last of every `experts_every`."""
        return bool(self.experts) and (layer + 1) % self.experts_every == 0

    def scale(self, layer: int) -> float | None:
        """A layer's factor on q k^T; None means 1 / sqrt(head_dim)."""
        if not self.scale_by_layer:
            return self.attention_scale
        scale = self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale
        return scale / (layer + 1)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
