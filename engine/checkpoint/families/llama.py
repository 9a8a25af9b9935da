"""The rows of the Llama line: RMSNorm, rotary positions, gated MLPs; see `Family` for the fields of a row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from peakgpt.engine.checkpoint.families.family import Family, Field, FieldGroup, with_defaults
from peakgpt.engine.checkpoint.families.layer_fields import (
    Types,
    bias_fields,
    rotary_layer_fields,
    uniform_window_fields,
    window_fields,
)
from peakgpt.engine.checkpoint.families.module_names import module_names, qkv_names
from peakgpt.engine.checkpoint.families.rope_fields import FULL, SLIDING, rope_fields, rope_fields_by_layer_type
from peakgpt.engine.model.config import GPTConfig

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


def types_by_period(period: int, *names: str) -> Types:
    """Return the layer_types of a model whose last layer of every `period` attends to all keys.

    Args:
        period: of the layers.
        names: a field of config.json that has another period, if it exists.
    """

    def types(content: Mapping[str, Any]) -> list[str]:
        every, layers = next((content[n] for n in names if content.get(n)), period), content["num_hidden_layers"]
        return [SLIDING if (layer + 1) % every else FULL for layer in range(layers)]

    return types


def _read_scales(content: Mapping[str, Any]) -> dict[str, Any]:
    scalar = content.get("query_pre_attn_scalar", 256)
    return {"embedding_scale": content["hidden_size"] ** 0.5, "attention_scale": scalar**-0.5}


def _write_scales(config: GPTConfig) -> dict[str, Any]:
    scale = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
    scalar = scale**-2
    return {"query_pre_attn_scalar": round(scalar) if round(scalar) ** -0.5 == scale else scalar}


NO_ROPE = rotary_layer_fields(interval=4)
GEMMA_EMBEDDING = FieldGroup((), lambda content: {"embedding_scale": content["hidden_size"] ** 0.5}, lambda config: {})
OLMO_WINDOWS = window_fields(4096, types_by_period(4))
GEMMA_WINDOWS = window_fields(4096, types_by_period(6, "sliding_window_pattern"), "sliding_window_pattern")
GEMMA_SCALES = FieldGroup(("query_pre_attn_scalar",), _read_scales, _write_scales)
# In their first files Gemma's gelu is the exact one, which transformers corrects.
GEMMA_GATES = {"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu_tanh", "gelu_new": "gelu_tanh", "silu": "silu",
               "relu": "relu"}  # fmt: skip
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
QK_NORMS = {f"transformer.h.{{}}.attn.{name}": f"model.layers.{{}}.self_attn.{name}" for name in ("q_norm", "k_norm")}


def _norm_names(**modules: str) -> dict[str, Any]:
    """Return LLAMA.names with other norms: our name -> transformers' name, of all norms of a block."""
    kept = {ours: theirs for ours, theirs in LLAMA.names.items() if ".h.{}.ln_" not in ours}
    return kept | {f"transformer.h.{{}}.{ours}": f"model.layers.{{}}.{theirs}" for ours, theirs in modules.items()}


OLMO_2 = replace(
    LLAMA,
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    fields=with_defaults(LLAMA.fields, vocab_size=50304, rms_norm_eps=1e-5),
    constants={**LLAMA.constants, "residual": "output_norm", "qk_norm": "full"},
    groups=(rope_fields(), ATTENTION_BIAS),
    names=_norm_names(ln_1_out="post_attention_layernorm", ln_2_out="post_feedforward_layernorm") | QK_NORMS,
)
GEMMA = replace(
    LLAMA,
    model_type="gemma",
    architecture="GemmaForCausalLM",
    fields=tuple(
        field._replace(values=GEMMA_GATES) if field.hf_name == "hidden_act" else field
        for field in with_defaults(
            LLAMA.fields, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=16, hidden_size=3072,
            head_dim=256, intermediate_size=24576, max_position_embeddings=8192, vocab_size=256000,
            hidden_act="gelu_pytorch_tanh", tie_word_embeddings=True,
        )
    ),
    constants={**LLAMA.constants, "norm_offset": 1.0},
    fixed={"use_bidirectional_attention": False},
    groups=(rope_fields(), GEMMA_EMBEDDING, ATTENTION_BIAS),
)  # fmt: skip
GEMMA_2 = replace(
    GEMMA,
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    fields=(
        *(
            field._replace(hf_name="hidden_activation", values=GATES) if field.hf_name == "hidden_act" else field
            for field in with_defaults(
                GEMMA.fields, num_hidden_layers=26, num_attention_heads=8, num_key_value_heads=4, hidden_size=2304,
                intermediate_size=9216,
            )
        ),
        Field("attention_softcap", "attn_logit_softcapping", 50.0),
        Field("logit_softcap", "final_logit_softcapping", 30.0),
    ),
    constants={**GEMMA.constants, "residual": "sandwich_norm"},
    groups=(rope_fields(), GEMMA_SCALES, window_fields(4096, types_by_period(2)), ATTENTION_BIAS),
    names=_norm_names(
        ln_1="input_layernorm",
        ln_1_out="post_attention_layernorm",
        ln_2="pre_feedforward_layernorm",
        ln_2_out="post_feedforward_layernorm",
    ),
)  # fmt: skip

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
        fields=(
            *with_defaults(
                tuple(field for field in LLAMA.fields if field.name != "layer_norm_epsilon"), vocab_size=50304
            ),
            Field("qkv_clip", "clip_qkv", None),
        ),
        constants={**LLAMA.constants, "norm": "layer", "norm_weight": False, "layer_norm_epsilon": 1e-5},
        groups=(rope_fields(), ATTENTION_BIAS),
    ),
    OLMO_2,
    replace(
        OLMO_2,
        model_type="olmo3",
        architecture="Olmo3ForCausalLM",
        groups=(
            rope_fields_by_layer_type(OLMO_WINDOWS, theta=500000.0),
            OLMO_WINDOWS,
            ATTENTION_BIAS,
        ),
    ),
    replace(
        LLAMA,
        model_type="qwen3",
        architecture="Qwen3ForCausalLM",
        fields=with_defaults(
            LLAMA.fields, num_key_value_heads=32, intermediate_size=22016, max_position_embeddings=32768,
            vocab_size=151936, head_dim=128,
        ),
        constants={**LLAMA.constants, "qk_norm": "head"},
        groups=(rope_fields(), QWEN_WINDOWS, ATTENTION_BIAS),
        names={**LLAMA.names, **QK_NORMS},
    ),
    GEMMA,
    GEMMA_2,
    replace(
        GEMMA_2,
        model_type="gemma3_text",
        architecture="Gemma3ForCausalLM",
        fields=with_defaults(
            GEMMA_2.fields, vocab_size=262208, max_position_embeddings=131072, attn_logit_softcapping=None,
            final_logit_softcapping=None,
        ),
        constants={**GEMMA_2.constants, "qk_norm": "head"},
        groups=(
            GEMMA_SCALES,
            rope_fields_by_layer_type(GEMMA_WINDOWS, 1e6, local_theta=10000.0, local_name="rope_local_base_freq"),
            GEMMA_WINDOWS,
            ATTENTION_BIAS,
        ),
        names={**GEMMA_2.names, **QK_NORMS},
    ),
)  # fmt: skip
