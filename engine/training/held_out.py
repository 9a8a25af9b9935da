"""The held-out sets of a run: the part that is split from its data, and sets that the user names."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from peakgpt.engine.data.shard_writer import write_shards
from peakgpt.engine.data.shards import TokenShards
from peakgpt.engine.data.text_file import read_text
from peakgpt.engine.data.tokenizer import Tokenizer
from peakgpt.engine.training.validation_config import HELD_OUT

PREFIX = "held_out_"  # of the streams in the run's token folder


def prepare_held_out(paths: Mapping[str, str], tokenizer: Tokenizer, folder: Path) -> None:
    """Encode the text files among the named sets into the token folder of a new run.

    Args:
        paths: of text files, or of folders with a prepared stream `validation`, by name.
        tokenizer: of the run.
        folder: gets the streams.
    Raises:
        ValueError: a file that is no text, or a folder without a stream of this tokenizer.
    """
    for name, path in paths.items():
        if Path(path).is_dir():
            _open_folder(name, path, tokenizer)  # raises now, not after the model is built
            continue
        if not (text := read_text(path)):
            raise ValueError(f"validation_sets: {name}={path} is empty, expected text")
        write_shards(
            folder, PREFIX + name, tokenizer.encode_documents([text]), tokenizer.vocab_size,
            text_bytes=len(text.encode()), corpus_digest=hashlib.sha256(text.encode()).hexdigest(),
        )  # fmt: skip


def open_held_out(paths: Mapping[str, str], tokenizer: Tokenizer, folder: Path) -> dict[str, TokenShards]:
    """Return the named sets of a run, in their order.

    Args:
        paths, tokenizer, folder: as for `prepare_held_out`.
    Raises:
        ValueError: a set is missing, damaged, or has the tokens of another tokenizer.
    """
    return {
        name: _open_folder(name, path, tokenizer) if Path(path).is_dir() else TokenShards.open(folder, PREFIX + name)
        for name, path in paths.items()
    }


def _open_folder(name: str, folder: str, tokenizer: Tokenizer) -> TokenShards:
    shards = TokenShards.open(folder, HELD_OUT)
    if shards.vocab_size != tokenizer.vocab_size:
        raise ValueError(
            f"validation_sets: {name}={folder} has tokens of a vocabulary of {shards.vocab_size}, expected "
            f"{tokenizer.vocab_size}, the tokenizer's"
        )
    return shards
