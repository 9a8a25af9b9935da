"""The replacement class of each known module class. Keys are class paths, so that transformers is not imported."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peakgpt.dropin.class_swap import CONV1D, LINEAR, OUT_PROJ, Replacement
from peakgpt.dropin.replacements import attention, blocks, layers, lm_heads


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
    between: str | None = None,
) -> Row:  # fmt: skip
    options = {"up": up, "act": act, "down": down, "dropout": dropout, "between": between}
    return Row(replacement, "mlp", options, (up, act, down))


def _gated(gate: str, up: str, act: str, down: str, between: str | None = None) -> Row:
    options = {"gate": gate, "up": up, "act": act, "down": down, "dropout": None, "between": between}
    return Row(layers.GatedMLP, "gated_mlp", options, (gate, up, act, down))


def _layer(replacement: type[blocks.InlineMLPBlock], between: str | None = None) -> Row:
    options = {"up": "fc1", "act": "activation_fn", "down": "fc2", "dropout": None, "between": between}
    return Row(replacement, "mlp, add_layernorm", options, ("fc1", "activation_fn", "fc2"))


def _torch(replacement: type[layers.TorchBlock], dropout: str) -> Row:
    options = {"up": "linear1", "act": "activation", "down": "linear2", "dropout": dropout, "between": "dropout"}
    return Row(replacement, "mlp", options, ("linear1", "linear2"))


def _rotary(project: tuple[str, ...], out: str, cache: str) -> Row:
    return Row(attention.RotaryAttention, "rotary, attention", {"project": project, "out": out, "cache": cache})


def _head(replacement: type[lm_heads.LanguageModel], ops: str, head: str) -> Row:
    return Row(replacement, ops, {"head": head}, (head,))


CAUSAL = _head(lm_heads.CausalLM, "linear_cross_entropy", "lm_head")
MASKED_OPS = "cross-entropy of the labelled positions"
RMSNORM = Row(layers.RMSNorm, "rmsnorm")
SEPARATE = _rotary(("q_proj", "k_proj", "v_proj"), "o_proj", "past_key_values")
BERT_LAYER = _mlp(
    "intermediate.dense",
    "intermediate.intermediate_act_fn",
    "output.dense",
    "output.dropout",
    replacement=layers.BertLayer,
)
DROP_ADD_NORM = Row(layers.DropAddNorm, "add_layernorm")

_LLAMA_LIKE = {
    f"transformers.models.{module}.modeling_{module}.{name}{suffix}": row
    for module, name in {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2"}.items()
    for suffix, row in {
        "RMSNorm": RMSNORM,
        "Attention": SEPARATE,
        "MLP": _gated("gate_proj", "up_proj", "act_fn", "down_proj"),
        "ForCausalLM": CAUSAL,
    }.items()
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
    "torch.nn.modules.normalization.RMSNorm": Row(layers.TorchRMSNorm, "rmsnorm"),
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
    _in("gpt_neox", "GPTNeoXAttention"): _rotary(("query_key_value",), "dense", "layer_past"),
    _in("gpt_neox", "GPTNeoXMLP"): _mlp("dense_h_to_4h", "act", "dense_4h_to_h"),
    _in("gpt_neox", "GPTNeoXForCausalLM"): CAUSAL,
    _in("opt", "OPTAttention"): INTERFACE,
    _in("opt", "OPTDecoderLayer"): _layer(blocks.OPTLayer),
    _in("opt", "OPTForCausalLM"): CAUSAL,
    _in("bloom", "BloomAttention"): Row(attention.BloomAttention, "attention"),
    _in("bloom", "BloomMLP"): _mlp("dense_h_to_4h", "gelu_impl", "dense_4h_to_h", replacement=layers.BloomMLP),
    _in("bloom", "BloomForCausalLM"): CAUSAL,
    _in("distilbert", "DistilBertSelfAttention"): INTERFACE,
    _in("distilbert", "FFN"): _mlp("lin1", "activation", "lin2", "dropout", replacement=layers.ChunkedMLP),
    _in("distilbert", "DistilBertForMaskedLM"): _head(lm_heads.MaskedLM, MASKED_OPS, "vocab_projector"),
    _in("bart", "BartAttention"): INTERFACE,
    _in("bart", "BartEncoderLayer"): _layer(blocks.BartLayer, "activation_dropout"),
    _in("bart", "BartDecoderLayer"): _layer(blocks.BartLayer, "activation_dropout"),
    _in("bart", "BartForCausalLM"): _head(lm_heads.AlignedLM, "linear_cross_entropy", "lm_head"),
    _in("bart", "BartForConditionalGeneration"): _head(lm_heads.BartLM, "linear_cross_entropy", "lm_head"),
    _in("t5", "T5Attention"): INTERFACE,
    _in("t5", "T5LayerNorm"): RMSNORM,
    _in("t5", "T5DenseActDense"): _mlp("wi", "act", "wo", between="dropout"),
    _in("t5", "T5DenseGatedActDense"): _gated("wi_0", "wi_1", "act", "wo", between="dropout"),
    _in("t5", "T5ForConditionalGeneration"): _head(lm_heads.Seq2SeqLM, "linear_cross_entropy", "lm_head"),
    **_LLAMA_LIKE,
    **_BERT_LIKE,
}
