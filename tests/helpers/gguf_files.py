"""Tiny models and .gguf files for the tests: one config of each architecture of llama.cpp that we have a row for."""

import torch
from tiny_tokenizers import BUILDERS

from peakgpt.engine.checkpoint.gguf.export import write_gguf
from peakgpt.engine.data.gguf_vocabulary import tokenizer_metadata
from peakgpt.engine.gpt import GPT
from peakgpt.engine.model.config import GPTConfig

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
TEMPLATES = {"default": "{{ messages[0].content }}", "rag": "{{ documents }}"}
SMALL = {"n_layer": 2, "n_head": 4, "n_embd": 64, "block_size": 64, "vocab_size": 384}
GATED = {"position": "rotary", "norm": "rms", "gated_mlp": True, "activation": "silu", "n_inner": 96, "n_kv_head": 2}
GEMMA = {**GATED, "bias": False, "activation": "gelu_tanh", "norm_offset": 1.0, "embedding_scale": 8.0}
CONFIGS = {
    "gpt2": {},
    "gpt2, own head": {"tied_head": False},
    "starcoder": {"n_kv_head": 1},
    "gptneox": {"position": "rotary", "rotary_dim": 4, "residual": "parallel_two_norms", "activation": "gelu_erf",
                "tied_head": False},
    "gptneox, serial": {"position": "rotary", "rotary_dim": 8, "activation": "gelu_erf", "tied_head": False},
    "bloom": {"position": "alibi", "embedding_norm": True},
    "mpt": {"position": "alibi", "activation": "gelu_erf", "bias": False},
    "falcon": {"position": "rotary", "residual": "parallel", "activation": "gelu_erf", "bias": ("norm",),
               "n_kv_head": 1},
    "falcon, two norms": {"position": "rotary", "residual": "parallel_two_norms", "activation": "gelu_erf",
                          "bias": ("norm",), "n_kv_head": 2},
    "phi2": {"position": "rotary", "rotary_dim": 8, "residual": "parallel", "tied_head": False, "head_bias": True},
    "starcoder2": {"position": "rotary", "n_kv_head": 2},
    "llama": {**GATED, "bias": False, "tied_head": False, "rotary_base": 500000.0},
    "llama, wide heads": {**GATED, "bias": False, "head_dim": 32, "layer_norm_epsilon": 1e-6},
    "llama, linear": {**GATED, "bias": False, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama, yarn": {**GATED, "bias": False, "rope_scaling": {"rope_type": "yarn", "factor": 4.0,
                    "original_max_position_embeddings": 16}},
    "llama, llama3": {**GATED, "bias": False, "rotary_base": 500000.0, "rope_scaling": {
                      "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                      "original_max_position_embeddings": 8192}},
    "phi3, longrope": {**GATED, "bias": False, "block_size": 4096, "rope_scaling": {
                       "rope_type": "longrope", "original_max_position_embeddings": 256, "attention_factor": 1.25,
                       "short_factor": [1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0],
                       "long_factor": [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 48.0, 64.0]}},
    "stablelm": {**GATED, "norm": "layer", "bias": ("norm",), "tied_head": False, "rotary_dim": 4},
    "stablelm, parallel": {**GATED, "norm": "layer", "bias": ("qkv", "norm"), "tied_head": False,
                           "residual": "parallel"},
    "smollm3": {**GATED, "bias": False, "n_layer": 4, "rotary_layers": (True, True, True, False)},
    "olmo": {**GATED, "bias": False, "norm": "layer", "norm_weight": False},
    "qwen3": {**GATED, "bias": False, "qk_norm": "head", "head_dim": 32},
    "gpt-oss": {**GATED, "bias": ("qkv", "out", "mlp"), "tied_head": False, "windows": (4, None), "experts": 4,
                "experts_per_token": 2, "experts_every": 1, "gated_experts": True, "activation": "clamped_swiglu",
                "attention_sinks": True, "router_bias": True, "balance_over": "model"},
    "olmo2": {**GATED, "bias": False, "qk_norm": "full", "residual": "output_norm", "tied_head": False},
    "olmo2, windows": {**GATED, "bias": False, "qk_norm": "full", "residual": "output_norm", "tied_head": False,
                       "n_layer": 4, "windows": (4, 4, 4, None), "rotary_base": 5e5, "local_rotary_base": 5e5,
                       "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    "gemma": {**GEMMA, "n_kv_head": 1, "head_dim": 32},
    "gemma2": {**GEMMA, "residual": "sandwich_norm", "windows": (4, None), "attention_softcap": 5.0,
               "logit_softcap": 3.0},
    "gemma3": {**GEMMA, "qk_norm": "head", "residual": "sandwich_norm", "n_layer": 7, "rotary_base": 1e6,
               "windows": (4, 4, 4, 4, 4, None), "local_rotary_base": 10000.0,
               "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    "qwen2": {**GATED, "bias": ("qkv",), "rotary_base": 1e6},
}  # fmt: skip


def build(name, **changes):
    """Return a random model whose logits differ clearly, so that greedy tokens have no ties."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SMALL, **CONFIGS[name], **changes})).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            is_norm = parameter.dim() == 1 and key.endswith("weight")
            parameter.normal_(1.0 - model.config.norm_offset if is_norm else 0.0, 0.15)
    return model


def export(model, path, dtype="f32", kind="byte_level", templates=TEMPLATES):
    """Write a model with a tiny tokenizer, or none."""
    metadata = None
    if kind is not None:
        metadata = tokenizer_metadata(BUILDERS[kind](), SPECIAL, templates, model.config.vocab_size)
    return write_gguf(path, model.config, model.state_dict(), metadata, dtype)
