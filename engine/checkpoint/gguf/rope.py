"""Scaled rotary frequencies in .gguf files.

    linear, yarn     rope.scaling.type and its parameters
    llama3           the tensor rope_freqs.weight: what each frequency is divided by. The parameters are not in the
                     file; they are found by comparing the tensor with that of the published ones
    longrope         the tensors rope_factors_short.weight and rope_factors_long.weight, and the factor of cos and sin
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peakgpt.engine.checkpoint.gguf.blocks import read_tensor
from peakgpt.engine.data.gguf_header import GGUFHeader
from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.model.rope_scaling import ORIGINAL, frequencies

FREQUENCIES = "rope_freqs.weight"
PUBLISHED = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, ORIGINAL: 8192}  # of Llama 3.1, 3.2 and 3.3
ORIGINAL_LENGTH, ATTENTION_FACTOR = "rope.scaling.original_context_length", "rope.scaling.attn_factor"
KEYS = {  # of llama.cpp -> parameter of rope_scaling
    "rope.scaling.factor": "factor",
    ORIGINAL_LENGTH: ORIGINAL,
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
}
TYPE = "rope.scaling.type"
LONGROPE_FACTORS = {"rope_factors_short.weight": "short_factor", "rope_factors_long.weight": "long_factor"}
LONGROPE_KEYS = (TYPE, ORIGINAL_LENGTH, ATTENTION_FACTOR)
ROPE_KEYS = (TYPE, *KEYS)
PARAMETERS = {"linear": ("factor",), "yarn": tuple(KEYS.values())}


def read_rope(header: GGUFHeader) -> dict[str, Any]:
    """Return `rope_scaling` of GPTConfig.

    Raises:
        ValueError: a scaling that we do not support.
    """
    prefix = header.get("general.architecture", str)
    kind = header.get(f"{prefix}.{TYPE}", str, "none")
    if kind not in ("none", *PARAMETERS):
        raise ValueError(f"{prefix}.{TYPE} is {kind!r}, expected none, {' or '.join(PARAMETERS)}")
    if FREQUENCIES in header.tensors:
        return {"rope_scaling": _read_factors(header, prefix)}
    if kind == "none":
        return {"rope_scaling": None}
    values = {name: header.get(f"{prefix}.{key}", (int, float)) for key, name in KEYS.items()}
    return {"rope_scaling": {"rope_type": kind, **{name: values[name] for name in PARAMETERS[kind]}}}


def _read_factors(header: GGUFHeader, prefix: str) -> dict[str, Any] | None:
    """Return the llama3 scaling whose divisors of the frequencies are those of the file; None if all are 1."""
    factors = read_tensor(header, header.tensors[FREQUENCIES], torch.float32).flatten()
    if (factors == 1).all():
        return None
    scaling = {"rope_type": "llama3", "factor": factors.max().item(), **PUBLISHED}
    base = float(header.get(f"{prefix}.rope.freq_base", (int, float), 10000.0))
    if not torch.allclose(_factors(scaling, 2 * len(factors), base), factors, rtol=1e-4):
        raise ValueError(f"got {FREQUENCIES} of other parameters than those of Llama 3.1, expected low_freq_factor 1, "
                         "high_freq_factor 4 and 8192 tokens")  # fmt: skip
    return scaling


def write_rope(config: GPTConfig) -> dict[str, Any]:
    """Return the metadata of `rope_scaling`, by key; see `rope_tensors` for llama3."""
    scaling = config.rope_scaling or {}
    if scaling.get("rope_type") not in PARAMETERS:
        return {}
    given = {key: scaling[name] for key, name in KEYS.items() if name in PARAMETERS[scaling["rope_type"]]}
    return {TYPE: scaling["rope_type"], **given}


def rope_tensors(config: GPTConfig) -> dict[str, Tensor]:
    """Return the tensor of the llama3 scaling, by name."""
    if config.rope_scaling is None or config.rope_scaling["rope_type"] != "llama3":
        return {}
    return {FREQUENCIES: _factors(config.rope_scaling, config.rotary_dim, config.rotary_base)}


def read_longrope(header: GGUFHeader) -> dict[str, Any]:
    """Return `rope_scaling` of an architecture that has longrope or no scaling; llama.cpp tells by the tensors.

    Raises:
        ValueError: another scaling.
    """
    prefix = header.get("general.architecture", str)
    if (kind := header.get(f"{prefix}.{TYPE}", str, "none")) not in ("none", "longrope"):
        raise ValueError(f"{prefix}.{TYPE} is {kind!r}, expected none or longrope")
    entries = {field: header.tensors[name] for name, field in LONGROPE_FACTORS.items() if name in header.tensors}
    if not entries:
        return {"rope_scaling": None}
    numbers = {ORIGINAL: ORIGINAL_LENGTH, "attention_factor": ATTENTION_FACTOR}
    values = {field: header.get(f"{prefix}.{key}", (int, float)) for field, key in numbers.items()}
    factors = {field: read_tensor(header, entry, torch.float32).flatten().tolist() for field, entry in entries.items()}
    return {"rope_scaling": {"rope_type": "longrope", **values, **factors}}


def write_longrope(config: GPTConfig) -> dict[str, Any]:
    """Return the metadata of longrope, by key."""
    scaling = config.rope_scaling
    if scaling is None or scaling["rope_type"] != "longrope":
        return {}
    return {ORIGINAL_LENGTH: scaling[ORIGINAL], ATTENTION_FACTOR: scaling["attention_factor"]}


def longrope_tensors(config: GPTConfig) -> dict[str, Tensor]:
    """Return the factors of longrope, by name."""
    scaling = config.rope_scaling
    if scaling is None or scaling["rope_type"] != "longrope":
        return {}
    return {name: torch.tensor(scaling[field], dtype=torch.float32) for name, field in LONGROPE_FACTORS.items()}


def _factors(scaling: dict[str, Any], width: int, base: float) -> Tensor:
    plain, scaled = (frequencies(one, width, base, 1, "cpu")[0] for one in (None, scaling))
    return plain / scaled
