"""Known models, one row each. Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", table 2."""

from __future__ import annotations

from typing import Any

from peakgpt.engine.config import GPTConfig

PRESETS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768},
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280},
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600},
    "gpt2-tiny": {"n_layer": 4, "n_head": 3, "n_embd": 192, "block_size": 256, "vocab_size": 4096},
}


def preset(name: str, **changes: Any) -> GPTConfig:
    """Build the config of a known model.

    Args:
        name: a key of PRESETS.
        changes: GPTConfig fields that replace the row's.
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
