"""Model FLOPs: what a step must compute by the model's definition, whatever the kernels do; the numerator of MFU.

    forward  = 2 N + 4 L H D T      training = 6 N + 12 L H D T      FLOPs per token

An FMA counts 2, the backward pass twice the forward; D is the paper's Q, T the sequence length, full T^2 attention.
Chowdhery et al. 2022, "PaLM", arXiv:2204.02311, appendix B. N leaves out the position embedding, which multiplies
nothing, and holds the token embedding once: tied, it is the head's matrix. `causal=True` counts only the live half
of the attention, (T + 1) / 2 keys a query, and is never used for MFU.
"""

from __future__ import annotations

from peakgpt.engine.config import GPTConfig


def parameter_count(config: GPTConfig, *, position: bool = True) -> int:
    """Count the model's parameters, the tied head once; without the position embedding where `position` is False."""
    c, d, bias = config.n_embd, config.head_dim, int(config.bias)
    qkv, heads = (config.n_head + 2 * config.n_kv_head) * d, config.n_head * d
    attention = (c + bias) * qkv + (heads + bias) * c
    mlp = (c + bias) * config.n_inner + (config.n_inner + bias) * c
    norm = (1 + bias) * c
    embeddings = (config.vocab_size + (config.block_size if position else 0)) * c
    return embeddings + config.n_layer * (attention + mlp + 2 * norm) + norm


def forward_flops(config: GPTConfig, tokens: int, *, causal: bool = False) -> float:
    """Model FLOPs per token of a forward pass over sequences of `tokens` tokens."""
    keys = (tokens + 1) / 2 if causal else tokens
    pairs = config.n_layer * config.n_head * config.head_dim * keys
    return 2 * parameter_count(config, position=False) + 4 * pairs


def training_flops(config: GPTConfig, tokens: int, *, causal: bool = False) -> float:
    """Model FLOPs per token of a forward and backward pass over sequences of `tokens` tokens."""
    return 3 * forward_flops(config, tokens, causal=causal)


def mfu(tokens_per_s: float, flops_per_token: float, peak_flops: float) -> float:
    """Model FLOPs utilisation, 0..1: achieved model FLOP/s over the peak FLOP/s of the device and dtype."""
    return tokens_per_s * flops_per_token / peak_flops
