"""Sizes of later GPTs that are not like Llama, one row each; presets.py joins the tables.

CodeGen: Nijkamp et al. 2022, arXiv:2203.13474. Cerebras-GPT: Dey et al. 2023, arXiv:2304.03208, table 1. SantaCoder:
Ben Allal et al. 2023, arXiv:2301.03988. StarCoder: Li et al. 2023, arXiv:2305.06161, table 10. StarCoder 2: Lozhkov et
al. 2024, arXiv:2402.19173, table 6. MPT: MosaicML 2023. Falcon: Almazrouei et al. 2023, arXiv:2311.16867, table 2;
Falcon-RW: Penedo et al. 2023, arXiv:2306.01116. StableLM: Tow et al. 2023; Bellagente et al. 2024, arXiv:2402.17834.
Phi: Gunasekar et al. 2023, arXiv:2306.11644; Li et al. 2023, arXiv:2309.05463; Abdin et al. 2024, arXiv:2404.14219 and
arXiv:2412.08905. All rows were completed from the published checkpoints.
"""

from __future__ import annotations

from typing import Any

CEREBRAS = {"block_size": 2048, "activation": "gelu_erf"}
BIGCODE = {"n_kv_head": 1, "vocab_size": 49152}
STARCODER_2 = {"block_size": 16384, "vocab_size": 49152, "position": "rotary", "windows": (4096,)}
MPT = {"vocab_size": 50432, "position": "alibi", "activation": "gelu_erf", "bias": False}
FALCON = {
    "block_size": 2048,
    "vocab_size": 65024,
    "position": "rotary",
    "residual": "parallel",
    "activation": "gelu_erf",
    "bias": ("norm",),
}
FALCON_RW = {
    "block_size": 2048,
    "position": "alibi",
    "alibi_scale": 64**-0.5,
    "activation": "gelu_erf",
}
STABLELM = {
    "block_size": 4096,
    "position": "rotary",
    "activation": "silu",
    "gated_mlp": True,
    "tied_head": False,
}
PHI = {
    "block_size": 2048,
    "vocab_size": 51200,
    "position": "rotary",
    "rotary_dim": 32,
    "residual": "parallel",
    "tied_head": False,
    "head_bias": True,
}
PHI_3 = {
    "norm": "rms",
    "position": "rotary",
    "activation": "silu",
    "gated_mlp": True,
    "bias": False,
    "tied_head": False,
}


def _rows(rows: dict[str, tuple[int, int, int]], family: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the rows of a family: (n_layer, n_embd, n_head) of each model, and the fields that all models share."""
    return {
        name: {**family, "n_layer": layers, "n_embd": width, "n_head": heads}
        for name, (layers, width, heads) in rows.items()
    }


OTHER_PRESETS: dict[str, dict[str, Any]] = {
    "codegen-350m": {
        "n_layer": 20,
        "n_embd": 1024,
        "n_head": 16,
        "block_size": 2048,
        "vocab_size": 51200,
        "position": "rotary",
        "rotary_dim": 32,
        "rotary_interleaved": True,
        "residual": "parallel",
        "bias": ("mlp", "norm"),
        "tied_head": False,
        "head_bias": True,
    },
    **_rows(
        {
            "cerebras-gpt-111m": (10, 768, 12),
            "cerebras-gpt-256m": (14, 1088, 17),
            "cerebras-gpt-590m": (18, 1536, 12),
            "cerebras-gpt-1.3b": (24, 2048, 16),
            "cerebras-gpt-2.7b": (32, 2560, 32),
            "cerebras-gpt-6.7b": (32, 4096, 32),
            "cerebras-gpt-13b": (40, 5120, 40),
        },
        CEREBRAS,
    ),
    **_rows({"santacoder": (24, 2048, 16)}, {**BIGCODE, "block_size": 2048, "vocab_size": 49280}),
    **_rows(
        {"starcoderbase-1b": (24, 2048, 16), "starcoder": (40, 6144, 48)},
        {**BIGCODE, "block_size": 8192},
    ),
    "starcoder2-3b": {
        **STARCODER_2,
        "n_layer": 30,
        "n_embd": 3072,
        "n_head": 24,
        "n_kv_head": 2,
        "rotary_base": 999999.4420358813,
    },
    "starcoder2-7b": {
        **STARCODER_2,
        "n_layer": 32,
        "n_embd": 4608,
        "n_head": 36,
        "n_kv_head": 4,
        "rotary_base": 1000000.0,
    },
    **_rows({"mpt-7b": (32, 4096, 32)}, {**MPT, "block_size": 2048}),
    **_rows({"mpt-30b": (48, 7168, 64)}, {**MPT, "block_size": 8192}),
    **_rows({"falcon-7b": (32, 4544, 71)}, {**FALCON, "n_kv_head": 1}),
    **_rows({"falcon-40b": (60, 8192, 128)}, {**FALCON, "n_kv_head": 8, "residual": "parallel_two_norms"}),
    **_rows({"falcon-rw-1b": (24, 2048, 32)}, {**FALCON_RW, "vocab_size": 50304}),
    **_rows({"falcon-rw-7b": (36, 4096, 64)}, {**FALCON_RW, "vocab_size": 65024}),
    **_rows(
        {"stablelm-3b": (32, 2560, 32)},
        {**STABLELM, "n_inner": 6912, "vocab_size": 50304, "rotary_dim": 20, "bias": ("norm",)},
    ),
    **_rows(
        {"stablelm-2-1.6b": (24, 2048, 32)},
        {**STABLELM, "n_inner": 5632, "vocab_size": 100352, "rotary_dim": 16, "bias": ("qkv", "norm")},
    ),
    **_rows({"phi-1": (24, 2048, 32), "phi-1.5": (24, 2048, 32), "phi-2": (32, 2560, 32)}, PHI),
    **_rows(
        {"phi-3-mini": (32, 3072, 32)},
        {**PHI_3, "n_inner": 8192, "block_size": 4096, "vocab_size": 32064, "windows": (2047,)},
    ),
    **_rows(
        {"phi-3-medium": (40, 5120, 40)},
        {**PHI_3, "n_kv_head": 10, "n_inner": 17920, "block_size": 4096, "vocab_size": 32064, "windows": (2047,)},
    ),
    **_rows(
        {"phi-4": (40, 5120, 40)},
        {**PHI_3, "n_kv_head": 10, "n_inner": 17920, "block_size": 16384, "vocab_size": 100352, "rotary_base": 250e3},
    ),
}
