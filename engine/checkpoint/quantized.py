"""Folders of quantized models: the family's config.json and other files, weights of 8 or 4 bits.

config.json has a `quantization_config` {"quant_method": "peakgpt", "bits", "group"}, quantised.safetensors the tensors,
by the model's own names: a quantized matrix W is W.q and W.scale as kernels/ops/quantize.py
stores them, others as before.
In a model.safetensors, which is read too, transformers would miss its tensors, and go on with random ones.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from peakgpt.engine.checkpoint import checkpoint
from peakgpt.engine.model.quantized import Format, quantized_shapes, restore

if TYPE_CHECKING:
    from peakgpt.engine.model.transformer import Transformer

METHOD = "peakgpt"
KEY = "quantization_config"  # where transformers looks too, and warns of a method that it does not know
WEIGHT_FILES = ("model", "pytorch_model", "quantised", "training_state")  # how their names begin


def write(source: Path | str, folder: Path | str, state: Mapping[str, Tensor], form: Format) -> None:
    """Write a quantized model beside the files of the checkpoint that it comes from.

    Args:
        source: whose config.json, tokenizer and other files but the weights are kept.
        folder: made where it is not there.
        state: the tensors of `quantize_state`.
        form: of the blocks' weights.
    Raises:
        OSError: the folder can not be written; what was there still is.
    """

    def fill(stage: Path) -> None:
        for file in Path(source).iterdir():
            if file.is_file() and not file.name.startswith(WEIGHT_FILES):
                shutil.copy(file, stage / file.name)
        config = checkpoint.read_json(Path(source) / checkpoint.CONFIG)
        text = json.dumps({**config, KEY: {"quant_method": METHOD, **asdict(form)}}, indent=2) + "\n"
        (stage / checkpoint.CONFIG).write_text(text, encoding="utf-8")
        checkpoint.write_safetensors(stage / checkpoint.QUANTIZED, state, {"format": "pt"})

    checkpoint.replace(Path(folder), fill)


def read_format(folder: Path | str) -> Format | None:
    """How a folder's weights are kept; None where they are plain.

    Raises:
        ValueError: no readable config.json, or a quantization that is not ours.
    """
    path = Path(folder) / checkpoint.CONFIG
    said = checkpoint.read_json(path).get(KEY)
    if said is None:
        return None
    if not isinstance(said, dict) or said.get("quant_method") != METHOD:
        raise ValueError(f"{path}: {KEY} is {said!r}, expected quant_method {METHOD!r} of `peakgpt quantize`")
    try:
        return Format(**{name: value for name, value in said.items() if name != "quant_method"})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def read(folder: Path | str, model: Transformer, form: Format, dtype: torch.dtype) -> Transformer:
    """Fill a model of the folder's config with its weights; see `restore`.

    Args:
        model: on the meta device.
    Raises:
        ValueError: a damaged file, or missing, extra or misshapen tensors.
    """
    path, older = (Path(folder) / name for name in (checkpoint.QUANTIZED, checkpoint.WEIGHTS))
    path = older if older.exists() and not path.exists() else path
    found, _ = checkpoint.read_safetensors(path)
    expected = quantized_shapes(model.state_dict(), form)
    got = {name: (t.shape, t.is_floating_point()) for name, t in found.items()}
    for name in sorted(expected.keys() | got.keys()):
        if got.get(name) != expected.get(name):
            said, wanted = (
                "nothing" if which is None else f"{'floating' if which[1] else 'integers'} of shape {tuple(which[0])}"
                for which in (got.get(name), expected.get(name))
            )
            raise ValueError(f"{path}: {name} is {said}, expected {wanted} as {checkpoint.CONFIG} says")
    return restore(model, found, form, dtype)
