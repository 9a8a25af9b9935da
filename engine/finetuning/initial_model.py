"""The GPT that a run of fine-tuning begins with: a checkpoint, all of it trained, or frozen below an adapter."""

from __future__ import annotations

from pathlib import Path

import torch

from peakgpt.engine.checkpoint.model_folder import MODEL_FILES, read_source_files
from peakgpt.engine.checkpoint.quantized.folder import is_weights
from peakgpt.engine.data.adapter_source import base_of, is_adapter
from peakgpt.engine.data.model_source import locate
from peakgpt.engine.data.run_layout import saved_steps, step_folder
from peakgpt.engine.finetuning.config import FinetuneConfig
from peakgpt.engine.gpt import GPT
from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.training.memory_estimate import AdapterSizes
from peakgpt.engine.training.run_settings import expect_weights_of


def initial_model(config: FinetuneConfig) -> GPT:
    """Return the checkpoint's model, with the rates of the run. Its weights are copies: the files may change.

    Raises:
        ValueError: no checkpoint, or one that cannot be trained in this way.
    """
    if config.lora.adapter is not None:
        return _adapted(config, config.task.init, None)
    source = GPT.from_pretrained(config.task.init, dequantize=True, merge_adapter=True)
    expect_weights_of(config.model_config(), source.config, config.task.init)
    model = empty_model(config)
    model.load_state_dict(source.state_dict())
    model.source_files = source.source_files
    return model


def resumed_model(config: FinetuneConfig, run: Path) -> GPT:
    """Return the model of a run that goes on, to which its checkpoint gives the weights that train.

    An adapter's base model is that of its first step: the newest checkpoint of a run `init` may be another one now.

    Args:
        run: its folder.
    """
    steps = saved_steps(run)
    if not steps:
        return initial_model(config)
    if config.lora.adapter is None:
        return empty_model(config)
    folders = [folder for step in reversed(steps) if is_adapter(folder := step_folder(run, step))]
    return _adapted(config, *(base_of(folders[0]) if folders else (config.task.init, None)))


def adapter_sizes(config: FinetuneConfig) -> AdapterSizes | None:
    """Return the sizes of a run's adapter and of its base model; None if all weights train.

    Raises:
        ValueError: the adapter does not fit the checkpoint.
    """
    if config.lora.adapter is None:
        return None
    folder = locate(config.task.init, MODEL_FILES)
    files = [folder] if folder.is_file() else [file for file in folder.iterdir() if is_weights(file)]
    with torch.device("meta"):
        model = GPT(config.model_config())
    model.source_files = {} if folder.is_file() else read_source_files(folder)
    frozen = sum(parameter.numel() for parameter in model.parameters()) * config.train.dtype.itemsize
    model.add_adapter(config.lora.adapter)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    # Quantized weights are about as large in memory as in their file, others as the dtype says.
    return AdapterSizes(trained, min(frozen, sum(file.stat().st_size for file in files)))


def empty_model(config: FinetuneConfig) -> GPT:
    """Return the model with random weights; the seed is also that of dropout."""
    torch.manual_seed(config.train.seed)
    return GPT(config.model_config())


def _adapted(config: FinetuneConfig, base: str, revision: str | None) -> GPT:
    """Return a model with a new adapter. Quantized weights stay quantized."""
    if is_adapter(folder := locate(base, MODEL_FILES, revision)):
        raise ValueError(f"init is {folder}, an adapter, expected a model with lora_rank: write the merged one with "
                         "`peakgpt export --format safetensors`")  # fmt: skip
    model = GPT.from_pretrained(base, dtype=config.train.dtype, revision=revision)
    expect_weights_of(config.model_config(), model.config, base)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # it may be a map of the file
    set_training_fields(model, config.model_config())
    torch.manual_seed(config.train.seed)
    model.add_adapter(config.lora.adapter)
    return model.train()


def set_training_fields(model: GPT, config: GPTConfig) -> None:
    """Give a model a config that differs in what only training reads: rates and penalties."""
    model.config = config
    for block in model.transformer.h:
        block.dropout, block.attn.dropout = config.dropout, config.attention_dropout
