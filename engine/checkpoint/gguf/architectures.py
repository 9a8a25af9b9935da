"""The architectures of llama.cpp, one row each; see `Architecture` for the fields of a row.

A model is exported as the first architecture that reads it back unchanged. A file does not name its activation. So each
row names that of the published models; llama.cpp computes the tanh form of GELU for all of them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from peakgpt.engine.checkpoint.gguf.architecture import Architecture, Key
from peakgpt.engine.checkpoint.gguf.rope import (
    FREQUENCIES,
    LONGROPE_FACTORS,
    LONGROPE_KEYS,
    ROPE_KEYS,
    longrope_tensors,
    read_longrope,
    read_rope,
    rope_tensors,
    write_longrope,
    write_rope,
)
from peakgpt.engine.data.gguf_header import GGUFHeader
from peakgpt.engine.model.config import BIASED, GPTConfig

SIZES = (
    Key("n_layer", "block_count", int),
    Key("block_size", "context_length", int),
    Key("n_embd", "embedding_length", int),
    Key("n_inner", "feed_forward_length", int),
    Key("n_head", "attention.head_count", int),
)
KV_HEADS = Key("n_kv_head", "attention.head_count_kv", int, None)
HEAD_DIM = Key("head_dim", "attention.key_length", int, None)
LAYER_NORM = Key("layer_norm_epsilon", "attention.layer_norm_epsilon", float)
RMS_NORM = Key("layer_norm_epsilon", "attention.layer_norm_rms_epsilon", float)
ROPE = (Key("rotary_dim", "rope.dimension_count", int, None), Key("rotary_base", "rope.freq_base", float, 10000.0))
PACKED = {"transformer.h.{}.attn.c_attn": "blk.{}.attn_qkv"}
OWN_HEAD = {"tied_head": False}  # llama.cpp does not take the embedding in its place
GATED = {"position": "rotary", "norm": "rms", "gated_mlp": True, "activation": "silu"}
WINDOW, WINDOWED = "attention.sliding_window", "attention.sliding_window_pattern"
PARALLEL = "use_parallel_residual"  # some files of StableLM say it wrongly: llama.cpp looks at the tensors
LOGIT_SOFTCAP = Key("logit_softcap", "final_logit_softcapping", float, None)
LOCAL_BASE = Key("local_rotary_base", "rope.freq_base_swa", float, 10000.0)


def _embedding_scale(header: GGUFHeader) -> dict[str, Any]:
    """Return Gemma's factor on the token embedding, the root of its width."""
    return {"embedding_scale": header.tensors["token_embd.weight"].shape[-1] ** 0.5}


def _gemma_scales(header: GGUFHeader, layers_of_27b: int) -> dict[str, Any]:
    """Return Gemma's factors; those of attention in the 27B models, which llama.cpp knows by their number of layers."""
    name = header.get("general.architecture", str)
    width, heads, layers = (header.get(f"{name}.{key}", int, 1) for key in
                            ("embedding_length", "attention.head_count", "block_count"))  # fmt: skip
    scale = {"attention_scale": (width / heads) ** -0.5} if layers == layers_of_27b and heads else {}
    return {**_embedding_scale(header), **scale}


def _read_windows(header: GGUFHeader, period: int) -> dict[str, Any]:
    """Return `windows`: all layers, or all but the last one of every `period`, have the window of the metadata."""
    window = header.get(f"{header.get('general.architecture', str)}.{WINDOW}", int, 0) or None  # 0: none
    return {"windows": (window,) if period == 1 else (*[window] * (period - 1), None)}


def _read_olmo(header: GGUFHeader) -> dict[str, Any]:
    """Return OLMo 3's windows, and its rope scaling for layers without a window. OLMo 2 has neither."""
    fields = {**read_rope(header), **_read_windows(header, 4)}
    layers = header.get(f"olmo2.{WINDOWED}", np.ndarray)
    if layers is not None:
        fields["windows"] = tuple(fields["windows"][0] if has_window else None for has_window in layers.tolist())
    if fields["rope_scaling"] is not None and any(fields["windows"]):
        fields["local_rotary_base"] = header.get("olmo2.rope.freq_base", (int, float), 10000.0)
    return fields


def _residual(header: GGUFHeader, norm: str, present: str, absent: str) -> dict[str, Any]:
    """Return the residual, which is told by a norm that the blocks have or not."""
    return {"residual": present if f"blk.0.{norm}.weight" in header.tensors else absent}


def _write_window(config: GPTConfig) -> dict[str, Any]:
    window = next((window for window in config.windows if window is not None), None)
    return {} if window is None else {WINDOW: window}


def _exact_yarn(header: GGUFHeader) -> dict[str, Any]:
    """Return `rope_scaling`, with bounds of yarn that are not rounded, as in the published models of gpt-oss."""
    scaling = read_rope(header)["rope_scaling"]
    is_yarn = scaling is not None and scaling["rope_type"] == "yarn"
    return {"rope_scaling": {**scaling, "truncate": False} if is_yarn else scaling}


QWEN2 = Architecture(
    name="qwen2",
    keys=(*SIZES, KV_HEADS, HEAD_DIM, RMS_NORM, *ROPE),
    constants={**GATED, "bias": ("qkv",)},
    read=read_rope,
    write=write_rope,
    extra_keys=ROPE_KEYS,
    extra_tensors=rope_tensors,
    extra_names=(FREQUENCIES,),
)
LLAMA = replace(QWEN2, name="llama", constants=GATED, interleaved=True)
GEMMA = replace(
    QWEN2,
    name="gemma",
    constants={**GATED, "bias": False, "activation": "gelu_tanh", "norm_offset": 1.0},
    read=lambda header: {**read_rope(header), **_embedding_scale(header)},
    norm_shift=1.0,
)

# fmt: off
ROWS = (
    Architecture(
        name="gpt2",
        keys=(*SIZES, LAYER_NORM),
        modules=PACKED,
        always_biased=BIASED,
    ),
    Architecture(
        name="starcoder",
        keys=(*SIZES, KV_HEADS, LAYER_NORM),
        modules=PACKED,
        always_biased=BIASED,
    ),
    Architecture(
        name="gptneox",
        keys=(
            *SIZES, LAYER_NORM, *ROPE,
            Key("residual", "use_parallel_residual", bool, "parallel_two_norms",
                {True: "parallel_two_norms", False: "pre_norm"}),
        ),
        constants={"position": "rotary", "activation": "gelu_erf", **OWN_HEAD},
        modules=PACKED,
        always_biased=BIASED,
    ),
    Architecture(
        name="bloom",
        keys=(*SIZES, KV_HEADS, LAYER_NORM),
        constants={"position": "alibi", "embedding_norm": True},
        modules=PACKED,
        always_biased=BIASED,
    ),
    Architecture(
        name="mpt",
        keys=(*SIZES, KV_HEADS, LAYER_NORM),
        constants={"position": "alibi", "activation": "gelu_erf"},
        fixed={"attention.max_alibi_bias": 8.0},
        modules=PACKED,
    ),
    Architecture(
        name="falcon",
        keys=(*SIZES, KV_HEADS, LAYER_NORM, *ROPE),
        constants={"position": "rotary", "activation": "gelu_erf", "bias": ("norm",)},
        read=lambda header: _residual(header, "attn_norm_2", "parallel_two_norms", "parallel"),
        modules=PACKED,
        modules_of={"parallel_two_norms": {
            "transformer.h.{}.ln_1": "blk.{}.attn_norm_2",
            "transformer.h.{}.ln_2": "blk.{}.attn_norm",
        }},
    ),
    Architecture(
        name="phi2",
        keys=(*SIZES, KV_HEADS, LAYER_NORM, *ROPE),
        constants={"position": "rotary", "residual": "parallel", **OWN_HEAD},
        modules=PACKED,
        always_biased=BIASED,
    ),
    Architecture(
        name="starcoder2",
        keys=(*SIZES, KV_HEADS, LAYER_NORM, *ROPE),
        constants={"position": "rotary"},
    ),
    QWEN2,
    LLAMA,
    Architecture(  # also expressed as llama, which comes first
        name="phi3",
        keys=(*SIZES, KV_HEADS, RMS_NORM, *ROPE),
        constants={**GATED, "bias": False},
        read=lambda header: {**read_longrope(header), **_read_windows(header, 1)},
        write=lambda config: {**write_longrope(config), **_write_window(config)},
        extra_keys=(WINDOW, *LONGROPE_KEYS),
        extra_tensors=longrope_tensors,
        extra_names=LONGROPE_FACTORS,
        modules=PACKED,
        packed_gate=True,
    ),
    replace(LLAMA, name="smollm3", constants={**GATED, "rotary_layers": (True, True, True, False)}),
    replace(
        LLAMA,
        name="olmo",
        keys=(*SIZES, KV_HEADS, LAYER_NORM, *ROPE),
        constants={**GATED, "norm": "layer", "norm_weight": False, "bias": False},
    ),
    replace(QWEN2, name="qwen3", constants={**GATED, "bias": False, "qk_norm": "head"}),
    replace(
        QWEN2,
        name="gpt-oss",
        keys=(
            *QWEN2.keys,
            Key("experts", "expert_count", int),
            Key("experts_per_token", "expert_used_count", int),
            Key("expert_inner", "expert_feed_forward_length", int),
        ),
        constants={
            **GATED, **OWN_HEAD, "bias": ("qkv", "out", "mlp"), "gated_experts": True, "experts_every": 1,
            "activation": "clamped_swiglu", "attention_sinks": True, "router_bias": True, "balance_over": "model",
        },
        read=lambda header: {**_exact_yarn(header), **_read_windows(header, 2)},
        write=lambda config: {**write_rope(config), **_write_window(config)},
        extra_keys=(*ROPE_KEYS, WINDOW),
        modules={"transformer.h.{}.ln_2": "blk.{}.post_attention_norm"},
    ),
    Architecture(
        name="stablelm",
        keys=(*SIZES, KV_HEADS, LAYER_NORM, *ROPE),
        constants={**GATED, **OWN_HEAD, "norm": "layer"},
        read=lambda header: _residual(header, "ffn_norm", "pre_norm", "parallel"),
        write=lambda config: {PARALLEL: config.residual == "parallel"},
        extra_keys=(PARALLEL,),
        always_biased=("norm",),
    ),
    replace(  # of OLMo 3 too
        QWEN2,
        name="olmo2",
        constants={**GATED, **OWN_HEAD, "bias": False, "qk_norm": "full", "residual": "output_norm"},
        read=_read_olmo,
        write=lambda config: {**write_rope(config), **_write_window(config)},
        extra_keys=(*ROPE_KEYS, WINDOW, WINDOWED),
    ),
    GEMMA,
    replace(
        GEMMA,
        name="gemma2",
        keys=(*GEMMA.keys, Key("attention_softcap", "attn_logit_softcapping", float, None), LOGIT_SOFTCAP),
        constants={**GEMMA.constants, "residual": "sandwich_norm"},
        read=lambda header: {**read_rope(header), **_gemma_scales(header, 46), **_read_windows(header, 2)},
        write=lambda config: {**write_rope(config), **_write_window(config)},
        extra_keys=(*ROPE_KEYS, WINDOW),
    ),
    replace(
        GEMMA,
        name="gemma3",
        keys=(*GEMMA.keys, LOGIT_SOFTCAP, LOCAL_BASE),
        constants={**GEMMA.constants, "qk_norm": "head", "residual": "sandwich_norm"},
        read=lambda header: {**read_rope(header), **_gemma_scales(header, 62), **_read_windows(header, 6)},
        write=lambda config: {**write_rope(config), **_write_window(config)},
        extra_keys=(*ROPE_KEYS, WINDOW),
    ),
)
# fmt: on
ARCHITECTURES = {row.name: row for row in ROWS}
