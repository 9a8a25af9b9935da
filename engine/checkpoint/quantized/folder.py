"""Folders of quantized models: the family's config.json and tokenizer, with weights of 8 or 4 bits.

config.json has a `quantization_config` {"quant_method": "peakgpt", "bits", "group"}, and quantised.safetensors has the
tensors of `quantize_state`, under the model's own names. A model that was loaded from a .gguf file, GPTQ or AWQ weights
is stored as it is: then "layers" has the format of each quantized layer, instead of "bits" and "group", and the tensors
are those of `grouped_state`. The name is not model.safetensors, as in older folders:
transformers would open that file, not find its tensors, and continue with random weights.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peakgpt.engine.checkpoint.folder import CONFIG, QUANTIZATION, QUANTIZED, WEIGHTS, read_json, replace_files
from peakgpt.engine.checkpoint.manifest import MANIFEST
from peakgpt.engine.checkpoint.model_folder import warn_of_own_layout, write_description
from peakgpt.engine.checkpoint.quantized.grouped_state import Forms, grouped_shapes, grouped_state, load_grouped
from peakgpt.engine.checkpoint.quantized.packed_layers import AWQ, GPTQ, PackedFormat, packed_format
from peakgpt.engine.checkpoint.quantized.weights import load_quantized, quantized_shapes
from peakgpt.engine.checkpoint.safetensors_io import read_safetensors, write_safetensors
from peakgpt.engine.checkpoint.source_files import TokenizerFiles
from peakgpt.engine.data.tokenizer_names import CHAT_TEMPLATES
from peakgpt.engine.model.grouped_linear import GroupedFormat
from peakgpt.engine.model.quantized_linear import Format
from peakgpt.engine.model.state_dicts import stack_experts
from peakgpt.engine.model.transformer import Transformer
from peakgpt.kernels.strict_json import dumps

METHOD = "peakgpt"
WEIGHT_SUFFIXES = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")


def write_quantized(source: Path | str, folder: Path | str, state: Mapping[str, Tensor], form: Format) -> None:
    """Write a quantized model, with the tokenizer and other files of the float checkpoint.

    Args:
        source: the float checkpoint; all its files except the weights are copied. A link is copied as a file if it
            points into the folder or into the blobs of its Hugging Face cache, else left out with a warning.
        folder: created if missing; must be empty: a file in it may be the only copy.
        state: the result of `quantize_state`.
        form: format of the blocks' weights.
    Raises:
        OSError: the folder cannot be written; the old files are still there.
        ValueError: the folder is not empty.
    """
    if present := sorted(path.name for path in Path(folder).glob("*")):
        raise ValueError(f"quantize: OUT {folder} has {present[0]} already, expected a new or an empty folder")

    def fill(stage: Path) -> None:
        for file in (*Path(source).iterdir(), *Path(source, CHAT_TEMPLATES).glob("*.jinja")):
            if not file.is_file() or is_weights(file) or file.name == MANIFEST:
                continue
            if _belongs_to(file, Path(source).resolve()):
                target = stage / file.relative_to(source)
                target.parent.mkdir(exist_ok=True)
                shutil.copy(file, target)
            else:
                warnings.warn(f"quantize: {file} is a link out of its folder and is not copied", stacklevel=2)
        config = read_json(Path(source) / CONFIG)
        text = dumps({**config, QUANTIZATION: {"quant_method": METHOD, **asdict(form)}}, indent=2) + "\n"
        (stage / CONFIG).write_text(text, encoding="utf-8")
        write_safetensors(stage / QUANTIZED, state, {"format": "pt"})

    replace_files(Path(folder), fill)


def write_grouped(
    folder: Path | str, model: Transformer, tokenizer: TokenizerFiles | None,
    source_files: Mapping[str, Mapping[str, Any]], dtype: torch.dtype | None = None,
) -> None:  # fmt: skip
    """Write a model that has GroupedLinear layers, with the same bits.

    Args:
        folder: created if missing; an interrupted write keeps the old files.
        model, tokenizer, source_files: as in `write_model`.
        dtype: of tensors that are not quantized; None keeps it.
    Raises:
        OSError: the folder cannot be written.
    """
    warn_of_own_layout(folder, model.config)
    state, forms = grouped_state(model)
    own = {name for name in state if name.rpartition(".")[0] in forms and not name.endswith(".bias")}
    state = {name: tensor if name in own or dtype is None else tensor.to(dtype) for name, tensor in state.items()}
    quantization = {"quant_method": METHOD, "layers": {name: asdict(form) for name, form in forms.items()}}

    def fill(stage: Path) -> None:
        dtype = next(tensor.dtype for name, tensor in state.items() if name not in own)
        write_description(stage, model.config, dtype, tokenizer, source_files, {QUANTIZATION: quantization})
        write_safetensors(stage / QUANTIZED, state, {"format": "pt"})

    replace_files(Path(folder), fill)


def is_weights(path: Path) -> bool:
    """Whether a file has tensors of a model or of a training state, or is their index."""
    return path.name.lower().endswith(WEIGHT_SUFFIXES)


def _belongs_to(file: Path, folder: Path) -> bool:
    """Whether a file is in a folder or in the folder's Hugging Face cache: snapshots/<commit>/ links to blobs/."""
    return file.resolve().is_relative_to(folder) or file.resolve().parent == folder.parents[1] / "blobs"


def read_format(folder: Path | str) -> Format | Forms | PackedFormat | None:
    """Return the format of a folder's weights; None if they are not quantized.

    Raises:
        ValueError: config.json is missing or damaged, or has a quantization that we do not read.
    """
    path = Path(folder) / CONFIG
    quantization = read_json(path).get(QUANTIZATION)
    if quantization is None:
        return None
    is_object = isinstance(quantization, dict)
    method = quantization.get("quant_method") if is_object else quantization
    try:
        if is_object and method in (GPTQ, AWQ):
            return packed_format(quantization)
        if not is_object or method != METHOD:
            raise ValueError(f"{QUANTIZATION} has quant_method {method!r}, expected {METHOD!r} of `peakgpt quantize`, "
                             f"{GPTQ!r} or {AWQ!r}")  # fmt: skip
        fields = {name: value for name, value in quantization.items() if name != "quant_method"}
        if "layers" in fields:
            return {name: GroupedFormat(**form) for name, form in fields["layers"].items()}
        return Format(**fields)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def read_quantized(folder: Path | str, model: Transformer, form: Format | Forms, dtype: torch.dtype) -> Transformer:
    """Load a folder's weights into a model of the folder's config; see `load_quantized` and `load_grouped`.

    Args:
        model: on the meta device.
        form: from `read_format`.
        dtype: of tensors that are not quantized.
    Raises:
        ValueError: a file is damaged, or a tensor is missing, unexpected or of another shape.
    """
    path, older = (Path(folder) / name for name in (QUANTIZED, WEIGHTS))
    path = older if older.exists() and not path.exists() else path
    tensors = stack_experts(read_safetensors(path)[0])
    try:
        if isinstance(form, Format):
            _check(tensors, quantized_shapes(model.state_dict(), form))
            return load_quantized(model, tensors, form, dtype)
        sizes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        _check(tensors, grouped_shapes(sizes, form, tensors))
        return load_grouped(model, tensors, form, dtype)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _check(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[torch.Size, torch.dtype | None]]) -> None:
    got = {name: (t.shape, None if t.is_floating_point() else t.dtype) for name, t in tensors.items()}
    for name in sorted(expected.keys() | got.keys()):
        if got.get(name) != expected.get(name):
            got_text, expected_text = (
                "nothing" if kind is None else f"{kind[1] or 'floating point'} of shape {tuple(kind[0])}"
                for kind in (got.get(name), expected.get(name))
            )
            raise ValueError(f"{name} is {got_text}, expected {expected_text} as {CONFIG} says")
