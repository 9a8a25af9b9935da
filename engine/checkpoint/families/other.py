"""The rows of later GPTs that are not like Llama: other norms, biases, packed projections; see `Family`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peakgpt.engine.checkpoint.families.classic import (
    GELU_NEW,
    GPT2_ALIASES,
    GPT2_NAMES,
    GPT2_RATES,
    GPT2_SIZES,
    GPTJ_CONSTANTS,
    GPTJ_FIELDS,
)
from peakgpt.engine.checkpoint.families.family import Family, Field, FieldGroup, with_defaults
from peakgpt.engine.checkpoint.families.layer_fields import uniform_window_fields
from peakgpt.engine.checkpoint.families.llama import GATES
from peakgpt.engine.checkpoint.families.module_names import module_names, qkv_names
from peakgpt.engine.checkpoint.families.rope_fields import (
    given_parameters,
    head_width,
    kind_of,
    require_head_width,
    rope_fields,
)
from peakgpt.engine.checkpoint.families.row_orders import CODEGEN_PARTS, codegen_heads, grouped_heads
from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.model.rope_scaling import ORIGINAL

SIZES = (
    Field("n_layer", "num_hidden_layers", 32),
    Field("n_head", "num_attention_heads", 32),
    Field("n_kv_head", "num_key_value_heads", None),
    Field("n_embd", "hidden_size", 2560),
    Field("n_inner", "intermediate_size", 10240),
    Field("block_size", "max_position_embeddings", 2048),
    Field("vocab_size", "vocab_size", 51200),
    Field("tied_head", "tie_word_embeddings", False),
)
RATES = (
    Field("dropout", "resid_pdrop", 0.0),
    Field("embedding_dropout", "embd_pdrop", 0.0),
    Field("attention_dropout", "attention_dropout", 0.0),
)
ROPE = rope_fields()
PHI_ROPE = rope_fields(share=0.5)
PHI_3_ROPE = rope_fields(share=1.0)
STABLELM_ROPE = rope_fields(share=0.25)
LAYERNORMS = {"low_precision_layernorm": "layer", "layernorm": "layer"}


def _codegen_width(content: Mapping[str, Any]) -> dict[str, Any]:
    if content["n_head"] % CODEGEN_PARTS:
        raise ValueError(f"n_head is {content['n_head']}, expected a multiple of {CODEGEN_PARTS}")
    return {}


def _bigcode_heads(content: Mapping[str, Any]) -> dict[str, Any]:
    return {"n_kv_head": 1 if content.get("multi_query", True) else content["n_head"]}


# transformers writes num_key_value_heads, and ignores it.
MULTI_QUERY = FieldGroup(
    ("multi_query", "num_key_value_heads"), _bigcode_heads, lambda config: {"multi_query": config.n_kv_head == 1}
)


def _falcon_heads(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return n_kv_head: Falcon-40B's architecture has groups, the older one a single one or as many as heads."""
    heads, groups = content["num_attention_heads"], content.get("num_kv_heads")
    if content.get("new_decoder_architecture"):
        return {"n_kv_head": groups or heads}
    if content.get("multi_query", True):
        return {"n_kv_head": 1}
    if groups not in (None, heads):
        raise ValueError(f"num_kv_heads is {groups!r}, expected {heads} without multi_query, new_decoder_architecture")
    return {"n_kv_head": heads}


def _falcon_residual(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return residual, from the architecture and its number of norms before parallel branches."""
    is_new, norms = bool(content.get("new_decoder_architecture")), content.get("num_ln_in_parallel_attn")
    is_parallel, norms = content.get("parallel_attn", True), (2 if is_new else 1) if norms is None else norms
    if is_new and not is_parallel:
        raise ValueError(f"parallel_attn is {is_parallel}, expected True with new_decoder_architecture")
    if is_parallel and norms not in ((1, 2) if is_new else (1,)):
        raise ValueError(f"num_ln_in_parallel_attn is {norms!r}, expected 1, or 2 with new_decoder_architecture")
    kind = "parallel_two_norms" if norms == 2 else "parallel"
    return {"residual": kind if is_parallel else "pre_norm"}


def _falcon_position(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the position; ALiBi is added to the scores before they are scaled, so the scale applies to it too."""
    require_head_width(content)
    if not content.get("alibi"):
        return ROPE.read(content)
    return {"position": "alibi", "alibi_scale": head_width(content) ** -0.5}


def _read_falcon(content: Mapping[str, Any]) -> dict[str, Any]:
    return {**_falcon_heads(content), **_falcon_residual(content), **_falcon_position(content)}


def _write_falcon(config: GPTConfig) -> dict[str, Any]:
    two_norms, has_rotary = config.residual == "parallel_two_norms", config.position == "rotary"
    is_new = two_norms or config.n_kv_head not in (1, config.n_head)
    return {
        "new_decoder_architecture": is_new,
        "multi_query": config.n_kv_head == 1,
        "num_kv_heads": config.n_kv_head if is_new else config.n_head,
        "parallel_attn": config.residual != "pre_norm",
        "num_ln_in_parallel_attn": 2 if two_norms else 1 if is_new else None,
        "alibi": not has_rotary,
        **(ROPE.write(config) if has_rotary else {}),
    }


FALCON = FieldGroup(
    (
        "new_decoder_architecture", "multi_query", "num_kv_heads", "parallel_attn", "num_ln_in_parallel_attn", "alibi",
        "head_dim", *ROPE.names,
    ),
    _read_falcon,
    _write_falcon,
)  # fmt: skip


def _falcon_norms(config: GPTConfig) -> dict[str, str]:
    """Return the names of the norms of a block."""
    two_norms = config.residual == "parallel_two_norms"
    names = ("ln_attn", "ln_mlp") if two_norms else ("input_layernorm", "post_attention_layernorm")
    return {f"transformer.h.{{}}.ln_{i}": f"transformer.h.{{}}.{name}" for i, name in enumerate(names, 1)}


def _read_stablelm(content: Mapping[str, Any]) -> dict[str, Any]:
    require_head_width(content)
    return STABLELM_ROPE.read(content)


def _read_phi_3(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rotary fields; older files call longrope "su" or "yarn"."""
    given = given_parameters(content)
    renamed = {"rope_scaling": {**given, "rope_type": "longrope"}} if kind_of(given) in ("su", "yarn") else {}
    return PHI_3_ROPE.read({ORIGINAL: 4096, **content, **renamed})


def _write_phi_3(config: GPTConfig) -> dict[str, Any]:
    """Return the rotary fields; transformers reads the length of the pretraining's texts beside the parameters."""
    original = (config.rope_scaling or {}).get(ORIGINAL)
    return {**PHI_3_ROPE.write(config), **({} if original is None else {ORIGINAL: original})}


# fmt: off
OTHER = (
    Family(
        model_type="gpt_bigcode",
        architecture="GPTBigCodeForCausalLM",
        fields=(
            *GPT2_SIZES,
            Field("n_inner", "n_inner", None),
            Field("activation", "activation_function", "gelu_pytorch_tanh", GELU_NEW),
            Field("attention_scale", "scale_attn_weights", True, {True: None, False: 1.0}),
            *GPT2_RATES,
        ),
        fixed={"add_cross_attention": False},
        groups=(MULTI_QUERY,),
        names=GPT2_NAMES,
        row_orders={"transformer.h.{}.attn.c_attn": grouped_heads},
        aliases=GPT2_ALIASES,
    ),
    Family(
        model_type="codegen",
        architecture="CodeGenForCausalLM",
        fields=GPTJ_FIELDS,
        constants=GPTJ_CONSTANTS,
        groups=(FieldGroup((), _codegen_width, lambda config: {}),),
        names=module_names(
            "transformer.", "h", wte="wte", ln_1="ln_1", qkv="attn.qkv_proj", out="attn.out_proj", up="mlp.fc_in",
            down="mlp.fc_out",
        ),
        row_orders={"transformer.h.{}.attn.qkv_proj": codegen_heads},
        aliases=GPT2_ALIASES,
    ),
    Family(
        model_type="mpt",
        architecture="MptForCausalLM",
        fields=(
            Field("n_layer", "n_layers", 24),
            Field("n_head", "n_heads", 16),
            Field("n_embd", "d_model", 2048),
            Field("block_size", "max_seq_len", 2048),
            Field("vocab_size", "vocab_size", 50368),
            Field("layer_norm_epsilon", "layer_norm_epsilon", 1e-5),
            Field("norm", "norm_type", "low_precision_layernorm", LAYERNORMS),
            Field("attention_scale", "attn_config.softmax_scale", None),
            Field("tied_head", "tie_word_embeddings", True),
            Field("dropout", "resid_pdrop", 0.0),
            Field("embedding_dropout", "emb_pdrop", 0.0),
            Field("attention_dropout", "attn_config.attn_pdrop", 0),
            Field("qkv_clip", "attn_config.clip_qkv", None),
        ),
        constants={"position": "alibi", "activation": "gelu_erf", "bias": False},
        fixed={
            "expansion_ratio": 4,
            "no_bias": True,
            "logit_scale": None,
            "attn_config.alibi": True,
            "attn_config.alibi_bias_max": 8,
            "attn_config.attn_type": "multihead_attention",
            "attn_config.attn_uses_sequence_id": False,
            "attn_config.prefix_lm": False,
            "attn_config.qk_ln": False,
        },
        names=module_names(
            "transformer.", "blocks", wte="wte", ln_1="norm_1", qkv="attn.Wqkv", out="attn.out_proj", ln_2="norm_2",
            up="ffn.up_proj", down="ffn.down_proj", ln_f="norm_f",
        ),
        aliases={"num_hidden_layers": "n_layers", "num_attention_heads": "n_heads", "hidden_size": "d_model"},
    ),
    Family(
        model_type="falcon",
        architecture="FalconForCausalLM",
        fields=(
            Field("n_layer", "num_hidden_layers", 32),
            Field("n_head", "num_attention_heads", 71),
            Field("n_embd", "hidden_size", 4544),
            Field("n_inner", "ffn_hidden_size", None),
            Field("block_size", "max_position_embeddings", 2048),
            Field("vocab_size", "vocab_size", 65024),
            Field("layer_norm_epsilon", "layer_norm_epsilon", 1e-5),
            Field("activation", "activation", "gelu", GELU_NEW),
            Field("bias", "bias", False, {True: True, False: ("norm",)}),
            Field("tied_head", "tie_word_embeddings", True),
            Field("dropout", "hidden_dropout", 0.0),
            Field("attention_dropout", "attention_dropout", 0.0),
        ),
        constants={"embedding_dropout": 0.0},
        groups=(FALCON,),
        names=module_names(
            "transformer.", "h", wte="word_embeddings", qkv="self_attention.query_key_value",
            out="self_attention.dense", up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h",
        ),
        names_of=_falcon_norms,
        row_orders={"transformer.h.{}.self_attention.query_key_value": grouped_heads},
        aliases={"n_embed": "hidden_size"},
    ),
    Family(
        model_type="starcoder2",
        architecture="Starcoder2ForCausalLM",
        fields=(
            *with_defaults(
                SIZES, num_hidden_layers=30, num_attention_heads=24, num_key_value_heads=2, hidden_size=3072,
                intermediate_size=12288, max_position_embeddings=4096, vocab_size=49152, tie_word_embeddings=True,
            ),
            Field("head_dim", "head_dim", None),
            Field("layer_norm_epsilon", "norm_epsilon", 1e-5),
            Field("activation", "hidden_act", "gelu_pytorch_tanh", GELU_NEW),
            Field("bias", "use_bias", True, {True: True, False: ("norm",)}),
            Field("dropout", "residual_dropout", 0.0),
            Field("embedding_dropout", "embedding_dropout", 0.0),
            Field("attention_dropout", "attention_dropout", 0.0),
        ),
        groups=(ROPE, uniform_window_fields(None)),
        base="model.",
        names=module_names(
            "model.", "layers", wte="embed_tokens", ln_1="input_layernorm", qkv=qkv_names("self_attn"),
            out="self_attn.o_proj", ln_2="post_attention_layernorm", up="mlp.c_fc", down="mlp.c_proj", ln_f="norm",
        ),
    ),
    Family(
        model_type="stablelm",
        architecture="StableLmForCausalLM",
        fields=(
            *with_defaults(
                SIZES, num_key_value_heads=32, intermediate_size=6912, max_position_embeddings=4096, vocab_size=50304
            ),
            Field("layer_norm_epsilon", "layer_norm_eps", 1e-5),
            Field("activation", "hidden_act", "silu", GATES),
            Field("residual", "use_parallel_residual", False, {True: "parallel", False: "pre_norm"}),
            Field("bias", "use_qkv_bias", False, {True: ("qkv", "norm"), False: ("norm",)}),
            Field("dropout", "hidden_dropout", 0.0),
            Field("attention_dropout", "attention_dropout", 0.0),
        ),
        constants={"gated_mlp": True, "embedding_dropout": 0.0},
        fixed={"qk_layernorm": False},
        groups=(FieldGroup((*STABLELM_ROPE.names, "head_dim"), _read_stablelm, STABLELM_ROPE.write),),
        base="model.",
        names=module_names(
            "model.", "layers", wte="embed_tokens", ln_1="input_layernorm", qkv=qkv_names("self_attn"),
            out="self_attn.o_proj", ln_2="post_attention_layernorm", gate="mlp.gate_proj", up="mlp.up_proj",
            down="mlp.down_proj", ln_f="norm",
        ),
    ),
    Family(
        model_type="phi",
        architecture="PhiForCausalLM",
        fields=(
            *with_defaults(SIZES, num_hidden_layers=24, hidden_size=2048, intermediate_size=8192),
            Field("head_dim", "head_dim", None),
            Field("layer_norm_epsilon", "layer_norm_eps", 1e-5),
            Field("activation", "hidden_act", "gelu_new", GELU_NEW),
            *RATES,
        ),
        constants={"residual": "parallel", "head_bias": True},
        fixed={"qk_layernorm": False},
        groups=(PHI_ROPE,),
        base="model.",
        names=module_names(
            "model.", "layers", wte="embed_tokens", ln_1="input_layernorm", qkv=qkv_names("self_attn"),
            out="self_attn.dense", up="mlp.fc1", down="mlp.fc2", ln_f="final_layernorm",
        ),
    ),
    Family(
        model_type="phi3",
        architecture="Phi3ForCausalLM",
        fields=(
            *with_defaults(
                SIZES, hidden_size=3072, intermediate_size=8192, max_position_embeddings=4096, vocab_size=32064
            ),
            Field("head_dim", "head_dim", None),
            Field("layer_norm_epsilon", "rms_norm_eps", 1e-5),
            Field("activation", "hidden_act", "silu", GATES),
            *RATES,
        ),
        constants={"norm": "rms", "gated_mlp": True, "bias": False},
        groups=(FieldGroup(PHI_3_ROPE.names, _read_phi_3, _write_phi_3), uniform_window_fields(None)),
        base="model.",
        names=module_names(
            "model.", "layers", wte="embed_tokens", ln_1="input_layernorm", qkv="self_attn.qkv_proj",
            out="self_attn.o_proj", ln_2="post_attention_layernorm", gate="mlp.gate_up_proj", up="mlp.gate_up_proj",
            down="mlp.down_proj", ln_f="norm",
        ),
    ),
)
# fmt: on
