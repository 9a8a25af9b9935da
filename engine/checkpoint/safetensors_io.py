"""Reading and writing safetensors files, with a digest per tensor that shows damage."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

DIGEST = "sha256"  # the metadata key of a tensor's digest is "sha256.<name>"; files of other libraries have none


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a file.

    Raises:
        ValueError: the file is missing, cut off, or a tensor does not have its digest.
    """
    from safetensors import safe_open

    _expect_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            tensors, metadata = {n: file.get_tensor(n) for n in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except Exception as error:  # damaged bytes raise any exception
        raise ValueError(f"{path}: {_truncation(path) or error}, expected a whole safetensors file") from None
    for name, tensor in tensors.items():
        expected = metadata.get(f"{DIGEST}.{name}")
        if expected is not None and (digest := _digest(tensor)) != expected:
            raise ValueError(f"{path}: {name} has digest {digest}, expected {expected}: the file is damaged")
    return tensors, metadata


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


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str], digests: Mapping[str, str] | None = None
) -> None:
    """Write a file of tensors and their digests.

    Args:
        digests: `tensor_digests` of the tensors, where they are known already.
    Raises:
        OSError: the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        path.touch()
        # The mode that the umask gives; safetensors makes the file readable by its owner only.
        mode = path.stat().st_mode
        contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        rows = {f"{DIGEST}.{name}": digest for name, digest in (digests or tensor_digests(contiguous)).items()}
        save_file(contiguous, path, {**metadata, **rows})
        path.chmod(mode)
    except SafetensorError as error:
        raise OSError(str(error)) from None


def tensor_digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the digest of each tensor that `write_safetensors` writes."""
    return {name: _digest(tensor.detach().contiguous()) for name, tensor in tensors.items()}


def _digest(tensor: Tensor) -> str:
    """Return 64 bits of the SHA-256 of a tensor's bytes, in hex: enough against damage, not against an attacker."""
    content = tensor.cpu().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(content).hexdigest()[:16]
