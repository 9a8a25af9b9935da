"""Known models of the Llama line, one row each: the sizes of the published checkpoints' config.json.

Llama 2: Touvron et al. 2023, arXiv:2307.09288. Llama 3: Grattafiori et al. 2024, arXiv:2407.21783, table 3. SmolLM2:
Ben Allal et al. 2025, arXiv:2502.02737. SmolLM3: its model card. Mistral 7B: Jiang et al. 2023, arXiv:2310.06825, table
1. Qwen2.5: Yang et al. 2024, arXiv:2412.15115, table 1. OLMo: Groeneveld et al. 2024, arXiv:2402.00838, table 1. OLMo
2: OLMo team 2024, arXiv:2501.00656, table 1. OLMo 3: its model card. Qwen3: Yang et al. 2025, arXiv:2505.09388, table
1. Gemma: Gemma team 2024, arXiv:2403.08295, table 1. Gemma 2: 2024, arXiv:2408.00118, table 1. Gemma 3: 2025,
arXiv:2503.19786, table 1, and the model cards.
"""

from __future__ import annotations

from typing import Any

LLAMA = {
    "norm": "rms",
    "position": "rotary",
    "gated_mlp": True,
    "activation": "silu",
    "bias": False,
    "tied_head": False,
    "layer_norm_epsilon": 1e-5,
}
LLAMA_3 = {**LLAMA, "block_size": 131072, "vocab_size": 128256, "n_kv_head": 8, "rotary_base": 500000.0}
LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SMOLLM_2 = {**LLAMA, "block_size": 8192, "vocab_size": 49152, "rotary_base": 100000.0, "tied_head": True}
MISTRAL = {**LLAMA, "n_layer": 32, "n_embd": 4096, "n_head": 32, "n_kv_head": 8, "n_inner": 14336, "block_size": 32768}
QWEN_2 = {
    **LLAMA,
    "block_size": 32768,
    "vocab_size": 151936,
    "rotary_base": 1000000.0,
    "bias": ("qkv",),
    "tied_head": True,
    "layer_norm_epsilon": 1e-6,
}
QWEN_3 = {
    **LLAMA,
    "block_size": 40960,
    "vocab_size": 151936,
    "head_dim": 128,
    "qk_norm": "head",
    "rotary_base": 1000000.0,
    "layer_norm_epsilon": 1e-6,
}
GEMMA = {
    **LLAMA,
    "block_size": 8192,
    "vocab_size": 256000,
    "head_dim": 256,
    "norm_offset": 1.0,
    "activation": "gelu_tanh",
    "tied_head": True,
    "layer_norm_epsilon": 1e-6,
}
GEMMA_2 = {
    **GEMMA,
    "residual": "sandwich_norm",
    "attention_scale": 256**-0.5,
    "attention_softcap": 50.0,
    "logit_softcap": 30.0,
    "windows": (4096, None),
}
GEMMA_3 = {
    **GEMMA,
    "block_size": 32768,
    "vocab_size": 262144,
    "residual": "sandwich_norm",
    "qk_norm": "head",
    "attention_scale": 256**-0.5,
    "windows": (512, 512, 512, 512, 512, None),
    "rotary_base": 1000000.0,
    "local_rotary_base": 10000.0,
}
OLMO_2 = {
    **LLAMA,
    "block_size": 4096,
    "vocab_size": 100352,
    "residual": "output_norm",
    "qk_norm": "full",
    "rotary_base": 500000.0,
    "layer_norm_epsilon": 1e-6,
}
OLMO = {**LLAMA, "norm": "layer", "norm_weight": False, "block_size": 2048, "vocab_size": 50304}


def _sized(family: dict[str, Any], rows: dict[str, tuple[int, ...]], **more: Any) -> dict[str, dict[str, Any]]:
    """Return the rows of a family: (n_layer, n_embd, n_head, n_kv_head, n_inner) of each model."""
    names = ("n_layer", "n_embd", "n_head", "n_kv_head", "n_inner")
    return {name: {**family, **more, **dict(zip(names, sizes, strict=True))} for name, sizes in rows.items()}


def _with_scaled_embedding(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return Gemma's rows with its factor on the embedding, sqrt(n_embd)."""
    return {name: {**row, "embedding_scale": row["n_embd"] ** 0.5} for name, row in rows.items()}


LLAMA_PRESETS: dict[str, dict[str, Any]] = {
    **_sized(
        LLAMA,
        {"llama-2-7b": (32, 4096, 32, 32, 11008), "llama-2-13b": (40, 5120, 40, 40, 13824),
         "llama-2-70b": (80, 8192, 64, 8, 28672)},
        block_size=4096,
        vocab_size=32000,
    ),
    **_sized(
        LLAMA_3,
        {"llama-3.1-8b": (32, 4096, 32, 8, 14336), "llama-3.1-70b": (80, 8192, 64, 8, 28672)},
        rope_scaling={**LLAMA_3_ROPE, "factor": 8.0},
    ),
    **_sized(
        LLAMA_3,
        {"llama-3.2-1b": (16, 2048, 32, 8, 8192), "llama-3.2-3b": (28, 3072, 24, 8, 8192)},
        rope_scaling={**LLAMA_3_ROPE, "factor": 32.0},
        tied_head=True,
    ),
    **_sized(SMOLLM_2, {"smollm2-135m": (30, 576, 9, 3, 1536), "smollm2-360m": (32, 960, 15, 5, 2560)}),
    **_sized(SMOLLM_2, {"smollm2-1.7b": (24, 2048, 32, 32, 8192)}, rotary_base=130000.0),
    **_sized(
        LLAMA,
        {"smollm3-3b": (36, 2048, 16, 4, 11008)},
        block_size=65536,
        vocab_size=128256,
        rotary_base=5000000.0,
        rotary_layers=(True, True, True, False),
        tied_head=True,
        layer_norm_epsilon=1e-6,
    ),
    "mistral-7b": {**MISTRAL, "vocab_size": 32000, "windows": (4096,)},
    "mistral-7b-v0.3": {**MISTRAL, "vocab_size": 32768, "rotary_base": 1000000.0},
    **_sized(QWEN_2, {"qwen2.5-0.5b": (24, 896, 14, 2, 4864), "qwen2.5-1.5b": (28, 1536, 12, 2, 8960)}),
    **_sized(
        QWEN_2, {"qwen2.5-7b": (28, 3584, 28, 4, 18944)}, block_size=131072, vocab_size=152064, tied_head=False
    ),
    **_sized(OLMO, {"olmo-1b": (16, 2048, 16, 16, 8192)}, tied_head=True),
    **_sized(OLMO, {"olmo-7b": (32, 4096, 32, 32, 11008)}),
    **_sized(OLMO_2, {"olmo2-1b": (16, 2048, 16, 16, 8192), "olmo2-7b": (32, 4096, 32, 32, 11008)}),
    **_sized(
        OLMO_2,
        {"olmo3-7b": (32, 4096, 32, 32, 11008)},
        block_size=65536,
        vocab_size=100278,
        windows=(4096, 4096, 4096, None),
        rope_scaling={"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192},
        local_rotary_base=500000.0,
    ),
    **_sized(
        QWEN_3,
        {"qwen3-0.6b": (28, 1024, 16, 8, 3072), "qwen3-1.7b": (28, 2048, 16, 8, 6144),
         "qwen3-4b": (36, 2560, 32, 8, 9728)},
        tied_head=True,
    ),
    **_sized(QWEN_3, {"qwen3-8b": (36, 4096, 32, 8, 12288)}),
    **_with_scaled_embedding(
        {
            **_sized(GEMMA, {"gemma-2b": (18, 2048, 8, 1, 16384), "gemma-7b": (28, 3072, 16, 16, 24576)}),
            **_sized(GEMMA_2, {"gemma-2-2b": (26, 2304, 8, 4, 9216), "gemma-2-9b": (42, 3584, 16, 8, 14336)}),
            **_sized(
                GEMMA_2, {"gemma-2-27b": (46, 4608, 32, 16, 36864)}, head_dim=128, attention_scale=144**-0.5
            ),
            **_sized(GEMMA_3, {"gemma-3-270m": (18, 640, 4, 1, 2048), "gemma-3-1b": (26, 1152, 4, 1, 6912)}),
        }
    ),
}  # fmt: skip
