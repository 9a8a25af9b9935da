"""Writing models as .gguf files, which llama.cpp loads."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from peakgpt.engine.checkpoint.gguf.architecture import Architecture
from peakgpt.engine.checkpoint.gguf.architectures import ROWS
from peakgpt.engine.data.gguf_header import TYPES, GGUFHeader, TensorEntry
from peakgpt.engine.model.config import BIASED, GPTConfig
from peakgpt.engine.model.transformer import Transformer
from peakgpt.kernels.files import flush, make_folders, staging_folder

# --dtype -> ggml type of the matrices, and general.file_type (LlamaFileType of ggml).
DTYPES = {"f32": ("F32", 0), "f16": ("F16", 1), "bf16": ("BF16", 32), "q8_0": ("Q8_0", 7), "q4_0": ("Q4_0", 2)}
NUMBERS = {kind.name: number for number, kind in TYPES.items()}
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class _Rows(NamedTuple):
    """Rows [start, stop) of one of our tensors."""

    name: str
    start: int
    stop: int


def write_gguf(
    path: Path | str, config: GPTConfig, state: Mapping[str, Tensor], tokenizer: Mapping[str, Any] | None, dtype: str
) -> str:
    """Write a model.

    Vectors and the table of positions stay float32. A matrix whose rows do not consist of whole blocks is float16.

    Args:
        path: of a new file.
        config: of the model.
        state: its state dict; matrices are [out, in].
        tokenizer: metadata of the tokenizer, from `tokenizer_metadata`; None: the file has none.
        dtype: one of DTYPES, of the matrices.
    Returns:
        The architecture, by llama.cpp's name.
    Raises:
        OSError: the file cannot be written.
        ValueError: llama.cpp has no such model, a weight is not finite in this dtype, or gguf is not installed.
    """
    path = Path(path)
    if path.exists():
        raise ValueError(f"export: OUT {path} exists, expected a new file")
    gguf = import_gguf()
    architecture, stored, header = choose_architecture(config)
    sources = _sources(architecture, stored, header)
    types = {name: _type_of(name, entry.shape, dtype) for name, entry in header.tensors.items()}
    model = {"general.file_type": DTYPES[dtype][1], **architecture.metadata(stored)}
    model |= tokenizer or {"tokenizer.ggml.model": "none", f"{architecture.name}.vocab_size": config.vocab_size}
    make_folders(path.parent)
    with staging_folder(path.parent) as stage:
        writer = gguf.GGUFWriter(stage / path.name, architecture.name)
        _add_metadata(gguf, writer, model)
        for name, entry in header.tensors.items():
            kind = TYPES[NUMBERS[types[name]]]
            size = np.prod(entry.shape, dtype=np.int64).item() // kind.elements * kind.size
            writer.add_tensor_info(name, entry.shape, np.dtype("float32"), size, NUMBERS[kind.name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in _tensors(architecture, stored, sources, state):
            writer.write_tensor_data(_encode(gguf, name, tensor, types[name]))
        writer.close()
        flush(stage / path.name)
        os.rename(stage / path.name, path)
    flush(path.parent)
    return architecture.name


def import_gguf() -> Any:
    """Import the package `gguf`.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise ValueError(f"export: got {error}, expected the package gguf: pip install 'peakgpt[gguf]'") from None
    return gguf


def choose_architecture(config: GPTConfig) -> tuple[Architecture, GPTConfig, GGUFHeader]:
    """Return the first architecture that expresses a config, the config as it is stored, and metadata and shapes.

    Raises:
        ValueError: there is none; the message names what the nearest one lacks.
    """
    missing: dict[str, list[str]] = {}
    for architecture in ROWS:
        parts = tuple(part for part in BIASED if config.has_bias(part) or part in architecture.always_biased)
        try:
            stored = replace(config, bias=parts, head_bias=config.head_bias)
            header = _header(architecture, stored)
        except ValueError:  # a tensor that the architecture does not have
            continue
        missing[architecture.name] = architecture.differences(stored, header)
        if not missing[architecture.name]:
            return architecture, stored, header
    nearest = min(missing, key=lambda name: len(missing[name]), default=None)
    lacks = "" if nearest is None else f"; the nearest, {nearest}, lacks this {', '.join(missing[nearest])}"
    raise ValueError(f"export: got a model that no architecture of llama.cpp expresses, expected one of "
                     f"{', '.join(row.name for row in ROWS)}{lacks}")  # fmt: skip


def _header(architecture: Architecture, config: GPTConfig) -> GGUFHeader:
    with torch.device("meta"):
        ours = {name: tensor.shape for name, tensor in Transformer(config).state_dict().items()}
    shapes = architecture.shapes(config, ours)
    entries = {name: TensorEntry(shape, TYPES[0], 0, 0) for name, shape in shapes.items()}
    data = b""
    for name, tensor in architecture.extra_tensors(config).items():  # whose values say something about the config
        entries[name] = TensorEntry(tuple(tensor.shape), TYPES[0], len(data), len(data) + tensor.nbytes)
        data += tensor.numpy().tobytes()
    return GGUFHeader(Path(), architecture.metadata(config), entries, memoryview(bytearray(data)))


def _sources(architecture: Architecture, config: GPTConfig, header: GGUFHeader) -> dict[str, list[_Rows]]:
    """Return, for each tensor of the file, the rows of ours that it consists of."""
    with torch.device("meta"):
        ours = {name: tensor.shape for name, tensor in Transformer(config).state_dict().items()}
    found: dict[str, list[tuple[int, _Rows]]] = {name: [] for name in header.tensors}  # none for computed tensors
    for name, shape in ours.items():
        row = 0
        for part in architecture.parts(config, name, shape[0]):
            count = part.stop - part.start
            found[part.name].append((part.start, _Rows(name, row, row + count)))
            row += count
    return {name: [rows for _, rows in sorted(parts)] for name, parts in found.items()}


def _tensors(
    architecture: Architecture, config: GPTConfig, sources: Mapping[str, list[_Rows]], state: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Yield names and values of the file's tensors, one after the other; a bias that the model lacks is zero."""
    computed = architecture.extra_tensors(config)
    for name, parts in sources.items():
        rows = [computed[name]] if name in computed else []
        for ours, start, stop in parts:
            tensor = state.get(ours)
            tensor = torch.zeros(stop) if tensor is None else tensor.detach()
            rows.append(architecture.to_file(config, ours, tensor)[start:stop])
        yield name, rows[0] if len(rows) == 1 else torch.cat(rows)


def _type_of(name: str, shape: tuple[int, ...], dtype: str) -> str:
    kind = TYPES[NUMBERS[DTYPES[dtype][0]]]
    if len(shape) < 2 or name == "position_embd.weight" or name.endswith((".bias", "ffn_gate_inp.weight")):
        return "F32"
    return kind.name if shape[-1] % kind.elements == 0 else "F16"


def _encode(gguf: Any, name: str, tensor: Tensor, kind: str) -> np.ndarray:
    """Return the bytes of a tensor in a ggml type."""
    floats = tensor.to(_FLOATS.get(kind, torch.float32)).contiguous()
    if not floats.isfinite().all():
        raise ValueError(f"export: got numbers in {name} that are not finite as {kind}, expected finite ones")
    if kind in _FLOATS:
        return floats.view(torch.uint8).numpy()
    return gguf.quants.quantize(floats.numpy(), gguf.GGMLQuantizationType(NUMBERS[kind]))


def _add_metadata(gguf: Any, writer: Any, metadata: Mapping[str, Any]) -> None:
    kinds = gguf.GGUFValueType
    types = {bool: kinds.BOOL, int: kinds.UINT32, float: kinds.FLOAT32, str: kinds.STRING}
    item_types = {**types, int: kinds.INT32}  # of llama.cpp's arrays
    for key, value in metadata.items():
        if key == "general.architecture":  # the writer has added it
            continue
        if isinstance(value, list):
            writer.add_key_value(key, value, kinds.ARRAY, item_types[type(value[0])])
        else:
            writer.add_key_value(key, value, types[type(value)])
