"""What benchmarks of inference share: who takes part, and a state's weights as the models of several engines."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

from peakgpt.engine.gpt import GPT
from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.model.quantized import Format, quantize_state, restore
from peakgpt.engine.model.state_dicts import transpose_conv1d


@dataclass(frozen=True)
class Contender:
    """How a contender is built, the environment that its process starts with, and the package that it needs.

    `forms` are those of weights that it is measured in; `distribution` is the package's name where it is installed
    from, if that is another.
    """

    build: Callable
    environment: dict[str, str] = field(default_factory=dict)
    package: str = "torch"
    forms: tuple[str, ...] = ("float32", "bfloat16")
    distribution: str = ""

    @property
    def backend(self) -> str:
        return "auto" if isinstance(self.build, partial) else self.package

    @property
    def version(self) -> str:
        name = self.distribution or self.package
        return "" if name == "torch" else f"{name} {metadata.version(name)}"

    def expect_installed(self) -> None:
        """
        Raises:
            ModuleNotFoundError: it is not; says how to install it.
        """
        if importlib.util.find_spec(self.package) is None:
            name = self.distribution or self.package
            raise ModuleNotFoundError(f"not measured, {name} is not installed: pip install {name}")


def our_model(state: dict[str, Tensor], config: GPTConfig, form: str, group: int = 64) -> GPT:
    """The model of a state with weights in a form; what is not quantized is bfloat16 then."""
    if form in ("int8", "int4"):
        how = Format(8) if form == "int8" else Format(4, group)
        return restore(GPT(config), quantize_state(state, how), how, torch.bfloat16)
    model = GPT(config)
    model.load_state_dict(state, assign=True)
    return model.to(getattr(torch, form)).eval()


def transformers_model(state, config: GPTConfig, dtype: torch.dtype):
    """transformers' GPT-2."""
    from transformers import GPT2Config, GPT2LMHeadModel

    theirs = GPT2Config(
        vocab_size=config.vocab_size, n_positions=config.block_size, n_embd=config.n_embd, n_layer=config.n_layer,
        n_head=config.n_head, n_inner=config.n_inner, layer_norm_epsilon=config.layer_norm_epsilon,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(theirs)
    names = {name.removeprefix("transformer."): tensor for name, tensor in transpose_conv1d(state).items()}
    model.transformer.load_state_dict(names)
    return model.to(dtype).eval()


def ctranslate2_generator(state, config: GPTConfig, form: str):
    """By its own converter, from transformers' layout; a made-up vocabulary names each id."""
    import ctranslate2
    import tokenizers
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        transformers_model(state, config, torch.float32).save_pretrained(folder)
        library = tokenizers.Tokenizer(tokenizers.models.BPE({f"t{i}": i for i in range(config.vocab_size)}, []))
        marks = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "t0")
        transformers.PreTrainedTokenizerFast(tokenizer_object=library, **marks).save_pretrained(folder)
        made = str(Path(folder, "converted"))
        ctranslate2.converters.TransformersConverter(folder).convert(made)
        generator = ctranslate2.Generator(made, compute_type=form, inter_threads=1,
                                          intra_threads=torch.get_num_threads())  # fmt: skip
    return generator


def ctranslate2_prompts(ids: Tensor) -> list[list[str]]:
    """(B, T) as tokens of the made-up vocabulary."""
    return [[f"t{i}" for i in row] for row in ids.tolist()]
