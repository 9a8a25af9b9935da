"""Model FLOPs: the operations that the definition of the model requires, independent of the kernels; for MFU.

    forward  = 2 N + 4 H D sum_l S_l      training = 3 forward = 6 N + 12 L H D T      FLOPs per token

A weight that does not train needs no gradient of its own, so 4 instead of 6. Those of adapters are added to N.

An FMA counts as 2, the backward pass as twice the forward. D is the paper's Q. S_l is the number of keys of layer l:
the sequence length T (full T^2 attention), or the window if it is shorter. Chowdhery et al. 2022, "PaLM",
arXiv:2204.02311, appendix B. N counts the weights that multiply: not the position embedding, and the token embedding
only if it is also the head. Activation checkpointing adds no model FLOPs: its second pass counts in HFU only, see
`recomputed_flops`. `causal=True` counts only the unmasked half of the attention, (T + 1) / 2 keys a query, and is never
used for MFU.
"""

from __future__ import annotations

from torch import nn

from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.model.norms import BLOCK_NORMS
from peakgpt.engine.model.recompute import parse
from peakgpt.engine.model.relative_positions import BUCKETS


def parameter_count(config: GPTConfig, *, active: bool = False) -> int:
    """Count the parameters of a model, a tied head once.

    Args:
        config: of the model.
        active: count only experts_per_token experts of a layer, those that compute one token.
    """
    c = config.n_embd
    norms = config.n_layer * len(BLOCK_NORMS[config.residual])
    norms += int(config.residual != "post_norm") + int(config.embedding_norm)
    projections = 0 if config.word_dim == c else 2 * config.word_dim * c
    head = 0 if config.tied_head else config.vocab_size * (config.word_dim + int(config.head_bias))
    embeddings = _token_embedding(config) + _position_embedding(config)
    layers = sum(_attention(config) + _mlp(config, layer, active) for layer in range(config.n_layer))
    return embeddings + projections + layers + norms * (config.norm_weight + config.has_bias("norm")) * c + head


def _attention(config: GPTConfig) -> int:
    c, heads, d = config.n_embd, config.n_head, config.head_dim
    qkv = (c + config.has_bias("qkv")) * (heads + 2 * config.n_kv_head) * d
    relative = {"transformer_xl": (c + 2) * heads * d, "relative_bias": BUCKETS * heads}.get(config.position, 0)
    norms = {"none": 0, "head": 2 * d, "full": (heads + config.n_kv_head) * d}[config.qk_norm]
    sinks = heads * config.attention_sinks
    return qkv + (heads * d + config.has_bias("out")) * c + relative + norms + sinks


def _mlp(config: GPTConfig, layer: int, active: bool) -> int:
    c, biased, has_experts = config.n_embd, config.has_bias("mlp"), config.has_experts(layer)
    inner, ups = _inner(config, layer), 1 + (config.gated_experts if has_experts else config.gated_mlp)
    one = ups * (c + biased) * inner + (inner + biased) * c
    if not has_experts:
        return one
    return (config.experts_per_token if active else config.experts) * one + (c + config.router_bias) * config.experts


def matrix_count(config: GPTConfig) -> int:
    """Count the weights of the linear layers in the blocks: those that Muon updates."""
    c, heads, d = config.n_embd, config.n_head, config.head_dim
    attention = (2 * heads + 2 * config.n_kv_head + heads * (config.position == "transformer_xl")) * d * c
    total = config.n_layer * attention
    for layer in range(config.n_layer):
        has_experts = config.has_experts(layer)
        one = (2 + (config.gated_experts if has_experts else config.gated_mlp)) * c * _inner(config, layer)
        total += config.experts * (one + c) if has_experts else one
    return total


def _inner(config: GPTConfig, layer: int) -> int:
    return config.expert_inner if config.has_experts(layer) else config.n_inner


def _token_embedding(config: GPTConfig) -> int:
    return config.vocab_size * config.word_dim


def _position_embedding(config: GPTConfig) -> int:
    return (config.position_offset + config.block_size) * config.n_embd if config.position == "learned" else 0


def multiplying_parameters(config: GPTConfig) -> int:
    """Return N: the parameters without tables that are only looked up, with the experts that compute one token."""
    lookup_tables = _position_embedding(config) + (0 if config.tied_head else _token_embedding(config))
    return parameter_count(config, active=True) - lookup_tables


def forward_flops(config: GPTConfig, tokens: int, *, causal: bool = False) -> float:
    """Return the model FLOPs per token of a forward pass over sequences of `tokens` tokens."""
    keys = sum(_keys(tokens, min(window or tokens, tokens), causal) for window in config.windows)
    return 2 * multiplying_parameters(config) + 4 * config.n_head * config.head_dim * keys


def _keys(tokens: int, window: int, causal: bool) -> float:
    """Return the number of keys of a query; with `causal` the mean over the sequence of the unmasked keys."""
    return window - window * (window - 1) / (2 * tokens) if causal else window


def training_flops(
    config: GPTConfig, tokens: int, *, causal: bool = False, frozen: int = 0, added: int = 0
) -> float:  # fmt: skip
    """Return the model FLOPs per token of a forward and backward pass over sequences of `tokens` tokens.

    Args:
        config: of the model.
        tokens: T.
        causal: count only the unmasked half of the attention.
        frozen: number of the N weights that do not train.
        added: number of weights that multiply in addition to N, and train: those of adapters.
    """
    return 3 * (forward_flops(config, tokens, causal=causal) + 2 * added) - 2 * frozen


def trained_weights(model: nn.Module) -> dict[str, int]:
    """Return `frozen` and `added` of `training_flops` for the parameters of a model that require gradients.

    Args:
        model: a Transformer, or a module with the parameters of one, and its `config`.
    """
    config, added, trained = model.config, 0, 0
    lookups = ("wpe.weight",) if config.tied_head else ("wpe.weight", "wte.weight")
    for name, parameter in model.named_parameters():
        if ".adapters." in name:
            added += parameter.numel()
        elif parameter.requires_grad and not name.endswith(lookups):
            per_token, of = (config.experts_per_token, config.experts) if ".mlp.experts." in name else (1, 1)
            trained += parameter.numel() * per_token // of
    return {"frozen": max(multiplying_parameters(config) - trained, 0), "added": added}


def recomputed_flops(config: GPTConfig, tokens: int, plan: str, *, causal: bool = False) -> float:
    """Return the FLOPs per token that a plan of recompute.py computes twice; HFU counts training_flops plus these.

    "mlp": the first product of every MLP. "block": the forward pass of the recomputed blocks.
    """
    kind, every = parse(plan)
    c, layers = config.n_embd, range(config.n_layer)
    # The widths of the MLPs that compute a token, added up.
    inner = [_inner(config, i) * (config.experts_per_token if config.has_experts(i) else 1) for i in layers]
    gated = [config.gated_experts if config.has_experts(i) else config.gated_mlp for i in layers]
    up = [(1 + is_gated) * c * width for is_gated, width in zip(gated, inner, strict=True)]
    if kind == "mlp":
        return 2 * sum(up)
    recomputed = layers[::every] if kind == "block" else ()
    attention = (2 * config.n_head + 2 * config.n_kv_head) * config.head_dim * c
    router = [c * config.experts * config.has_experts(i) for i in layers]
    weights = sum(attention + up[i] + inner[i] * c + router[i] for i in recomputed)
    keys = sum(_keys(tokens, min(config.windows[i] or tokens, tokens), causal) for i in recomputed)
    return 2 * weights + 4 * config.n_head * config.head_dim * keys


def mfu(units_per_s: float, flops_per_unit: float, peak_flops: float) -> float:
    """Return the FLOPs utilization, 0..1: FLOP/s divided by the peak FLOP/s of the device and dtype.

    Args:
        units_per_s: tokens, steps or calls per second.
        flops_per_unit: of one of them; model FLOPs for MFU.
        peak_flops: FLOP/s.
    """
    return units_per_s * flops_per_unit / peak_flops
