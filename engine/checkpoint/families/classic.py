"""The rows of the GPTs up to 2022, from GPT-1 to BLOOM; see `Family` for the fields of a row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peakgpt.engine.checkpoint.families.family import Family, Field, FieldGroup, with_defaults
from peakgpt.engine.checkpoint.families.module_names import module_names, qkv_names
from peakgpt.engine.checkpoint.families.rope_fields import given_parameters, head_width, require_head_width, scaling_of
from peakgpt.engine.checkpoint.families.row_orders import grouped_heads
from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.model.rope_scaling import DEFAULT

GELU_NEW = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu_erf", "relu": "relu"}
# NeoX-20B's config says gelu_fast, which differs from gelu_new in some bits.
GELU_FAST = {"gelu_fast": "gelu_tanh", **GELU_NEW}

GPT2_SIZES = (
    Field("n_layer", "n_layer", 12),
    Field("n_head", "n_head", 12),
    Field("n_embd", "n_embd", 768),
    Field("block_size", "n_positions", 1024),
    Field("vocab_size", "vocab_size", 50257),
    Field("layer_norm_epsilon", "layer_norm_epsilon", 1e-5),
    Field("tied_head", "tie_word_embeddings", True),
)
GPT2_ALIASES = {
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
}
GPT2_RATES = (
    Field("dropout", "resid_pdrop", 0.1),
    Field("embedding_dropout", "embd_pdrop", 0.1),
    Field("attention_dropout", "attn_pdrop", 0.1),
)

GPT2_NAMES = module_names(
    "transformer.", "h", wte="wte", wpe="wpe", ln_1="ln_1", qkv="attn.c_attn", out="attn.c_proj", ln_2="ln_2",
    up="mlp.c_fc", down="mlp.c_proj",
)  # fmt: skip
# Only our own files have this field: transformers' GPT-2 always has biases.
GPT2_BIAS = FieldGroup(
    ("bias",),
    lambda content: {"bias": content.get("bias", True)},
    lambda config: {} if config.bias else {"bias": False},
)


def _neo_windows(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return `windows`, None or window_size per layer, from attention_types, [[["global", "local"], times], ...].

    attention_layers, ["global", "local", ...], must say the same: transformers follows it where the two differ.
    """
    window_of, layers = {"global": None, "local": content.get("window_size", 256)}, content["num_layers"]
    types = content.get("attention_types") or [[["global", "local"], 12]]
    parts = [(list(pattern), times) for pattern, times in types]
    fits = sum(len(pattern) * times for pattern, times in parts) == layers  # a damaged count could fill the memory
    kinds = [kind for pattern, times in parts for kind in pattern * times] if fits else []
    if len(kinds) != layers or not all(kind in list(window_of) for kind in kinds):
        raise ValueError(f"attention_types is {types}, expected {layers} layers of global or local")
    if content.get("attention_layers") not in (None, kinds):
        raise ValueError(f"attention_layers is {content['attention_layers']!r}, expected {kinds}")
    return {"windows": tuple(window_of[kind] for kind in kinds)}


def _neo_types(config: GPTConfig) -> dict[str, Any]:
    """Return attention_types, with the shortest pattern that repeats over the layers."""
    kinds = ["global" if window is None else "local" for window in config.windows]
    count = len(kinds)
    period = next(n for n in range(1, count + 1) if count % n == 0 and kinds == kinds[:n] * (count // n))
    return {
        "attention_types": [[kinds[:period], count // period]],
        "attention_layers": kinds,
        "window_size": max((window for window in config.windows if window), default=256),
    }


NEO_WINDOWS = FieldGroup(("attention_types", "attention_layers", "window_size"), _neo_windows, _neo_types)


def _neox_rotary(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rotary dimensions, base and scaling.

    New releases of transformers have them in rope_parameters, unless there is a rope_scaling. They rotate head_dim
    features of a narrower or wider head.
    """
    rope = given_parameters(content)
    share = rope.get("partial_rotary_factor", content.get("rotary_pct", 0.25))
    base = rope.get("rope_theta", content.get("rotary_emb_base", 10000))
    require_head_width(content)
    width = int(head_width(content) * share)
    return {"rotary_dim": width, "rotary_base": base, "rope_scaling": scaling_of(rope, content)}


def _neox_rope(config: GPTConfig) -> dict[str, Any]:
    share, base = (config.rotary_dim or 0) / config.head_dim, config.rotary_base
    scaling = config.rope_scaling or {"rope_type": DEFAULT}
    rope = {**scaling, "rope_theta": base, "partial_rotary_factor": share}
    older = {"rotary_pct": share, "rotary_emb_base": base, "rope_scaling": rope if config.rope_scaling else None}
    return {"rope_parameters": rope, **older}


NEOX_ROPE = FieldGroup(
    ("rope_parameters", "rope_scaling", "rotary_pct", "rotary_emb_base", "head_dim"), _neox_rotary, _neox_rope
)

# Of GPT-J, and of CodeGen, which differs from it in the order of the projection's rows.
GPTJ_FIELDS = (
    *with_defaults(
        GPT2_SIZES, n_layer=28, n_head=16, n_embd=4096, n_positions=2048, vocab_size=50400, tie_word_embeddings=False
    ),
    Field("n_inner", "n_inner", None),
    Field("rotary_dim", "rotary_dim", 64),
    Field("activation", "activation_function", "gelu_new", GELU_NEW),
    *with_defaults(GPT2_RATES, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
)
GPTJ_CONSTANTS = {
    "position": "rotary",
    "rotary_interleaved": True,
    "residual": "parallel",
    "bias": ("mlp", "norm"),
    "head_bias": True,
}

# fmt: off
CLASSIC = (
    Family(
        model_type="gpt2",
        architecture="GPT2LMHeadModel",
        fields=(
            *GPT2_SIZES,
            Field("n_inner", "n_inner", None),
            Field("activation", "activation_function", "gelu_new", GELU_NEW),
            Field("attention_scale", "scale_attn_weights", True, {True: None, False: 1.0}),
            Field("scale_by_layer", "scale_attn_by_inverse_layer_idx", False),
            *GPT2_RATES,
        ),
        fixed={"add_cross_attention": False},
        groups=(GPT2_BIAS,),
        names=GPT2_NAMES,
        conv1d=True,
        always_biased=True,
        aliases=GPT2_ALIASES,
    ),
    Family(
        model_type="openai-gpt",
        architecture="OpenAIGPTLMHeadModel",
        fields=(
            *with_defaults(GPT2_SIZES, n_positions=512, vocab_size=40478),
            Field("activation", "afn", "gelu", {"gelu": "gelu_tanh", "relu": "relu"}),
            *GPT2_RATES,
        ),
        constants={"residual": "post_norm"},
        names={
            **GPT2_NAMES,
            "transformer.wte": "transformer.tokens_embed",
            "transformer.wpe": "transformer.positions_embed",
        },
        conv1d=True,
        aliases=GPT2_ALIASES,
    ),
    Family(
        model_type="gpt_neo",
        architecture="GPTNeoForCausalLM",
        fields=(
            Field("n_layer", "num_layers", 24),
            Field("n_head", "num_heads", 16),
            Field("n_embd", "hidden_size", 2048),
            Field("n_inner", "intermediate_size", None),
            Field("block_size", "max_position_embeddings", 2048),
            Field("vocab_size", "vocab_size", 50257),
            Field("layer_norm_epsilon", "layer_norm_epsilon", 1e-5),
            Field("activation", "activation_function", "gelu_new", GELU_NEW),
            Field("tied_head", "tie_word_embeddings", True),
            Field("dropout", "resid_dropout", 0.0),
            Field("embedding_dropout", "embed_dropout", 0.0),
            Field("attention_dropout", "attention_dropout", 0.0),
        ),
        constants={"attention_scale": 1.0, "bias": ("out", "mlp", "norm")},
        groups=(NEO_WINDOWS,),
        names=module_names(
            "transformer.", "h", wte="wte", wpe="wpe", ln_1="ln_1", qkv=qkv_names("attn.attention"),
            out="attn.attention.out_proj", ln_2="ln_2", up="mlp.c_fc", down="mlp.c_proj",
        ),
        aliases={"num_hidden_layers": "num_layers", "num_attention_heads": "num_heads"},
    ),
    Family(
        model_type="gptj",
        architecture="GPTJForCausalLM",
        fields=GPTJ_FIELDS,
        constants=GPTJ_CONSTANTS,
        names=module_names(
            "transformer.", "h", wte="wte", ln_1="ln_1", qkv=qkv_names("attn"), out="attn.out_proj", up="mlp.fc_in",
            down="mlp.fc_out",
        ),
        aliases=GPT2_ALIASES,
    ),
    Family(
        model_type="gpt_neox",
        architecture="GPTNeoXForCausalLM",
        fields=(
            Field("n_layer", "num_hidden_layers", 44),
            Field("n_head", "num_attention_heads", 64),
            Field("n_embd", "hidden_size", 6144),
            Field("n_inner", "intermediate_size", 24576),
            Field("block_size", "max_position_embeddings", 2048),
            Field("vocab_size", "vocab_size", 50432),
            Field("layer_norm_epsilon", "layer_norm_eps", 1e-5),
            Field("activation", "hidden_act", "gelu", GELU_FAST),
            Field("residual", "use_parallel_residual", True, {True: "parallel_two_norms", False: "pre_norm"}),
            Field("bias", "attention_bias", True, {True: True, False: ("mlp", "norm")}),
            Field("tied_head", "tie_word_embeddings", False),
            Field("dropout", "hidden_dropout", 0.0),
            Field("embedding_dropout", "hidden_dropout", 0.0),
            Field("attention_dropout", "attention_dropout", 0.0),
        ),
        constants={"position": "rotary"},
        groups=(NEOX_ROPE,),
        base="gpt_neox.",
        names=module_names(
            "gpt_neox.", "layers", wte="embed_in", ln_1="input_layernorm", qkv="attention.query_key_value",
            out="attention.dense", ln_2="post_attention_layernorm", up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h",
            ln_f="final_layer_norm", head="embed_out",
        ),
        row_orders={"gpt_neox.layers.{}.attention.query_key_value": grouped_heads},
        renamed={"lm_head.": "embed_out."},
    ),
    Family(
        model_type="opt",
        architecture="OPTForCausalLM",
        fields=(
            Field("n_layer", "num_hidden_layers", 12),
            Field("n_head", "num_attention_heads", 12),
            Field("n_embd", "hidden_size", 768),
            Field("n_inner", "ffn_dim", 3072),
            Field("block_size", "max_position_embeddings", 2048),
            Field("vocab_size", "vocab_size", 50272),
            Field("word_dim", "word_embed_proj_dim", None),
            Field("activation", "activation_function", "relu", GELU_NEW),
            Field("residual", "do_layer_norm_before", True, {True: "pre_norm", False: "post_norm"}),
            Field("bias", "enable_bias", True, {True: True, False: ("norm",)}),
            Field("tied_head", "tie_word_embeddings", True),
            Field("dropout", "dropout", 0.1),
            Field("attention_dropout", "attention_dropout", 0.0),
        ),
        constants={"position_offset": 2, "embedding_dropout": 0.0},
        fixed={"_remove_final_layer_norm": False, "layer_norm_elementwise_affine": True, "layerdrop": 0.0},
        base="model.",
        names=module_names(
            "model.decoder.", "layers", wte="embed_tokens", wpe="embed_positions", ln_1="self_attn_layer_norm",
            qkv=qkv_names("self_attn"), out="self_attn.out_proj", ln_2="final_layer_norm", up="fc1", down="fc2",
            ln_f="final_layer_norm", project_in="project_in", project_out="project_out",
        ),
    ),
    Family(
        model_type="bloom",
        architecture="BloomForCausalLM",
        fields=(
            Field("n_layer", "n_layer", 2),
            Field("n_head", "n_head", 8),
            Field("n_embd", "hidden_size", 64),
            Field("block_size", "seq_length", 2048),
            Field("vocab_size", "vocab_size", 250880),
            Field("layer_norm_epsilon", "layer_norm_epsilon", 1e-5),
            Field("tied_head", "tie_word_embeddings", True),
            Field("dropout", "hidden_dropout", 0.0),
            Field("attention_dropout", "attention_dropout", 0.0),
        ),
        constants={"position": "alibi", "embedding_norm": True, "embedding_dropout": 0.0},
        fixed={"apply_residual_connection_post_layernorm": False},
        names=module_names(
            "transformer.", "h", wte="word_embeddings", ln_emb="word_embeddings_layernorm", ln_1="input_layernorm",
            qkv="self_attention.query_key_value", out="self_attention.dense", ln_2="post_attention_layernorm",
            up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h",
        ),
        row_orders={"transformer.h.{}.self_attention.query_key_value": grouped_heads},
        aliases={"n_embed": "hidden_size", "num_attention_heads": "n_head", "num_hidden_layers": "n_layer"},
    ),
)
# fmt: on
