"""Known models, one row each: the sizes of the papers, completed from the published checkpoints.

GPT: Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training", section 4.1. GPT-2: Radford et
al. 2019, "Language Models are Unsupervised Multitask Learners", table 2. GPT-3: Brown et al. 2020, arXiv:2005.14165,
table 2.1. GPT-Neo: Black et al. 2021, doi:10.5281/zenodo.5297715. GPT-J: Wang, Komatsuzaki 2021,
github.com/kingoflolz/mesh-transformer-jax. GPT-NeoX-20B: Black et al. 2022, arXiv:2204.06745. Pythia: Biderman et al.
2023, arXiv:2304.01373, table 1. OPT: Zhang et al. 2022, arXiv:2205.01068, table 1. BLOOM: Le Scao et al. 2022,
arXiv:2211.05100, table 3. Megatron-Turing NLG: Smith et al. 2022, arXiv:2201.11990, section 3.2. PaLM: Chowdhery et al.
2022, arXiv:2204.02311, table 1 and section 2. Gopher: Rae et al. 2021, arXiv:2112.11446, table 1. Chinchilla: Hoffmann
et al. 2022, arXiv:2203.15556, table 4. GLaM: Du et al. 2021, arXiv:2112.06905, table 4. docs/families.md lists
the choices that the papers leave open.
"""

from __future__ import annotations

from typing import Any

from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.model.presets_experts import EXPERT_PRESETS
from peakgpt.engine.model.presets_llama import LLAMA_PRESETS
from peakgpt.engine.model.presets_other import OTHER_PRESETS


def _sized(rows: dict[str, tuple[int, int, int]], **family: Any) -> dict[str, dict[str, Any]]:
    """Return the rows of a family: (n_layer, n_embd, n_head) of each model, and the fields that all models share."""
    return {
        name: {**family, "n_layer": layers, "n_embd": width, "n_head": heads}
        for name, (layers, width, heads) in rows.items()
    }


# The paper says "alternating dense and locally banded sparse attention patterns" without a width: GPT-Neo's is used.
GPT3 = {"block_size": 2048, "windows": (None, 256)}
NEO = {
    "block_size": 2048,
    "windows": (None, 256),
    "attention_scale": 1.0,
    "bias": ("out", "mlp", "norm"),
}
NEOX = {
    "block_size": 2048,
    "position": "rotary",
    "residual": "parallel_two_norms",
    "tied_head": False,
}
OPT = {"block_size": 2048, "vocab_size": 50272, "position_offset": 2, "activation": "relu"}
PALM = {
    "block_size": 2048,
    "vocab_size": 256000,
    "n_kv_head": 1,
    "head_dim": 256,
    "position": "rotary",
    "residual": "parallel",
    "activation": "silu",
    "gated_mlp": True,
    "bias": False,
    "z_loss": 1e-4,
}
GOPHER = {"block_size": 2048, "vocab_size": 32000, "norm": "rms", "position": "transformer_xl", "bias": False}
BLOOM = {"block_size": 2048, "vocab_size": 250880, "position": "alibi", "embedding_norm": True}

PRESETS: dict[str, dict[str, Any]] = {
    "openai-gpt": {"block_size": 512, "vocab_size": 40478, "residual": "post_norm"},
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768},
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280},
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600},
    "gpt2-tiny": {"n_layer": 4, "n_head": 3, "n_embd": 192, "block_size": 256, "vocab_size": 4096},
    **_sized(
        {
            "gpt3-small": (12, 768, 12),
            "gpt3-medium": (24, 1024, 16),
            "gpt3-large": (24, 1536, 16),
            "gpt3-2.7b": (32, 2560, 32),
            "gpt3-6.7b": (32, 4096, 32),
            "gpt3-175b": (96, 12288, 96),
        },
        **GPT3,
    ),
    # In the printed table n_head x head_dim is not n_embd. The printed 1.3B parameters need 16 heads, not 24.
    "gpt3-xl": {**GPT3, "n_layer": 24, "n_embd": 2048, "n_head": 24, "head_dim": 128},
    "gpt3-13b": {**GPT3, "n_layer": 40, "n_embd": 5140, "n_head": 40, "head_dim": 128},
    **_sized({"gpt-neo-125m": (12, 768, 12), "gpt-neo-1.3b": (24, 2048, 16), "gpt-neo-2.7b": (32, 2560, 20)}, **NEO),
    "gpt-j-6b": {
        "n_layer": 28,
        "n_embd": 4096,
        "n_head": 16,
        "block_size": 2048,
        "vocab_size": 50400,
        "position": "rotary",
        "rotary_dim": 64,
        "rotary_interleaved": True,
        "residual": "parallel",
        "bias": ("mlp", "norm"),
        "tied_head": False,
        "head_bias": True,
    },
    "gpt-neox-20b": {**NEOX, "n_layer": 44, "n_embd": 6144, "n_head": 64, "rotary_dim": 24, "vocab_size": 50432},
    **{
        f"pythia-{size}": {
            **NEOX,
            "n_layer": layers,
            "n_embd": width,
            "n_head": heads,
            "rotary_dim": width // heads // 4,
            "vocab_size": vocab,
            "activation": "gelu_erf",
        }
        for size, (layers, width, heads, vocab) in {
            "14m": (6, 128, 4, 50304),
            "31m": (6, 256, 8, 50304),
            "70m": (6, 512, 8, 50304),
            "160m": (12, 768, 12, 50304),
            "410m": (24, 1024, 16, 50304),
            "1b": (16, 2048, 8, 50304),
            "1.4b": (24, 2048, 16, 50304),
            "2.8b": (32, 2560, 32, 50304),
            "6.9b": (32, 4096, 32, 50432),
            "12b": (36, 5120, 40, 50688),
        }.items()
    },
    **_sized(
        {
            "opt-125m": (12, 768, 12),
            "opt-1.3b": (24, 2048, 32),
            "opt-2.7b": (32, 2560, 32),
            "opt-6.7b": (32, 4096, 32),
            "opt-13b": (40, 5120, 40),
            "opt-30b": (48, 7168, 56),
            "opt-66b": (64, 9216, 72),
            "opt-175b": (96, 12288, 96),
        },
        **OPT,
    ),
    "opt-350m": {**OPT, "n_layer": 24, "n_embd": 1024, "n_head": 16, "word_dim": 512, "residual": "post_norm"},
    **_sized(
        {
            "bloom-560m": (24, 1024, 16),
            "bloom-1b1": (24, 1536, 16),
            "bloom-1b7": (24, 2048, 16),
            "bloom-3b": (30, 2560, 32),
            "bloom-7b1": (30, 4096, 32),
            "bloom": (70, 14336, 112),
        },
        **BLOOM,
    ),
    "mt-nlg-530b": {"n_layer": 105, "n_embd": 20480, "n_head": 128, "block_size": 2048},
    **{
        f"palm-{size}": {**PALM, "n_layer": layers, "n_embd": width, "n_head": heads, "logit_scale": width**-0.5}
        for size, (layers, width, heads) in {
            "8b": (32, 4096, 16),
            "62b": (64, 8192, 32),
            "540b": (118, 18432, 48),
        }.items()
    },
    **_sized(
        {
            "gopher-44m": (8, 512, 16),
            "gopher-117m": (12, 768, 12),
            "gopher-417m": (12, 1536, 12),
            "gopher-1.4b": (24, 2048, 16),
            "gopher-7.1b": (32, 4096, 32),
            "gopher-280b": (80, 16384, 128),
            "chinchilla-70b": (80, 8192, 64),
        },
        **GOPHER,
    ),
    **LLAMA_PRESETS,
    **OTHER_PRESETS,
    **EXPERT_PRESETS,
    "glam-64b-64e": {
        "n_layer": 64,
        "n_embd": 8192,
        "n_head": 128,
        "head_dim": 128,
        "n_inner": 32768,
        "vocab_size": 256000,
        "position": "relative_bias",
        "gated_mlp": True,
        "experts": 64,
        "bias": False,
    },
}


def preset(name: str, **changes: Any) -> GPTConfig:
    """Build the config of a known model.

    Args:
        name: a key of PRESETS.
        changes: fields of GPTConfig that replace those of the preset.
    Raises:
        ValueError: an unknown name or field, or sizes that do not fit each other.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset: got {name!r}, expected one of {', '.join(PRESETS)}")
    unknown = set(changes) - set(GPTConfig.__dataclass_fields__)
    if unknown:
        raise ValueError(
            f"preset {name}: got {', '.join(sorted(unknown))}, expected fields of GPTConfig: "
            f"{', '.join(GPTConfig.__dataclass_fields__)}"
        )
    return GPTConfig(**{**PRESETS[name], **changes})
