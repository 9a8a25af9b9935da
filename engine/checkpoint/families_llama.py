"""The rows of the Llama line: RMSNorm, rotary positions, gated MLPs; see `Family` for the fields of a row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from peakgpt.engine.checkpoint.family import Family, Field, with_defaults
from peakgpt.engine.checkpoint.layer_fields import (
    bias_fields,
    rotary_layer_fields,
    uniform_window_fields,
    window_fields,
)
from peakgpt.engine.checkpoint.module_names import module_names, qkv_names
from peakgpt.engine.checkpoint.rope_fields import FULL, SLIDING, rope_fields

GATES = {"silu": "silu", "swish": "silu", "gelu": "gelu_erf", "gelu_new": "gelu_tanh",
         "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}  # fmt: skip


def _types_by_depth(content: Mapping[str, Any]) -> list[str]:
    """Return Qwen's layer_types: layers from max_window_layers on have a window."""
    layers = content["num_hidden_layers"]
    full = min(content.get("max_window_layers", 28), layers)
    return [FULL] * full + [SLIDING] * (layers - full)


def _types_by_rotary(content: Mapping[str, Any]) -> list[str]:
    """Return SmolLM3's layer_types: layers without positions have a window."""
    rotary_layers = NO_ROPE.read(content)["rotary_layers"]
    return [FULL if is_rotary else SLIDING for is_rotary in rotary_layers]


NO_ROPE = rotary_layer_fields(interval=4)
QWEN_WINDOWS = window_fields(4096, _types_by_depth, "use_sliding_window", "max_window_layers")
LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    fields=(
        Field("n_layer", "num_hidden_layers", 32),
        Field("n_head", "num_attention_heads", 32),
        Field("n_kv_head", "num_key_value_heads", None),
        Field("n_embd", "hidden_size", 4096),
        Field("head_dim", "head_dim", None),
        Field("n_inner", "intermediate_size", 11008),
        Field("block_size", "max_position_embeddings", 2048),
        Field("vocab_size", "vocab_size", 32000),
        Field("layer_norm_epsilon", "rms_norm_eps", 1e-6),
        Field("activation", "hidden_act", "silu", GATES),
        Field("tied_head", "tie_word_embeddings", False),
        Field("attention_dropout", "attention_dropout", 0.0),
    ),
    constants={"norm": "rms", "gated_mlp": True, "bias": False, "dropout": 0.0, "embedding_dropout": 0.0},
    groups=(rope_fields(), bias_fields(attention_bias=("qkv", "out"), mlp_bias=("mlp",))),
    base="model.",
    names=module_names(
        "model.",
        "layers",
        wte="embed_tokens",
        ln_1="input_layernorm",
        qkv=qkv_names("self_attn"),
        out="self_attn.o_proj",
        ln_2="post_attention_layernorm",
        gate="mlp.gate_proj",
        up="mlp.up_proj",
        down="mlp.down_proj",
        ln_f="norm",
    ),
)
ATTENTION_BIAS = bias_fields(attention_bias=("qkv", "out"))

LLAMA_LINE = (
    LLAMA,
    replace(
        LLAMA,
        model_type="mistral",
        architecture="MistralForCausalLM",
        fields=with_defaults(
            LLAMA.fields, num_key_value_heads=8, intermediate_size=14336, max_position_embeddings=131072
        ),
        groups=(rope_fields(), uniform_window_fields(4096)),
    ),
    replace(
        LLAMA,
        model_type="qwen2",
        architecture="Qwen2ForCausalLM",
        fields=with_defaults(
            LLAMA.fields, num_key_value_heads=32, intermediate_size=22016, max_position_embeddings=32768,
            vocab_size=151936,
        ),
        constants={**LLAMA.constants, "bias": ("qkv",)},
        groups=(rope_fields(), QWEN_WINDOWS),
    ),
    replace(
        LLAMA,
        model_type="smollm3",
        architecture="SmolLM3ForCausalLM",
        fields=with_defaults(
            LLAMA.fields, num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=4, hidden_size=2048,
            max_position_embeddings=32768, vocab_size=128256, tie_word_embeddings=True,
        ),
        groups=(
            rope_fields(theta=2e6),
            NO_ROPE,
            window_fields(None, _types_by_rotary, "use_sliding_window"),
            *LLAMA.groups[1:],
        ),
    ),
    replace(
        LLAMA,
        model_type="olmo",
        architecture="OlmoForCausalLM",
        fields=with_defaults(
            tuple(field for field in LLAMA.fields if field.name != "layer_norm_epsilon"), vocab_size=50304
        ),
        constants={**LLAMA.constants, "norm": "layer", "norm_weight": False, "layer_norm_epsilon": 1e-5},
        fixed={"clip_qkv": None},
        groups=(rope_fields(), ATTENTION_BIAS),
    ),
)  # fmt: skip
