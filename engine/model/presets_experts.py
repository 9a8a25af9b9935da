"""Known models with a mixture of experts, one row each: the sizes of the published checkpoints' config.json.

Mixtral 8x7B: Jiang et al. 2024, arXiv:2401.04088, table 1. Qwen3-30B-A3B: Yang et al. 2025, arXiv:2505.09388, table 2.
gpt-oss: OpenAI 2025, arXiv:2508.10925, table 1 and section 2.
"""

from __future__ import annotations

from typing import Any

from peakgpt.engine.model.presets_llama import LLAMA

EXPERTS = {**LLAMA, "experts_every": 1, "gated_experts": True, "balance_over": "model"}
GPT_OSS = {
    **EXPERTS,
    "n_embd": 2880,
    "n_head": 64,
    "n_kv_head": 8,
    "head_dim": 64,
    "n_inner": 2880,
    "block_size": 131072,
    "vocab_size": 201088,
    "rotary_base": 150000.0,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
    "windows": (128, None),
    "attention_sinks": True,
    "bias": ("qkv", "out", "mlp"),
    "activation": "clamped_swiglu",
    "router_bias": True,
    "experts_per_token": 4,
    "balance_loss": 0.9,
}

EXPERT_PRESETS: dict[str, dict[str, Any]] = {
    "mixtral-8x7b": {
        **EXPERTS,
        "n_layer": 32,
        "n_embd": 4096,
        "n_head": 32,
        "n_kv_head": 8,
        "n_inner": 14336,
        "block_size": 32768,
        "vocab_size": 32000,
        "rotary_base": 1000000.0,
        "experts": 8,
        "experts_per_token": 2,
        "balance_loss": 0.02,
    },
    "qwen3-30b-a3b": {
        **EXPERTS,
        "n_layer": 48,
        "n_embd": 2048,
        "n_head": 32,
        "n_kv_head": 4,
        "head_dim": 128,
        "n_inner": 6144,
        "block_size": 40960,
        "vocab_size": 151936,
        "rotary_base": 1000000.0,
        "layer_norm_epsilon": 1e-6,
        "qk_norm": "head",
        "experts": 128,
        "experts_per_token": 8,
        "expert_inner": 768,
        "balance_loss": 0.001,
    },
    "gpt-oss-20b": {**GPT_OSS, "n_layer": 24, "experts": 32},
    "gpt-oss-120b": {**GPT_OSS, "n_layer": 36, "experts": 128},
}
