"""Manifests: a file beside other files that has the size and the digest of each of them.

    {"format": ..., "files": {"config.json": {"bytes": 512, "sha256": ...}, ...}, ..., "sha256": ...}

The last digest is of the manifest itself, so that every bit of a folder is covered. The digest of a safetensors file is
that of its header, which has the digest of each tensor: damage is found tensor by tensor. A text file that may change
later has its own digest in its last line, and null in the manifest: both could not be replaced in one move.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from peakgpt.engine.checkpoint.folder import read_json
from peakgpt.engine.checkpoint.safetensors_io import damaged_tensors, header_of
from peakgpt.kernels.files import write_atomically

MANIFEST = "manifest.json"
FORMAT = "peakgpt.manifest.1"
CHUNK_BYTES = 1 << 22  # of a file that is hashed
SEAL = "# sha256 of all lines above: "


def seal(text: str) -> str:
    """Return a text, of lines, with the line of its digest."""
    return f"{text}{SEAL}{hashlib.sha256(text.encode()).hexdigest()}\n"


def sealed_fault(path: Path) -> str | None:
    """Check the digest in the last line of a file. Return a sentence, or None."""
    text, _, digest = path.read_bytes().rpartition(SEAL.encode())
    if digest.decode(errors="replace") == f"{hashlib.sha256(text).hexdigest()}\n":
        return None
    return (
        f"{path}: got another digest than it was written with, expected the same: the file is damaged, or was edited; "
        "a resumed run takes changes by flags"
    )


def write_manifest(folder: Path, facts: Mapping[str, Any], sealed: Collection[str] = ()) -> None:
    """Write the manifest of all files in a folder and in its folders.

    Args:
        facts: further content, of integers, strings, None, lists and dicts.
        sealed: names of the files that have their own digest.
    Raises:
        OSError: a file cannot be read or written.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    files = {name: None if name in sealed else file_entry(path) for name, path in names.items()}
    content = {"format": FORMAT, **facts, "files": files}
    write_atomically(folder / MANIFEST, _text(content).encode())


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read a manifest.

    Raises:
        ValueError: it is missing or damaged.
    """
    path = folder / MANIFEST
    if not path.exists():
        raise ValueError(f"{folder}: got no {MANIFEST} in it, expected one")
    content = read_json(path)
    content.pop("sha256", None)
    # The text is compared too: other bits may have the same meaning in JSON.
    if content.get("format") != FORMAT or path.read_bytes() != _text(content).encode():
        raise ValueError(f"{path}: got another digest than it was written with: the file is damaged")
    return content


def _text(content: Mapping[str, Any]) -> str:
    """Return the JSON of a manifest with its digest, byte for byte the same for the same content."""
    sha256 = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps({**content, "sha256": sha256}, indent=1) + "\n"


def file_entry(path: Path) -> dict[str, Any]:
    """Return the size and the digest of a file.

    Raises:
        OSError: the file cannot be read.
    """
    is_tensors = path.suffix == ".safetensors"
    digest = hashlib.sha256(header_of(path)) if is_tensors else hash_start(path, path.stat().st_size)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def hash_start(path: Path, size: int) -> hashlib._Hash:
    """Return the SHA-256 of the first `size` bytes of a file.

    Raises:
        OSError: the file cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while size and (data := file.read(min(size, CHUNK_BYTES))):
            digest.update(data)
            size -= len(data)
    return digest


def file_fault(path: Path, expected: Mapping[str, Any] | None) -> str | None:
    """Compare a file with its entry, a safetensors file without its tensors. Return a sentence, or None."""
    if not path.is_file():
        return f"{path}: got no such file, expected the one that was written"
    try:
        if expected is None:
            return sealed_fault(path)
        got = file_entry(path)
    except OSError as error:
        return f"{path}: {error.strerror}, expected a readable file"
    for name in ("bytes", "sha256"):
        if got[name] != expected[name]:
            return f"{path}: {name} is {got[name]}, expected {expected[name]}: the file is damaged"
    return None


def expect_files(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Compare all files with a manifest, safetensors files without their tensors.

    Raises:
        ValueError: a file is missing or damaged.
    """
    for name, entry in manifest["files"].items():
        if fault := file_fault(folder / name, entry):
            raise ValueError(fault)


def faults(folder: Path) -> Iterator[str]:
    """Compare all files with the folder's manifest, all tensors included. Yield one sentence per fault."""
    try:
        manifest = read_manifest(folder)
    except ValueError as error:
        yield str(error)
        return
    for name, entry in manifest["files"].items():
        path = folder / name
        if fault := file_fault(path, entry):
            yield fault
        if path.suffix == ".safetensors" and path.is_file():
            yield from damaged_tensors(path)
