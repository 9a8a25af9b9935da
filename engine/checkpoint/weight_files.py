"""The weight files of a model folder: safetensors or pytorch_model.bin, in one file or in shards with an index."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peakgpt.engine.checkpoint.folder import CONFIG, INDEX, PICKLE, PICKLE_INDEX, QUANTIZED, WEIGHTS, read_json
from peakgpt.engine.checkpoint.safetensors_io import read_names, read_safetensors

NUMBERED = {"layers": re.compile(r"^(?:[^.\d]+\.)*(\d+)\."), "experts": re.compile(r"\.experts\.(\d+)\.")}


def open_weights(folder: Path) -> tuple[Path, dict[str, Tensor], dict[str, Path]]:
    """Return the weights file or index, the tensors, and the shard of each tensor by name.

    Tensors of safetensors are maps of the file, which do not overlap. Tensors of a pickle may share memory.
    """
    for name, index, read in _FORMATS:
        if (path := folder / name).exists():
            return path, read(path), {}
        if (path := folder / index).exists():
            files = _weight_map(path)
            return path, _read_shards(folder, files, read), {name: folder / file for name, file in files.items()}
    raise ValueError(f"checkpoint {folder}: got no weights, expected {WEIGHTS}, {INDEX}, {PICKLE} or {PICKLE_INDEX}")


def _read_shards(folder: Path, files: Mapping[str, str], read: Read) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(files.values())):
        shard = read(folder / name)
        if repeated := sorted(tensors.keys() & shard.keys()):
            raise ValueError(f"{folder / name}: got tensor {repeated[0]} again, expected it in one shard")
        tensors |= shard
    return tensors


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        if not path.is_file():  # opening a pipe without a writer would block
            raise ValueError("got no regular file")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # damaged bytes raise any exception; torch's messages advise to trust the file
        raise ValueError(f"{path}: {type(error).__name__}, expected an undamaged file of tensors only") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: got a {type(content).__name__}, expected tensors by their names")
    for name, value in content.items():
        if not isinstance(name, str):
            raise ValueError(f"{path}: got the name {name!r:.80}, expected a string")
        if not isinstance(value, Tensor):
            raise ValueError(f"{path}: {name} is a {type(value).__name__}, expected a tensor")
        if value.layout != torch.strided or value.device.type != "cpu":
            raise ValueError(f"{path}: {name} is {value.layout} on {value.device}, expected a dense tensor with values")
    return content


def _read_mapped(path: Path) -> dict[str, Tensor]:
    return read_safetensors(path)[0]


Read = Callable[[Path], dict[str, Tensor]]
_FORMATS: tuple[tuple[str, str, Read], ...] = (
    (WEIGHTS, INDEX, _read_mapped), (PICKLE, PICKLE_INDEX, _read_pickle)
)  # fmt: skip


def expect_modules(folder: Path, config: Mapping[str, Any], counts: Mapping[str, str]) -> None:
    """Compare counts of modules in config.json with the tensor names in the weight files, before a module is built.

    A damaged count would otherwise build modules until the memory is full.

    Args:
        folder: a model folder.
        config: content of its config.json.
        counts: "layers" or "experts" -> field of config.json.
    Raises:
        ValueError: config.json has more modules than the weights, or a file is damaged.
    """
    listed = _weight_names(folder)
    for what, field in counts.items():
        value = config.get(field)
        if listed is None or not isinstance(value, int):
            continue
        path, names = listed
        found = {int(match[1]) for name in names if (match := NUMBERED[what].search(name))}
        if value > len(found) and (found or what != "experts"):  # experts may be stacked, which builds no modules
            raise ValueError(f"{path}: got {len(found)} {what}, expected {value} as {field} of {CONFIG} says")


def _weight_names(folder: Path) -> tuple[Path, list[str]] | None:
    """Return the file that lists the tensors of a folder, and their names, without reading them; None without one."""
    for name in (QUANTIZED, WEIGHTS):
        if (path := folder / name).exists():
            return path, read_names(path)
    if (path := folder / INDEX).exists():
        return path, [name for shard in sorted(set(_weight_map(path).values())) for name in read_names(folder / shard)]
    if (path := folder / PICKLE).exists():
        return path, list(_read_pickle(path))
    if (path := folder / PICKLE_INDEX).exists():
        return path, list(_weight_map(path))
    return None


def _weight_map(path: Path) -> dict[str, str]:
    """Return the file of each tensor, from an index of shards."""
    files = read_json(path).get("weight_map")
    shards = list(files.values()) if isinstance(files, dict) else []
    if not shards or any(not isinstance(name, str) or Path(name).name != name for name in shards):
        raise ValueError(f"{path}: got no weight_map to files of this folder, expected one")
    return files
