"""Conversion of one GPT-2 state dict for several engines."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from peakgpt.engine.checkpoint.quantized.weights import load_quantized, quantize_state
from peakgpt.engine.gpt import GPT
from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.model.quantized_linear import Format
from peakgpt.engine.model.state_dicts import transpose_conv1d


def our_model(state: dict[str, Tensor], config: GPTConfig, weights: str, group: int = 64) -> GPT:
    """Return our model with weights in one of WEIGHT_FORMATS.

    With int8 or int4 weights, all other tensors are bfloat16; `group` is the int4 group size.
    """
    if weights in ("int8", "int4"):
        quantization = Format(8) if weights == "int8" else Format(4, group)
        return load_quantized(GPT(config), quantize_state(state, quantization), quantization, torch.bfloat16)
    model = GPT(config)
    model.load_state_dict(state, assign=True)
    return model.to(getattr(torch, weights)).eval()


def transformers_model(state, config: GPTConfig, dtype: torch.dtype):
    """Return transformers' GPT-2 with the weights of `state`."""
    from transformers import GPT2Config, GPT2LMHeadModel

    gpt2_config = GPT2Config(
        vocab_size=config.vocab_size, n_positions=config.block_size, n_embd=config.n_embd, n_layer=config.n_layer,
        n_head=config.n_head, n_inner=config.n_inner, layer_norm_epsilon=config.layer_norm_epsilon,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(gpt2_config)
    names = {name.removeprefix("transformer."): tensor for name, tensor in transpose_conv1d(state).items()}
    model.transformer.load_state_dict(names)
    return model.to(dtype).eval()


def ctranslate2_generator(state, config: GPTConfig, weights: str):
    """Convert the model of transformers by CTranslate2. The vocabulary is synthetic: token i is "t{i}"."""
    import ctranslate2
    import tokenizers
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        transformers_model(state, config, torch.float32).save_pretrained(folder)
        library = tokenizers.Tokenizer(tokenizers.models.BPE({f"t{i}": i for i in range(config.vocab_size)}, []))
        special_tokens = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "t0")
        transformers.PreTrainedTokenizerFast(tokenizer_object=library, **special_tokens).save_pretrained(folder)
        converted = str(Path(folder, "converted"))
        ctranslate2.converters.TransformersConverter(folder).convert(converted)
        generator = ctranslate2.Generator(converted, compute_type=weights, inter_threads=1,
                                          intra_threads=torch.get_num_threads())  # fmt: skip
    return generator


def ctranslate2_prompts(ids: Tensor) -> list[list[str]]:
    """Return ids (B, T) as tokens of the synthetic vocabulary."""
    return [[f"t{i}" for i in row] for row in ids.tolist()]
