"""The replacement class of each known module class. Keys are class paths, so that transformers is not imported."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peakgpt.dropin.class_swap import CONV1D, LINEAR, OUT_PROJ, Replacement
from peakgpt.dropin.replacements import attention, blocks, layers, lm_heads
from peakgpt.dropin.replacements.rotary_attention import (
    ByHeadAttention,
    FalconAttention,
    NormedAttention,
    NormedHeadsAttention,
    PackedAttention,
    RotaryAttention,
    TransposedNormsAttention,
)


@dataclass(frozen=True)
class Row:
    """How one module class is replaced.

    Args:
        replacement: the new class. None: the module is not replaced, and calls our attention function through the
            AttentionInterface of transformers.
        ops: names of the ops that it runs, for the report.
        options: names of submodules and other settings that the replacement reads.
        parts: names of submodules whose forward the replacement does not call.
    """

    replacement: type[Replacement] | None
    ops: str
    options: dict[str, Any] = field(default_factory=dict)
    parts: tuple[str, ...] = ()


INTERFACE = Row(None, "attention")


def _mlp(
    up: str, act: str, down: str, dropout: str | None = None, *, replacement: type[layers.BaseMLP] = layers.MLP,
    between: str | None = None, ops: str = "mlp",
) -> Row:  # fmt: skip
    options = {"up": up, "act": act, "down": down, "dropout": dropout, "between": between}
    return Row(replacement, ops, options, (up, act, down))


def _gated(gate: str, up: str, act: str, down: str, between: str | None = None) -> Row:
    options = {"gate": gate, "up": up, "act": act, "down": down, "dropout": None, "between": between}
    return Row(layers.GatedMLP, "gated_mlp", options, (gate, up, act, down))


def _layer(replacement: type[blocks.InlineMLPBlock], between: str | None = None) -> Row:
    options = {"up": "fc1", "act": "activation_fn", "down": "fc2", "dropout": None, "between": between}
    return Row(replacement, "mlp, add_layernorm", options, ("fc1", "activation_fn", "fc2"))


def _torch(replacement: type[layers.TorchBlock], dropout: str) -> Row:
    options = {"up": "linear1", "act": "activation", "down": "linear2", "dropout": dropout, "between": "dropout"}
    return Row(replacement, "mlp", options, ("linear1", "linear2"))


def _rms(eps: str = "variance_epsilon", offset: float = 0.0, replacement: type[layers.RMSNorm] = layers.RMSNorm) -> Row:
    return Row(replacement, "rmsnorm", {"eps": eps, "offset": offset})


def _rotary(
    replacement: type[RotaryAttention] = RotaryAttention, project: tuple[str, ...] = ("q_proj", "k_proj", "v_proj"),
    *, out: str = "o_proj", cache: str = "past_key_values", half_tables: bool = False, dropout: str | None = None,
    unsupported: tuple[str, ...] = (), **keywords: str,
) -> Row:  # fmt: skip
    options = {"project": project, "out": out, "cache": cache, "half_tables": half_tables, "dropout": dropout,
               "unsupported": unsupported, "keywords": keywords}  # fmt: skip
    return Row(replacement, "rotary, attention", options)


def _head(replacement: type[lm_heads.LanguageModel], ops: str, head: str) -> Row:
    return Row(replacement, ops, {"head": head}, (head,))


CAUSAL = _head(lm_heads.CausalLM, "linear_cross_entropy", "lm_head")
MASKED_OPS = "cross-entropy of the labelled positions"
CAPPED = _head(lm_heads.CappedLM, "linear_cross_entropy", "lm_head")
BERT_LAYER = _mlp(
    "intermediate.dense",
    "intermediate.intermediate_act_fn",
    "output.dense",
    "output.dropout",
    replacement=layers.BertLayer,
)
DROP_ADD_NORM = Row(layers.DropAddNorm, "add_layernorm")

LLAMA = {
    "RMSNorm": _rms(),
    "Attention": _rotary(),
    "MLP": _gated("gate_proj", "up_proj", "act_fn", "down_proj"),
    "ForCausalLM": CAUSAL,
}
NORMED_HEADS = {"Attention": _rotary(NormedHeadsAttention)}
NORMED = {"Attention": _rotary(NormedAttention)}
GEMMA = {"RMSNorm": _rms("eps", offset=1.0)}
# Modules of transformers: the prefix of their classes, and the suffixes whose rows differ from Llama's; None: no row.
LLAMA_LIKE: dict[str, tuple[str, dict[str, Row | None]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {}),
    "mixtral": ("Mixtral", {"MLP": None}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", NORMED_HEADS),
    "qwen3_moe": ("Qwen3Moe", NORMED_HEADS),
    "gemma": ("Gemma", GEMMA),
    "gemma2": ("Gemma2", {**GEMMA, "Attention": _rotary(softcap="attn_logit_softcapping"), "ForCausalLM": CAPPED}),
    "gemma3": ("Gemma3", {**GEMMA, "Attention": _rotary(TransposedNormsAttention), "ForCausalLM": CAPPED}),
    "smollm3": ("SmolLM3", {}),
    "olmo": (
        "Olmo",
        {
            "RMSNorm": None,
            "LayerNorm": Row(layers.BareLayerNorm, "layernorm"),
            "Attention": _rotary(unsupported=("config.clip_qkv",)),
        },
    ),
    "olmo2": ("Olmo2", NORMED),
    "olmo3": ("Olmo3", NORMED),
    "stablelm": ("StableLm", {"RMSNorm": None, "Attention": _rotary(unsupported=("qk_layernorm",))}),
    "starcoder2": (
        "Starcoder2",
        {
            "RMSNorm": None,
            "Attention": _rotary(dropout="residual_dropout"),
            "MLP": _mlp("c_fc", "act", "c_proj", "residual_dropout"),
        },
    ),
    "phi": (
        "Phi",
        {
            "RMSNorm": None,
            "Attention": _rotary(out="dense", unsupported=("qk_layernorm",)),
            "MLP": _mlp("fc1", "activation_fn", "fc2"),
        },
    ),
    "phi3": (
        "Phi3",
        {
            "Attention": _rotary(PackedAttention, ("qkv_proj",)),
            "MLP": _mlp(
                "gate_up_proj", "activation_fn", "down_proj", replacement=layers.PackedGatedMLP, ops="gated_mlp"
            ),
        },
    ),
    "gpt_oss": ("GptOss", {"MLP": None, "Attention": _rotary(half_tables=True, s_aux="sinks")}),
}
_LLAMA_LIKE = {
    f"transformers.models.{module}.modeling_{module}.{name}{suffix}": row
    for module, (name, others) in LLAMA_LIKE.items()
    for suffix, row in (LLAMA | others).items()
    if row is not None
}
_BERT_LIKE = {
    f"transformers.models.{module}.modeling_{module}.{name}{suffix}": row
    for module, name, head in (("bert", "Bert", "cls"), ("roberta", "Roberta", "lm_head"))
    for suffix, row in {
        "SelfAttention": INTERFACE,
        "CrossAttention": INTERFACE,
        "SelfOutput": DROP_ADD_NORM,
        "Layer": BERT_LAYER,
        "ForMaskedLM": _head(lm_heads.MaskedLM, MASKED_OPS, head),
    }.items()
}

_in = "transformers.models.{0}.modeling_{0}.{1}".format

KNOWN_CLASSES: dict[str, Row] = {
    LINEAR: Row(layers.Linear, "linear"),
    CONV1D: Row(layers.Linear, "linear"),
    OUT_PROJ: Row(layers.Linear, "linear"),
    "torch.nn.modules.normalization.LayerNorm": Row(layers.LayerNorm, "layernorm"),
    "torch.nn.modules.normalization.RMSNorm": _rms("eps", replacement=layers.TorchRMSNorm),
    "torch.nn.modules.transformer.TransformerEncoderLayer": _torch(layers.EncoderLayer, "dropout2"),
    "torch.nn.modules.transformer.TransformerDecoderLayer": _torch(layers.TorchBlock, "dropout3"),
    "torch.nn.modules.activation.MultiheadAttention": Row(attention.MultiheadAttention, "attention, linear"),
    _in("openai", "Attention"): Row(attention.OpenAIGPTAttention, "attention"),
    _in("openai", "MLP"): _mlp("c_fc", "act", "c_proj", "dropout"),
    _in("openai", "OpenAIGPTLMHeadModel"): CAUSAL,
    _in("gpt2", "GPT2Attention"): INTERFACE,
    _in("gpt2", "GPT2Block"): Row(blocks.GPT2Block, "add_layernorm"),
    _in("gpt2", "GPT2MLP"): _mlp("c_fc", "act", "c_proj", "dropout"),
    _in("gpt2", "GPT2LMHeadModel"): CAUSAL,
    _in("gpt_neo", "GPTNeoSelfAttention"): Row(attention.GPTJAttention, "attention"),
    _in("gpt_neo", "GPTNeoMLP"): _mlp("c_fc", "act", "c_proj", "dropout"),
    _in("gpt_neo", "GPTNeoForCausalLM"): CAUSAL,
    _in("gptj", "GPTJAttention"): Row(attention.GPTJAttention, "attention"),
    _in("gptj", "GPTJMLP"): _mlp("fc_in", "act", "fc_out", "dropout"),
    _in("gptj", "GPTJForCausalLM"): CAUSAL,
    _in("gpt_neox", "GPTNeoXAttention"): _rotary(
        ByHeadAttention, ("query_key_value",), out="dense", cache="layer_past"
    ),
    _in("gpt_neox", "GPTNeoXMLP"): _mlp("dense_h_to_4h", "act", "dense_4h_to_h"),
    _in("gpt_neox", "GPTNeoXForCausalLM"): CAUSAL,
    _in("opt", "OPTAttention"): INTERFACE,
    _in("opt", "OPTDecoderLayer"): _layer(blocks.OPTLayer),
    _in("opt", "OPTForCausalLM"): CAUSAL,
    _in("bloom", "BloomAttention"): Row(attention.BloomAttention, "attention"),
    _in("bloom", "BloomMLP"): _mlp("dense_h_to_4h", "gelu_impl", "dense_4h_to_h", replacement=layers.ResidualMLP),
    _in("bloom", "BloomForCausalLM"): CAUSAL,
    _in("codegen", "CodeGenAttention"): Row(attention.GPTJAttention, "attention"),
    _in("codegen", "CodeGenMLP"): _mlp("fc_in", "act", "fc_out", "dropout"),
    _in("codegen", "CodeGenForCausalLM"): CAUSAL,
    _in("gpt_bigcode", "GPTBigCodeAttention"): INTERFACE,
    _in("gpt_bigcode", "GPTBigCodeMLP"): _mlp("c_fc", "act", "c_proj", "dropout"),
    _in("gpt_bigcode", "GPTBigCodeForCausalLM"): CAUSAL,
    _in("falcon", "FalconLinear"): Row(layers.Linear, "linear"),
    _in("falcon", "FalconAttention"): Row(FalconAttention, "rotary, attention"),
    _in("falcon", "FalconMLP"): _mlp("dense_h_to_4h", "act", "dense_4h_to_h"),
    _in("falcon", "FalconForCausalLM"): CAUSAL,
    _in("mpt", "MptBlock"): Row(blocks.MptBlock, "add_layernorm"),
    _in("mpt", "MptAttention"): Row(attention.MptAttention, "attention"),
    _in("mpt", "MptMLP"): _mlp("up_proj", "act", "down_proj", replacement=layers.ResidualMLP),
    _in("mpt", "MptForCausalLM"): CAUSAL,
    _in("distilbert", "DistilBertSelfAttention"): INTERFACE,
    _in("distilbert", "FFN"): _mlp("lin1", "activation", "lin2", "dropout", replacement=layers.ChunkedMLP),
    _in("distilbert", "DistilBertForMaskedLM"): _head(lm_heads.MaskedLM, MASKED_OPS, "vocab_projector"),
    _in("bart", "BartAttention"): INTERFACE,
    _in("bart", "BartEncoderLayer"): _layer(blocks.BartLayer, "activation_dropout"),
    _in("bart", "BartDecoderLayer"): _layer(blocks.BartLayer, "activation_dropout"),
    _in("bart", "BartForCausalLM"): _head(lm_heads.AlignedLM, "linear_cross_entropy", "lm_head"),
    _in("bart", "BartForConditionalGeneration"): _head(lm_heads.BartLM, "linear_cross_entropy", "lm_head"),
    _in("t5", "T5Attention"): INTERFACE,
    _in("t5", "T5LayerNorm"): _rms(),
    _in("t5", "T5DenseActDense"): _mlp("wi", "act", "wo", between="dropout"),
    _in("t5", "T5DenseGatedActDense"): _gated("wi_0", "wi_1", "act", "wo", between="dropout"),
    _in("t5", "T5ForConditionalGeneration"): _head(lm_heads.Seq2SeqLM, "linear_cross_entropy", "lm_head"),
    **_LLAMA_LIKE,
    **_BERT_LIKE,
}
