"""Model FLOPs: what a step must compute by the model's definition, whatever the kernels do; the numerator of MFU.

    forward  = 2 N + 4 H D sum_l S_l      training = 3 forward = 6 N + 12 L H D T      FLOPs per token

An FMA counts 2, the backward pass twice the forward; D is the paper's Q, S_l the keys of layer l: the sequence length
T, full T^2 attention, or its window where that is shorter. Chowdhery et al. 2022, "PaLM", arXiv:2204.02311, appendix
B. N are the weights that multiply: not the position embedding, and the token embedding only where it is the head.
What activation checkpointing computes again is no model FLOP: it counts in HFU only, `recomputed_flops`.
`causal=True` counts only the live half of the attention, (T + 1) / 2 keys a query, and is never used for MFU.
"""

from __future__ import annotations

from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.model.recompute import parse
from peakgpt.engine.model.relative_positions import BUCKETS


def parameter_count(config: GPTConfig, *, active: bool = False) -> int:
    """Count the model's parameters, a tied head once; `active`: of a layer's experts only those that a token meets."""
    c = config.n_embd
    norms = config.n_layer * (1 if config.residual == "parallel" else 2)
    norms += int(config.residual != "post_norm") + int(config.embedding_norm)
    projections = 0 if config.word_dim == c else 2 * config.word_dim * c
    head = 0 if config.tied_head else config.vocab_size * (config.word_dim + int(config.head_bias))
    embeddings = _token_embedding(config) + _position_embedding(config)
    layers = sum(_attention(config) + _mlp(config, layer, active) for layer in range(config.n_layer))
    return embeddings + projections + layers + norms * (1 + config.has_bias("norm")) * c + head


def _attention(config: GPTConfig) -> int:
    c, heads, d = config.n_embd, config.n_head, config.head_dim
    qkv = (c + config.has_bias("qkv")) * (heads + 2 * config.n_kv_head) * d
    relative = {"transformer_xl": (c + 2) * heads * d, "relative_bias": BUCKETS * heads}.get(config.position, 0)
    return qkv + (heads * d + config.has_bias("out")) * c + relative


def _mlp(config: GPTConfig, layer: int, active: bool) -> int:
    c, inner, biased = config.n_embd, config.n_inner, config.has_bias("mlp")
    up, down = (c + biased) * inner, (inner + biased) * c
    if not config.has_experts(layer):
        return (1 + config.gated_mlp) * up + down
    return (config.experts_per_token if active else config.experts) * (up + down) + c * config.experts


def _token_embedding(config: GPTConfig) -> int:
    return config.vocab_size * config.word_dim


def _position_embedding(config: GPTConfig) -> int:
    return (config.position_offset + config.block_size) * config.n_embd if config.position == "learned" else 0


def multiplying_parameters(config: GPTConfig) -> int:
    """N: the parameters without the tables that are only looked up and the experts that a token does not meet."""
    looked_up = _position_embedding(config) + (0 if config.tied_head else _token_embedding(config))
    return parameter_count(config, active=True) - looked_up


def forward_flops(config: GPTConfig, tokens: int, *, causal: bool = False) -> float:
    """Model FLOPs per token of a forward pass over sequences of `tokens` tokens."""
    keys = sum(_keys(tokens, min(window or tokens, tokens), causal) for window in config.windows)
    return 2 * multiplying_parameters(config) + 4 * config.n_head * config.head_dim * keys


def _keys(tokens: int, window: int, causal: bool) -> float:
    """Keys of a query, the mean over the sequence where only live ones count."""
    return window - window * (window - 1) / (2 * tokens) if causal else window


def training_flops(config: GPTConfig, tokens: int, *, causal: bool = False) -> float:
    """Model FLOPs per token of a forward and backward pass over sequences of `tokens` tokens."""
    return 3 * forward_flops(config, tokens, causal=causal)


def recomputed_flops(config: GPTConfig, tokens: int, plan: str, *, causal: bool = False) -> float:
    """FLOPs per token that a plan of recompute.py computes a second time; HFU's numerator with training_flops.

    "mlp": the first product of every MLP. "block": the forward pass of the blocks that forget.
    """
    what, every = parse(plan)
    c, inner, layers = config.n_embd, config.n_inner, range(config.n_layer)
    met = [config.experts_per_token if config.has_experts(i) else 1 for i in layers]  # MLPs of a token
    ups = [1 + (config.gated_mlp and not config.has_experts(i)) for i in layers]
    up = [n * k * c * inner for n, k in zip(met, ups, strict=True)]
    if what == "mlp":
        return 2 * sum(up)
    forgetful = layers[::every] if what == "block" else ()
    attention = (2 * config.n_head + 2 * config.n_kv_head) * config.head_dim * c
    router = [c * config.experts * config.has_experts(i) for i in layers]
    weights = sum(attention + up[i] + met[i] * inner * c + router[i] for i in forgetful)
    keys = sum(_keys(tokens, min(config.windows[i] or tokens, tokens), causal) for i in forgetful)
    return 2 * weights + 4 * config.n_head * config.head_dim * keys


def mfu(tokens_per_s: float, flops_per_token: float, peak_flops: float) -> float:
    """Model FLOPs utilisation, 0..1: achieved model FLOP/s over the peak FLOP/s of the device and dtype."""
    return tokens_per_s * flops_per_token / peak_flops
