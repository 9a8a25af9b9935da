"""Reading and writing safetensors files, with a digest per tensor that shows damage.

Reading maps a file into memory (mmap, private): a tensor is a view of the file's pages, which the system reads when
they are used. A page that the process writes to becomes its own copy; the file never changes. Replacing a file by a
rename, as `save_pretrained` and the hub's client do, leaves the mapped tensors as they are. Overwriting it in place
changes them, and cutting it off ends the process by SIGBUS at the next access, as with every library that maps files.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from peakgpt.kernels.files import write_all

DIGEST = "sha256"  # the metadata key of a tensor's digest is "sha256.<name>"; files of other libraries have none
DIGEST_LENGTH = 16  # hex digits
LENGTH_BYTES = 8  # of the header's length, at the start of the file
ALIGNMENT = 8  # of the first tensor
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.bool: "BOOL",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
DTYPE_OF = {name: dtype for dtype, name in DTYPES.items()}


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Map a file; return its tensors and its metadata. Tensors with a digest are read and compared, on all cores.

    Raises:
        ValueError: the file is missing, cut off, or a tensor does not have its digest.
    """
    from safetensors import safe_open

    _expect_file(path)
    try:
        with safe_open(path, framework="pt") as checked, path.open("rb") as file:
            tensors, metadata = _map_tensors(file), checked.metadata() or {}
    except Exception as error:  # damaged bytes raise any exception
        raise ValueError(f"{path}: {_truncation(path) or error}, expected a whole safetensors file") from None
    with ThreadPoolExecutor(torch.get_num_threads()) as hashers:
        for fault in hashers.map(lambda item: _digest_fault(*item, metadata), tensors.items()):
            if fault:
                raise ValueError(f"{path}: {fault}")
    return tensors, metadata


def _map_tensors(file: BinaryIO) -> dict[str, Tensor]:
    """Return the tensors of a file whose header the library has checked."""
    length = int.from_bytes(file.read(LENGTH_BYTES), "little")
    header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # lives as long as one of its tensors
    return {name: _map_tensor(memory, LENGTH_BYTES + length, name, entry) for name, entry in header.items()}


def _map_tensor(memory: mmap.mmap, start: int, name: str, entry: Mapping[str, Any]) -> Tensor:
    if (dtype := DTYPE_OF.get(entry["dtype"])) is None:
        raise ValueError(f"{name} has dtype {entry['dtype']}, expected one of {', '.join(DTYPE_OF)}")
    begin, end = (start + offset for offset in entry["data_offsets"])
    if begin == end:
        return torch.empty(entry["shape"], dtype=dtype)
    data = torch.frombuffer(memory, dtype=torch.uint8, count=end - begin, offset=begin)
    is_aligned = begin % dtype.itemsize == 0  # files of other libraries may have a header of any length
    return (data if is_aligned else data.clone()).view(dtype).view(entry["shape"])


def read_names(path: Path) -> list[str]:
    """Return the names of a file's tensors, without reading the tensors.

    Raises:
        ValueError: the file is missing or its header is damaged.
    """
    from safetensors import SafetensorError, safe_open

    _expect_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: {_truncation(path) or error}, expected a whole safetensors file") from None


def _expect_file(path: Path) -> None:
    if not path.is_file():  # opening a pipe without a writer would block
        raise ValueError(f"{path}: got no such file, expected a whole safetensors file")


def _truncation(path: Path) -> str | None:
    """Describe the first tensor that ends after the end of the file; None if there is none or no readable header."""
    try:
        with path.open("rb") as file:
            length, size = int.from_bytes(file.read(8), "little"), path.stat().st_size
            header = json.loads(file.read(min(length, size)))
        header.pop("__metadata__", None)
        ends = {name: 8 + length + entry["data_offsets"][1] for name, entry in header.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
        return None
    first = min(((end, name) for name, end in ends.items() if end > size), default=None)
    return None if first is None else f"got {size} bytes, but {first[1]} ends at byte {first[0]}"


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file of tensors and their digests.

    A second thread computes the digests while this one writes, and the header with the digests is written last. The
    library's writer needs them first, which takes 1.6 x the time.

    Raises:
        OSError: the file cannot be written.
    """
    # The widest dtype first, as the library does: every tensor is aligned.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    content = {name: tensor_bytes(tensors[name]) for name in names}
    no_digests = dict.fromkeys(names, "0" * DIGEST_LENGTH)
    start = len(_header(tensors, content, metadata, no_digests))
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        with ThreadPoolExecutor(1) as hasher:
            digests = hasher.map(_digest, content.values())
            os.lseek(handle, start, os.SEEK_SET)
            for data in content.values():
                write_all(handle, data)
            os.fsync(handle)
            header = _header(tensors, content, metadata, dict(zip(names, digests, strict=True)))
        os.lseek(handle, 0, os.SEEK_SET)
        write_all(handle, header)
    finally:
        os.close(handle)


def _header(
    tensors: Mapping[str, Tensor], content: Mapping[str, np.ndarray], metadata: Mapping[str, str],
    digests: Mapping[str, str],
) -> bytes:  # fmt: skip
    """Return the length and the JSON that a safetensors file begins with; `content` has the order of the tensors."""
    ends = list(accumulate(len(data) for data in content.values()))
    rows = {
        name: {"dtype": DTYPES[tensors[name].dtype], "shape": list(tensors[name].shape), "data_offsets": [start, end]}
        for name, start, end in zip(content, [0, *ends], ends, strict=False)
    }
    own = {**metadata, **{f"{DIGEST}.{name}": digest for name, digest in digests.items()}}
    text = json.dumps({"__metadata__": own, **rows}, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def header_of(path: Path) -> bytes:
    """Return the header of a file, which has the digests of all tensors.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        length = file.read(LENGTH_BYTES)
        return length + file.read(min(int.from_bytes(length, "little"), path.stat().st_size))


def damaged_tensors(path: Path) -> Iterator[str]:
    """Read a file tensor by tensor, and yield one sentence per fault."""
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            for name in file.keys():  # noqa: SIM118
                if fault := _digest_fault(name, file.get_tensor(name), metadata):
                    yield f"{path}: {fault}"
    except Exception as error:  # damaged bytes raise any exception
        yield f"{path}: {_truncation(path) or error}, expected a whole safetensors file"


def _digest_fault(name: str, tensor: Tensor, metadata: Mapping[str, str]) -> str | None:
    """Describe a tensor that does not have its digest; None if it has, or if the file has none for it."""
    expected = metadata.get(f"{DIGEST}.{name}")
    if expected is None or (digest := _digest(tensor_bytes(tensor))) == expected:
        return None
    return f"{name} has digest {digest}, expected {expected}: the file is damaged"


def tensor_bytes(tensor: Tensor) -> np.ndarray:
    """Return the bytes of a tensor in the order of its elements: its memory, or a copy if that has another order."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _digest(data: np.ndarray) -> str:
    """Return 64 bits of the SHA-256 of a tensor's bytes, in hex: enough against damage, not against an attacker."""
    return hashlib.sha256(data).hexdigest()[:DIGEST_LENGTH]
