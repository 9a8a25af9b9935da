"""Random models as files, and how several engines load them.

`write_random_model` writes a folder of transformers' layout once for each case. Every contender loads this folder, or
converts it in the way of its users.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peakgpt.bench.contenders.contender import SEED
from peakgpt.engine.checkpoint.families.catalogue import OWN, family_of, nearest_family
from peakgpt.engine.checkpoint.folder import CONFIG, WEIGHTS
from peakgpt.engine.checkpoint.model_folder import to_layout
from peakgpt.engine.checkpoint.quantized.weights import load_quantized, quantize_state
from peakgpt.engine.gpt import GPT
from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.model.quantized_linear import Format
from peakgpt.kernels.strict_json import dumps

EMBEDDINGS = ("transformer.wte", "transformer.wpe")
STD = 0.02  # of embeddings and biases; much less than what the layers add, or a tied head repeats one token


def expect_family(config: GPTConfig) -> None:
    """
    Raises:
        ValueError: transformers has no family for the model, so no other engine can load it.
    """
    if family_of(config).model_type == OWN:
        name, missing = nearest_family(config)
        raise ValueError(f"bench: got a model that no family of transformers expresses, expected one that does; the "
                         f"nearest, {name}, lacks this {', '.join(missing)}")  # fmt: skip


def write_random_model(folder: Path, config: GPTConfig) -> None:
    """Write a folder of bfloat16 weights as transformers does, without the digests of our own files.

    Raises:
        ValueError: as `expect_family`.
    """
    from safetensors.torch import save_file

    expect_family(config)
    torch.manual_seed(SEED)
    with torch.device("meta"):
        shapes = GPT(config).state_dict()
    tensors = {name: t.contiguous() for name, t in to_layout(config, shapes.keys(), _random_state(shapes))}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    content = {**family_of(config).config_json(config), "dtype": "bfloat16"}
    (folder / CONFIG).write_text(dumps(content), encoding="utf-8")


def _random_state(shapes: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield bfloat16 tensors: weights of norms are 1, and layers keep the variance of their inputs."""
    for name, shape in shapes.items():
        values = torch.empty(shape.shape, dtype=torch.bfloat16)
        module, _, kind = name.rpartition(".")
        if kind == "weight" and shape.dim() == 1:
            yield name, values.fill_(1.0)
        else:
            is_layer = kind == "weight" and module not in EMBEDDINGS
            yield name, values.normal_(std=shape.shape[-1] ** -0.5 if is_layer else STD)


def random_prompts(config: GPTConfig, streams: int, tokens: int, seed: int = SEED) -> Tensor:
    """Return prompts (streams, tokens) int64, the same in each process."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (streams, tokens), generator=generator)


def our_model(folder: Path, weights: str, group: int = 64) -> GPT:
    """Load a folder with weights in one of WEIGHT_FORMATS.

    With int8 or int4 weights, all other tensors are bfloat16; `group` is the int4 group size.
    """
    if weights not in ("int8", "int4"):
        return GPT.from_pretrained(folder, dtype=getattr(torch, weights))
    quantization = Format(8) if weights == "int8" else Format(4, group)
    floats = GPT.from_pretrained(folder, dtype=torch.bfloat16)  # pages of the file, no copy
    state = quantize_state(floats.state_dict(), quantization)
    with torch.device("meta"):
        model = GPT(floats.config)
    return load_quantized(model, state, quantization, torch.bfloat16)


def float32_state(folder: Path) -> dict[str, Tensor]:
    """Return the weights of a folder under our names."""
    return GPT.from_pretrained(folder, dtype=torch.float32).state_dict()


def transformers_model(folder: Path, dtype: torch.dtype) -> Any:
    """Load a folder with transformers."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def computing_in_float32(model: nn.Module) -> nn.Module:
    """Let a bfloat16 model compute in float32: the weights of a module are float32 only while it runs.

    So the memory is that of bfloat16 and of one module, and the values are those of a float32 model with these weights.
    """

    def enter(module: nn.Module, inputs: Any) -> None:
        module.stored = {name: p.data for name, p in module._parameters.items() if p is not None}
        for name, data in module.stored.items():
            module._parameters[name].data = data.float()

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        for name, data in module.__dict__.pop("stored").items():
            module._parameters[name].data = data

    for module in model.modules():
        if module._parameters:
            module.register_forward_pre_hook(enter)
            module.register_forward_hook(leave)
    return model


def ctranslate2_generator(folder: Path, config: GPTConfig, weights: str) -> Any:
    """Convert the model of transformers by CTranslate2. The vocabulary is synthetic: token i is "t{i}"."""
    import ctranslate2
    import tokenizers
    import transformers

    with tempfile.TemporaryDirectory() as copy:
        transformers_model(folder, torch.float32).save_pretrained(copy)
        library = tokenizers.Tokenizer(tokenizers.models.BPE({f"t{i}": i for i in range(config.vocab_size)}, []))
        special_tokens = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "t0")
        transformers.PreTrainedTokenizerFast(tokenizer_object=library, **special_tokens).save_pretrained(copy)
        converted = str(Path(copy, "converted"))
        ctranslate2.converters.TransformersConverter(copy).convert(converted)
        generator = ctranslate2.Generator(converted, compute_type=weights, inter_threads=1,
                                          intra_threads=torch.get_num_threads())  # fmt: skip
    return generator


def ctranslate2_prompts(ids: Tensor) -> list[list[str]]:
    """Return ids (B, T) as tokens of the synthetic vocabulary."""
    return [[f"t{i}" for i in row] for row in ids.tolist()]
