"""The header of a .gguf file: metadata and the list of tensors.

    "GGUF", version, number of tensors, number of metadata entries
    entries     key, type of the value, value: a number, a bool, a string, or a flat array of them
    tensors     name, sizes with the innermost first, ggml type, offset
    padding to general.alignment, then the data of the tensors

A file comes from anywhere, so every count and size is compared with the bytes that are left before it is used: a header
that lies costs no memory, and nothing outside of the file is read. Format: docs/gguf.md of ggml.
"""

from __future__ import annotations

import math
import mmap
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from peakgpt.engine.data.text_file import open_file

SUFFIX = ".gguf"
TOKENIZER = "tokenizer.ggml."  # begins the keys of the tokenizer's metadata
VERSIONS = (2, 3)  # they differ for big-endian machines only; version 1 had counts of 32 bits
MAX_DIMENSIONS = 4
MAX_STRING_BYTES = 1 << 24  # the longest are chat templates
MAX_ITEMS = 1 << 24  # of an array; the largest vocabularies have 2^18 tokens
DEFAULT_ALIGNMENT = 32
FLOAT32, STRING, ARRAY = 6, 8, 9
_SIZE = struct.Struct("<Q")
SCALARS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8",
           12: "<f8"}  # fmt: skip


class BlockType(NamedTuple):
    """A ggml type: `elements` neighboring elements of a row are stored in `size` bytes."""

    name: str
    elements: int
    size: int


# GGML_QUANT_SIZES of gguf 0.19, constants.py.
TYPES = {
    0: BlockType("F32", 1, 4), 1: BlockType("F16", 1, 2), 30: BlockType("BF16", 1, 2),
    2: BlockType("Q4_0", 32, 18), 3: BlockType("Q4_1", 32, 20), 6: BlockType("Q5_0", 32, 22),
    7: BlockType("Q5_1", 32, 24), 8: BlockType("Q8_0", 32, 34),
    12: BlockType("Q4_K", 256, 144), 13: BlockType("Q5_K", 256, 176), 14: BlockType("Q6_K", 256, 210),
    39: BlockType("MXFP4", 32, 17),
}  # fmt: skip
OTHER_TYPES = {
    9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 40: "NVFP4",
}  # fmt: skip


class TensorEntry(NamedTuple):
    """A tensor: its shape with the outermost dimension first, and the bytes [start, end) of its data in a file."""

    shape: tuple[int, ...]
    type: BlockType
    start: int
    end: int
    file: int = 0  # of a model in several files


@dataclass(frozen=True)
class GGUFHeader:
    """The content of a header.

    Args:
        path: of the file.
        metadata: values by key; an array of numbers is a numpy array, an array of strings a list.
        tensors: by name.
        data: the bytes of the file, mapped; writing changes a copy of the page only.
        more: those of the other files of a model in several files.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorEntry]
    data: mmap.mmap | memoryview
    more: tuple[mmap.mmap | memoryview, ...] = ()

    def bytes_of(self, entry: TensorEntry) -> mmap.mmap | memoryview:
        """Return the bytes of the file that a tensor is in."""
        return (self.data, *self.more)[entry.file]

    def get(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """Return a value of the metadata.

        Args:
            kind: type that the value must have.
            default: returned if there is no such key.
        Raises:
            ValueError: the value has another type.
        """
        value = self.metadata.get(key)
        if value is None:
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
            raise ValueError(f"{self.path}: {key} is {str(value)!r:.80}, expected {names}")
        return value


def is_gguf(path: Path | str) -> bool:
    """Return whether a path names a .gguf file: by its suffix, whether or not it exists."""
    return Path(path).suffix.lower() == SUFFIX


def file_names(name: str) -> list[str]:
    """Return the names of the files of a model from that of the first: model-00001-of-00003.gguf has three.

    Any other name is returned alone.
    """
    match = re.fullmatch(rf"(.*)-00001-of-(\d{{5}})(\{SUFFIX})", name, re.ASCII | re.DOTALL)
    if match is None or int(match[2]) < 1:
        return [name]
    return [f"{match[1]}-{number:05d}-of-{match[2]}{match[3]}" for number in range(1, int(match[2]) + 1)]


def read_files(path: Path | str) -> GGUFHeader:
    """Read the header of a model, which may be in several files, as `llama-gguf-split` writes them.

    Args:
        path: the file, or the first of several.
    Returns:
        The metadata of this file, and the tensors of all files.
    Raises:
        ValueError: as `read_header`, or the files do not belong together.
    """
    path, header = Path(path), read_header(path)
    if (count := header.get("split.count", int, 1)) <= 1:
        return header
    number, names = header.get("split.no", int, 0), file_names(path.name)
    if number != 0 or len(names) != count:
        raise ValueError(f"{path}: got file {number + 1} of {count}, expected the first one under its name, such as "
                         f"model-00001-of-{count:05d}{SUFFIX}, with the others beside it")  # fmt: skip
    tensors, more = dict(header.tensors), []
    for index, name in enumerate(names[1:], 1):
        other = read_header(path.with_name(name))
        got = other.get("split.no", int), other.get("split.count", int)
        if got != (index, count) or (twice := tensors.keys() & other.tensors.keys()):
            wrong = f"split.no {got[0]} and split.count {got[1]}" if got != (index, count) else f"tensor {min(twice)!r}"
            raise ValueError(f"{other.path}: got {wrong}, expected file {index + 1} of {count}, with other tensors")
        tensors |= {name: entry._replace(file=index) for name, entry in other.tensors.items()}
        more.append(other.data)
    if len(tensors) != (total := header.get("split.tensors.count", int, len(tensors))):
        raise ValueError(f"{path}: got {len(tensors)} tensors in {count} files, expected {total}")
    return replace(header, tensors=tensors, more=tuple(more))


def read_header(path: Path | str) -> GGUFHeader:
    """Read and check the header of one file.

    Raises:
        ValueError: the file is missing, of another version, truncated, or its sizes contradict each other.
    """
    path = Path(path)
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size < 24:
                raise ValueError(f"got {size} bytes, expected a GGUF file")
            data = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
        reader = _Reader(data)
        tensor_count, entry_count = _counts(reader)
        metadata = _read_metadata(reader, entry_count)
        tensors = _read_tensors(reader, tensor_count, _alignment(metadata))
    except ValueError as error:
        message = str(error)
        raise ValueError(message if message.startswith(str(path)) else f"{path}: {message}") from None
    return GGUFHeader(path, metadata, tensors, data)


class _Reader:
    """Reads values one after the other, and refuses to pass the end of the file."""

    def __init__(self, data: mmap.mmap):
        self.data, self.at = data, 0

    def skip(self, count: int, what: str) -> int:
        """Move on by `count` bytes; return where they begin."""
        start = self.at
        if count > len(self.data) - start:
            raise ValueError(f"got {len(self.data) - start} bytes for {what} at byte {start}, expected {count}: the "
                             "file is truncated or damaged")  # fmt: skip
        self.at += count
        return start

    def number(self, kind: str, what: str) -> int | float | bool:
        """Read a number; `kind` is numpy's name of its type."""
        (value,) = self.numbers(kind, 1, what)
        return value.item()

    def numbers(self, kind: str, count: int, what: str) -> np.ndarray:
        """Read numbers, as a view of the file."""
        start = self.skip(count * np.dtype(kind).itemsize, what)
        return np.frombuffer(self.data, kind, count, start)

    def size(self, what: str) -> int:
        """Read an unsigned number of 64 bits."""
        return _SIZE.unpack_from(self.data, self.skip(8, what))[0]

    def string(self, what: str) -> str:
        """Read a length and a text in UTF-8."""
        length = self.size(f"the length of {what}")
        if length > MAX_STRING_BYTES:
            raise ValueError(f"got a length of {length} for {what}, expected at most {MAX_STRING_BYTES}")
        start = self.skip(length, what)
        try:
            return self.data[start : self.at].decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"got {what} at byte {start} with {error.reason}, expected UTF-8") from None

    def expect(self, count: int, least: int, what: str) -> None:
        """Raise an error unless `count` items of at least `least` bytes fit into the rest of the file."""
        if count * least > len(self.data) - self.at:
            raise ValueError(f"got a count of {count} {what} and {len(self.data) - self.at} bytes for them, expected "
                             f"at least {least} bytes each: the file is truncated or damaged")  # fmt: skip


def _counts(reader: _Reader) -> tuple[int, int]:
    """Read what precedes the metadata; return the numbers of tensors and of metadata entries."""
    magic = reader.data[reader.skip(4, "the magic number") : 4]
    if magic != b"GGUF":
        raise ValueError(f"got a file that begins with {magic!r}, expected b'GGUF'")
    version = reader.number("<u4", "the version")
    if version not in VERSIONS:
        order = ": the file is big-endian" if version & 0xFFFF == 0 and version else ""
        known = " or ".join(map(str, VERSIONS))
        raise ValueError(f"got GGUF version {version}{order}, expected {known}, little-endian")
    return reader.size("the number of tensors"), reader.size("the number of metadata entries")


def _read_metadata(reader: _Reader, count: int) -> dict[str, Any]:
    reader.expect(count, 8 + 4 + 1, "metadata entries")
    metadata: dict[str, Any] = {}
    for _ in range(count):
        key = reader.string("a metadata key")
        if key in metadata:
            raise ValueError(f"got the metadata key {key!r:.80} twice, expected it once")
        metadata[key] = _read_value(reader, reader.number("<u4", f"the type of {key:.80}"), key[:80])
    return metadata


def _read_value(reader: _Reader, kind: int, key: str) -> Any:
    if kind == STRING:
        return reader.string(key)
    if kind in SCALARS:
        value = _checked(reader.numbers(SCALARS[kind], 1, key), kind, key)[0]
        return float(str(value)) if kind == FLOAT32 else value.item()  # 1e-05, not 9.999999747378752e-06
    if kind != ARRAY:
        raise ValueError(f"got type {kind} for {key}, expected a GGUF value type from 0 to 12")
    kind, count = reader.number("<u4", f"the type of {key}"), reader.size(f"the length of {key}")
    if count > MAX_ITEMS:
        raise ValueError(f"got {count} items in {key}, expected at most {MAX_ITEMS}")
    if kind in SCALARS:
        return _checked(reader.numbers(SCALARS[kind], count, key), kind, key)
    if kind != STRING:
        raise ValueError(f"got an array of type {kind} for {key}, expected numbers or strings")
    reader.expect(count, 8, f"strings in {key}")
    return [reader.string(key) for _ in range(count)]


def _checked(values: np.ndarray, kind: int, key: str) -> np.ndarray:
    """Return numbers; if they are booleans, check for 0 and 1: another byte is neither True nor False."""
    if SCALARS[kind] == "?" and (values.view(np.uint8) > 1).any():
        raise ValueError(f"got a bool other than 0 and 1 in {key}, expected one of them")
    return values


def _alignment(metadata: Mapping[str, Any]) -> int:
    value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(value, int) or isinstance(value, bool) or value < 8 or value & (value - 1) or value > 1 << 20:
        raise ValueError(f"general.alignment is {str(value)!r:.80}, expected a power of two from 8 to 2^20")
    return value


def _read_tensors(reader: _Reader, count: int, alignment: int) -> dict[str, TensorEntry]:
    reader.expect(count, 8 + 4 + 8 + 4 + 8, "tensors")
    listed: dict[str, tuple[tuple[int, ...], BlockType, int]] = {}
    for _ in range(count):
        name = reader.string("a tensor's name")
        if name in listed:
            raise ValueError(f"got tensor {name!r:.80} twice, expected it once")
        listed[name] = _read_tensor(reader, f"tensor {name!r:.80}")
    begin = -(-reader.at // alignment) * alignment
    tensors = {}
    for name, (shape, kind, offset) in listed.items():
        end = offset + math.prod(shape) // kind.elements * kind.size
        if offset % alignment or begin + end > len(reader.data):
            raise ValueError(
                f"got tensor {name!r:.80} at bytes {offset} to {end} of the data, expected a multiple of {alignment}, "
                f"and an end up to {max(0, len(reader.data) - begin)}: the file is truncated or damaged"
            )
        tensors[name] = TensorEntry(shape, kind, begin + offset, begin + end)
    _expect_apart(tensors)
    return tensors


def _read_tensor(reader: _Reader, what: str) -> tuple[tuple[int, ...], BlockType, int]:
    """Read shape, type and offset of a tensor."""
    dimensions = reader.number("<u4", what)
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise ValueError(f"got {what} with {dimensions} dimensions, expected 1 to {MAX_DIMENSIONS}")
    shape = tuple(reader.size(what) for _ in range(dimensions))[::-1]
    number = reader.number("<u4", what)
    kind = TYPES.get(number)
    if kind is None:
        name = OTHER_TYPES.get(number, f"number {number}")
        raise ValueError(f"got {what} of type {name}, expected one of {', '.join(t.name for t in TYPES.values())}")
    if 0 in shape or shape[-1] % kind.elements:
        raise ValueError(f"got {what} of shape {shape}, expected rows of a multiple of {kind.elements} elements, as "
                         f"its type is {kind.name}")  # fmt: skip
    return shape, kind, reader.size(what)


def _expect_apart(tensors: Mapping[str, TensorEntry]) -> None:
    for first, second in pairwise(sorted(tensors, key=lambda name: tensors[name].start)):
        if tensors[first].end > tensors[second].start:
            raise ValueError(f"got tensors {first!r:.80} and {second!r:.80} that overlap, expected bytes of their own")
