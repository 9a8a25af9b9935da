"""Read token files of nanoGPT and llm.c.

    nanoGPT   train.bin, val.bin: token ids as little-endian uint16, nothing else
    llm.c     *_train*.bin, *_val*.bin: 256 int32 (magic, version, number of tokens, zeros), then the ids

A meta.pkl beside them is never read: to unpickle a file runs code that is in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from peakgpt.engine.data.text_file import open_file

SUFFIX = ".bin"
BLOCK_TOKENS = 1 << 20
HEADER_BYTES = 256 * 4
# Magic number -> (version, ids). From karpathy/llm.c, dev/data/data_common.py.
HEADERS = {20240520: (1, np.dtype("<u2")), 20240801: (7, np.dtype("<u4"))}
_SPLIT = re.compile(r"(?:.*_)?(train|val)(?:_\d+)?\.bin")


@dataclass(frozen=True)
class TokenFile:
    """The ids of a file from position `start` to `end`."""

    path: Path
    dtype: np.dtype
    header_bytes: int
    start: int
    end: int

    @classmethod
    def open(cls, path: Path) -> TokenFile:
        """Read the header.

        Raises:
            ValueError: the file is unreadable, empty or truncated, or has another version.
        """
        try:
            with open_file(path) as file:
                head = file.read(HEADER_BYTES)
                size = file.seek(0, 2)
        except ValueError as error:
            raise ValueError(f"token file {error}") from None
        magic, version, count = np.frombuffer(head[:12], "<i4") if len(head) == HEADER_BYTES else (0, 0, 0)
        expected_version, dtype = HEADERS.get(int(magic), (None, np.dtype("<u2")))
        if expected_version is None:
            if not size or size % dtype.itemsize:
                raise ValueError(f"token file {path}: got {size} bytes, expected 2 for each token, at least 1 token")
            return cls(path, dtype, 0, 0, size // dtype.itemsize)
        if version != expected_version:
            raise ValueError(f"token file {path}: got version {version}, expected {expected_version}")
        if count < 1 or size != HEADER_BYTES + count * dtype.itemsize:
            raise ValueError(f"token file {path}: got {size} bytes, expected {HEADER_BYTES} and {dtype.itemsize} for "
                             f"each of {count} tokens")  # fmt: skip
        return cls(path, dtype, HEADER_BYTES, 0, int(count))

    def __len__(self) -> int:
        return self.end - self.start

    def blocks(self) -> Iterator[np.ndarray]:
        """Yield the ids in blocks; a block that starts at a multiple of BLOCK_TOKENS."""
        ids = np.memmap(self.path, self.dtype, "r", self.header_bytes)
        for start in range(self.start, self.end, BLOCK_TOKENS):
            yield np.array(ids[start : min(start + BLOCK_TOKENS, self.end)])


def is_token_source(path: Path) -> bool:
    """Return whether a path is a .bin file, or a folder with a training file of nanoGPT or llm.c."""
    if path.is_dir():
        return any(split == "train" for split, _ in _splits(path))
    return path.suffix == SUFFIX


def find_token_files(
    sources: Sequence[Path], validation: Sequence[Path] | None, share: float
) -> dict[str, list[TokenFile]]:
    """Return the files of the training and of the validation stream.

    Folders and files with "val" in their names keep their split, unless `validation` names other files. If there is no
    validation file, the end of the training files is for validation.

    Args:
        sources: .bin files and folders with them.
        validation: .bin files for validation; all files of `sources` are for training then.
        share: of the tokens, for validation, if no file is.
    Raises:
        ValueError: a file is damaged, or there are no tokens to train on.
    """
    found: dict[str, list[TokenFile]] = {"train": [], "validation": []}
    for split, path in (pair for source in sources for pair in _expand(source)):
        found["validation" if split == "val" and validation is None else "train"].append(TokenFile.open(path))
    for _, path in (pair for source in validation or () for pair in _expand(source)):
        found["validation"].append(TokenFile.open(path))
    paths = [file.path.absolute() for files in found.values() for file in files]
    if twice := sorted({path for path in paths if paths.count(path) > 1}):
        raise ValueError(f"token files: got {twice[0]} twice, expected each file once")
    if not found["train"]:
        raise ValueError(f"token files {', '.join(map(str, sources))}: got none to train on, expected some")
    return found if found["validation"] else _cut(found["train"], share)


def _expand(source: Path) -> list[tuple[str, Path]]:
    if source.is_dir():
        return _splits(source)
    match = _SPLIT.fullmatch(source.name)
    return [(match[1] if match else "train", source)]


def _splits(folder: Path) -> list[tuple[str, Path]]:
    """Return (split, path) of the token files in a folder, sorted by name."""
    matches = ((_SPLIT.fullmatch(path.name), path) for path in sorted(folder.iterdir()))
    return [(match[1], path) for match, path in matches if match]


def _cut(files: list[TokenFile], share: float) -> dict[str, list[TokenFile]]:
    """Cut a stream near the start of its validation share."""
    total = sum(map(len, files))
    if total < 2:
        raise ValueError(f"token files: got {total} token, expected at least 2 to split")
    cut, position = min(total - 1, max(1, int(total * (1 - share)))), 0
    parts: dict[str, list[TokenFile]] = {"train": [], "validation": []}
    for file in files:
        middle = min(len(file), max(0, cut - position))
        for split, part in (("train", replace(file, end=middle)), ("validation", replace(file, start=middle))):
            if len(part):
                parts[split].append(part)
        position += len(file)
    return parts
