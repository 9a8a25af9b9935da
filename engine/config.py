"""What a GPT is, as data: sizes and choices under the names that GPT readers know."""

from __future__ import annotations

from dataclasses import dataclass

from peakgpt.kernels.mlp import ACTIVATIONS

SIZES = ("n_layer", "n_head", "n_kv_head", "n_embd", "head_dim", "block_size", "vocab_size", "n_inner")


@dataclass(kw_only=True)
class GPTConfig:
    """Sizes and choices of one GPT; the defaults are GPT-2's smallest.

    Args:
        n_layer, n_head, n_embd: L blocks, H query heads, C features.
        n_kv_head: K key and value heads, dividing n_head; None means n_head.
        head_dim: D features a head; None means n_embd / n_head.
        n_inner: F features inside the MLP; None means 4 n_embd.
        block_size: the longest sequence, in tokens.
        vocab_size: V.
        activation: "gelu_tanh", "gelu_erf" or "relu".
        layer_norm_epsilon: added to the variance.
        bias: whether linear layers and norms have one.
        dropout: probability after the embedding, in attention and after each branch, while training.
    Raises:
        ValueError: a value out of range, or sizes that do not fit each other.
    """

    n_layer: int = 12
    n_head: int = 12
    n_kv_head: int | None = None
    n_embd: int = 768
    head_dim: int | None = None
    n_inner: int | None = None
    block_size: int = 1024
    vocab_size: int = 50257
    activation: str = "gelu_tanh"
    layer_norm_epsilon: float = 1e-5
    bias: bool = True
    dropout: float = 0.0

    def __post_init__(self):
        for name in SIZES:
            value = getattr(self, name)
            if value is None and name in ("n_kv_head", "head_dim", "n_inner"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"GPTConfig: {name} is {value!r}, expected a positive integer")
        if self.head_dim is None and self.n_embd % self.n_head:
            raise ValueError(f"GPTConfig: n_embd is {self.n_embd}, expected a multiple of n_head {self.n_head}")
        self.n_kv_head = self.n_kv_head or self.n_head
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        self.n_inner = self.n_inner or 4 * self.n_embd
        if self.n_head % self.n_kv_head:
            raise ValueError(f"GPTConfig: n_kv_head is {self.n_kv_head}, expected a divisor of n_head {self.n_head}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"GPTConfig: activation is {self.activation!r}, expected one of {', '.join(ACTIVATIONS)}")
        if not self.layer_norm_epsilon > 0:
            raise ValueError(f"GPTConfig: layer_norm_epsilon is {self.layer_norm_epsilon}, expected more than 0")
        if not isinstance(self.bias, bool):
            raise ValueError(f"GPTConfig: bias is {self.bias!r}, expected True or False")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"GPTConfig: dropout is {self.dropout}, expected 0 <= dropout < 1")
