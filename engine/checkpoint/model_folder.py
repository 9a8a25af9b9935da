"""Model folders: models in the Hugging Face layout of their family.

A folder contains config.json and model.safetensors, or several shards and their index, as transformers' model of that
family writes and reads them. Reading also accepts pytorch_model.bin, names without the base model's prefix, and a
separate copy of a tied head.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peakgpt.engine.checkpoint.families.catalogue import OWN, family_of, known_family, nearest_family
from peakgpt.engine.checkpoint.families.family import Family
from peakgpt.engine.checkpoint.folder import (
    CONFIG,
    INDEX,
    PICKLE,
    PICKLE_INDEX,
    QUANTIZED,
    WEIGHTS,
    read_json,
    replace_files,
)
from peakgpt.engine.checkpoint.gguf.file import read_gguf
from peakgpt.engine.checkpoint.quantized.mxfp4 import NO_MXFP4, Mxfp4, mxfp4_tensors
from peakgpt.engine.checkpoint.safetensors_io import write_safetensors
from peakgpt.engine.checkpoint.source_files import (
    GENERATION_CONFIG,
    NO_FILES,
    TokenizerFiles,
    json_files,
    read_source_files,
)
from peakgpt.engine.checkpoint.tensor_check import check_tensors
from peakgpt.engine.checkpoint.weight_files import expect_modules, open_weights
from peakgpt.engine.data.adapter_source import ADAPTER_CONFIG, ADAPTER_WEIGHTS, base_of, is_adapter
from peakgpt.engine.data.gguf_header import is_gguf
from peakgpt.engine.data.hub import HubFiles
from peakgpt.engine.data.model_source import locate
from peakgpt.engine.data.tokenizer_names import TOKENIZER_FILES
from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.model.transformer import Transformer
from peakgpt.kernels.strict_json import dumps

__all__ = [
    "ADAPTER_FILES", "MODEL_FILES", "OpenWeights", "TokenizerFiles", "check_state", "open_layout", "read_config",
    "read_source_files", "read_weights", "to_layout", "warn_of_own_layout", "write_description", "write_model",
    "write_model_files",
]  # fmt: skip

# Files of a model of the hub. Weights in other formats are copies of the same values.
MODEL_FILES = HubFiles(
    (*TOKENIZER_FILES, GENERATION_CONFIG, ADAPTER_CONFIG),
    (
        (ADAPTER_WEIGHTS,), (WEIGHTS, INDEX, "model-*-of-*.safetensors", QUANTIZED),
        (PICKLE, PICKLE_INDEX, "pytorch_model-*-of-*.bin"),
    ),
)  # fmt: skip
ADAPTER_FILES = HubFiles((ADAPTER_CONFIG, ADAPTER_WEIGHTS))
NORM_OR_LAYER = re.compile(r"\.(ln_\w+|c_\w+)\.weight$")
# Suffixes of buffers that old releases of transformers wrote, and that no model needs.
OLD_BUFFERS = (
    ".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias", ".attn.causal_mask",
    ".rotary_emb.inv_freq",
)  # fmt: skip


def read_config(folder: Path | str, *, dropout: float | None = None) -> tuple[Family, GPTConfig]:
    """Read config.json, or the metadata of a .gguf file.

    Args:
        folder: a model folder, a .gguf file, or an adapter folder, for its base model.
        dropout: replaces the dropout rates of the file.
    Raises:
        ValueError: the folder or file is missing or damaged, or describes a model that peakgpt does not support.
    """
    folder = Path(folder)
    if is_gguf(folder):
        config = read_gguf(folder, dropout=dropout).config
        return family_of(config), config
    if not folder.is_dir():
        raise ValueError(f"checkpoint {folder}: got no such folder, expected one with {CONFIG} and {WEIGHTS}")
    if is_adapter(folder):
        base, revision = base_of(folder)
        return read_config(locate(base, MODEL_FILES, revision), dropout=dropout)
    path = folder / CONFIG
    content = read_json(path)
    try:
        family = known_family(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    expect_modules(folder, content, family.module_counts(content))
    try:
        return family, family.config(content, dropout=dropout)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


class OpenWeights(NamedTuple):
    """The weight files of a model folder, whose tensors are mapped.

    Args:
        path: the file, or the index of the shards.
        tensors: by the names of the family's layout.
        shards: shard of each tensor; {} if there is one file.
    """

    path: Path
    tensors: dict[str, Tensor]
    shards: dict[str, Path]


def open_layout(folder: Path | str, family: Family) -> OpenWeights:
    """Open the weight files of a model folder.

    Raises:
        ValueError: there are none, or one is damaged.
    """
    path, tensors, shards = open_weights(Path(folder))
    tensors, shards = family.standard_names(tensors), family.standard_names(shards)
    return OpenWeights(path, *family.separate_experts(tensors, shards))


def read_weights(
    opened: OpenWeights, family: Family, config: GPTConfig, expected: Mapping[str, torch.Size], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Read weights into the model's names and layout.

    Args:
        opened: from `open_layout`.
        family, config: from `read_config`.
        expected: names and shapes of the model's state dict; matrices are [out, in].
        dtype: to cast to.
    Returns:
        The model's state dict, contiguous. A tensor of a safetensors file that has the dtype and the order of the
        model already is mapped (safetensors_io.py); all others are copies.
    Raises:
        ValueError: a tensor is missing, unexpected, of another shape or not floating point.
    """
    path, shards, shapes = opened.path, opened.shards, family.shapes(config, expected)
    tensors = {name: t for name, t in opened.tensors.items() if name in shapes or not name.endswith(OLD_BUFFERS)}
    (head_name,) = family.layout_names(config, "lm_head.weight")
    head = tensors.pop(head_name, None) if config.tied_head else None
    if family.always_biased and config.bias is not True:
        tensors = {name: t for name, t in tensors.items() if name in shapes or not _is_zero_bias(name, t)}
    tensors = family.transposed(tensors)
    check_tensors(path, tensors, shapes, shards)
    (embedding_name,) = family.layout_names(config, "transformer.wte.weight")
    if head is not None and not torch.equal(head, tensors[embedding_name]):
        raise ValueError(f"{path}: {head_name} differs from {embedding_name}, expected a tied head")
    may_overlap = path.name in (PICKLE, PICKLE_INDEX)
    state = {}
    for name, shape in expected.items():
        tensor = family.from_layout(config, name, tensors)
        if may_overlap or tensor.dtype != dtype or not tensor.is_contiguous():
            tensor = torch.empty(shape, dtype=dtype).copy_(tensor)
        state[name] = tensor
    return state


def _is_zero_bias(name: str, tensor: Tensor) -> bool:
    return name.endswith(".bias") and not tensor.any()


def write_model(
    folder: Path | str,
    config: GPTConfig,
    state: Mapping[str, Tensor],
    tokenizer: TokenizerFiles | None = None,
    max_shard_size: int | str | None = None,
    source_files: Mapping[str, Mapping[str, Any]] = NO_FILES,
    mxfp4: Mapping[str, Mxfp4] = NO_MXFP4,
) -> None:
    """Write a model folder in the layout of the model's family, which transformers loads.

    A model that no family of transformers can express is written in peakgpt's own layout, with a warning.

    Args:
        folder: created if missing.
        config: of the model.
        state: the model's state dict; matrices are [out, in].
        tokenizer: written too.
        max_shard_size: in bytes, or a string such as "5GB". Larger weights are written as several files, none larger
            than this unless it contains a single tensor. None: one file.
        source_files: from `read_source_files` of the folder that the model was loaded from.
        mxfp4: weights that are not in the state, by their names in it.
    Raises:
        OSError: the folder cannot be written; the old checkpoint is still there.
        ValueError: max_shard_size is not a size, or the state has other tensors than a model of this config.
    """
    check_state(config, {**state, **mxfp4})
    max_bytes = None if max_shard_size is None else _parse_size(max_shard_size)
    warn_of_own_layout(folder, config)
    tensors = dict(to_layout(config, state.keys(), state.items(), source_files))
    tensors |= mxfp4_tensors(family_of(config, source_files.get(CONFIG)), config, mxfp4)
    replace_files(
        Path(folder), lambda stage: write_model_files(stage, config, tensors, tokenizer, source_files, max_bytes)
    )


def to_layout(
    config: GPTConfig, names: Collection[str], state: Iterable[tuple[str, Tensor]],
    source_files: Mapping[str, Mapping[str, Any]] = NO_FILES,
) -> Iterator[tuple[str, Tensor]]:  # fmt: skip
    """Convert a model's state dict to the layout of its family, one tensor after the other.

    Args:
        names: all names of the state dict.
        state: names and tensors; matrices are [out, in].
        source_files: as in `write_model`.
    Returns:
        An iterator of names and tensors of the layout. A tensor may be a view.
    """
    family = family_of(config, source_files.get(CONFIG))
    waiting: dict[str, Tensor] = {}  # tensors whose others in the same tensor of the layout have not come yet
    for name, tensor in state:
        waiting[name] = tensor
        merged = family.merged(name)
        if not all(other in waiting for other in merged):
            continue
        tensors = {other: waiting.pop(other) for other in merged}
        if family.always_biased and NORM_OR_LAYER.search(name) and (bias := f"{name[:-6]}bias") not in names:
            tensors[bias] = tensor.new_zeros(tensor.shape[0])
        yield from family.to_layout(config, tensors).items()


def write_model_files(
    folder: Path, config: GPTConfig, tensors: Mapping[str, Tensor], tokenizer: TokenizerFiles | None,
    source_files: Mapping[str, Mapping[str, Any]], max_bytes: int | None = None,
    fields: Mapping[str, Any] = NO_FILES,
) -> None:  # fmt: skip
    """Write the files of a model into an empty folder.

    Args:
        folder: not flushed to the disk.
        tensors: of `to_layout`.
        config, tokenizer, source_files, max_bytes: as in `write_model`.
        fields: of config.json, in addition to those of the model.
    Raises:
        OSError: a file cannot be written.
    """
    write_description(folder, config, next(iter(tensors.values())).dtype, tokenizer, source_files, fields)
    _write_shards(folder, _split_into_shards(tensors, max_bytes))


def write_description(
    folder: Path, config: GPTConfig, dtype: torch.dtype, tokenizer: TokenizerFiles | None,
    source_files: Mapping[str, Mapping[str, Any]], fields: Mapping[str, Any] = NO_FILES,
) -> None:  # fmt: skip
    """Write config.json, with further fields, and the other files that are no weights."""
    family = family_of(config, source_files.get(CONFIG))
    for name, content in json_files(family, config, dtype, tokenizer, source_files).items():
        content = {**content, **fields} if name == CONFIG else content
        (folder / name).write_text(dumps(content, indent=2) + "\n", encoding="utf-8")
    if tokenizer is not None:
        tokenizer.save(folder)


def warn_of_own_layout(folder: Path | str, config: GPTConfig) -> None:
    """Warn if transformers will not be able to read the model."""
    if family_of(config).model_type == OWN:
        name, missing = nearest_family(config)
        warnings.warn(
            f"checkpoint {folder}: no layout of transformers can express this model: the nearest, {name}, lacks "
            f"{', '.join(missing)}. It is written in peakgpt's own layout, which transformers cannot read.",
            stacklevel=4,
        )


def check_state(config: GPTConfig, state: Mapping[str, Tensor | Mxfp4]) -> None:
    """Check that a state dict has the tensors of a plain model: adapters, pruning and parametrizations rename them.

    Raises:
        ValueError: a tensor is missing, unexpected or of another shape.
    """
    with torch.device("meta"):
        expected = {name: tuple(t.shape) for name, t in Transformer(config).state_dict().items()}
    got = {name: tuple(t.shape) for name, t in state.items()}
    for name in sorted(got.keys() | expected.keys()):
        if got.get(name) != expected.get(name):
            shape, other = got.get(name, "missing"), expected.get(name, "no such tensor")
            raise ValueError(
                f"save_pretrained: {name} is {shape}, expected {other}: "
                "merge adapters (peft: merge_and_unload), and remove pruning and parametrizations, before saving"
            )


def _parse_size(size: int | str) -> int:
    """Return the bytes of a size as transformers writes it: a number, or a number with KB, MB or GB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMG]?)B?", str(size).upper())
    count = int(float(match[1]) * 1000 ** " KMG".index(match[2] or " ")) if match else 0
    if count < 1:
        expected = "a number of bytes, a string such as '5GB', or None"
        raise ValueError(f"save_pretrained: max_shard_size is {size!r}, expected {expected}")
    return count


def _split_into_shards(tensors: Mapping[str, Tensor], max_bytes: int | None) -> list[dict[str, Tensor]]:
    """Split the tensors, in their order, into parts of at most `max_bytes`, or of a single larger tensor."""
    parts: list[dict[str, Tensor]] = [{}]
    part_bytes = 0
    for name, tensor in tensors.items():
        if max_bytes is not None and parts[-1] and part_bytes + tensor.nbytes > max_bytes:
            parts.append({})
            part_bytes = 0
        parts[-1][name] = tensor
        part_bytes += tensor.nbytes
    return parts


def _write_shards(stage: Path, parts: list[dict[str, Tensor]]) -> None:
    """Write one file, or several with an index, under transformers' names."""
    if len(parts) == 1:
        write_safetensors(stage / WEIGHTS, parts[0], {"format": "pt"})
        return
    files = [f"model-{i:05d}-of-{len(parts):05d}.safetensors" for i in range(1, len(parts) + 1)]
    for file, part in zip(files, parts, strict=True):
        write_safetensors(stage / file, part, {"format": "pt"})
    weight_map = {name: file for file, part in zip(files, parts, strict=True) for name in part}
    total = sum(tensor.nbytes for part in parts for tensor in part.values())
    text = dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n"
    (stage / INDEX).write_text(text, encoding="utf-8")
