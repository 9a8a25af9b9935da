"""The held-out sets of a run: those of its data, and sets that the user names."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from peakgpt.engine.data.dataset import TrainingData
from peakgpt.engine.data.shard_writer import write_shards
from peakgpt.engine.data.shards import TokenShards
from peakgpt.engine.data.text_file import read_text
from peakgpt.engine.data.tokenizer import Tokenizer
from peakgpt.engine.training.validation_config import HELD_OUT

PREFIX = "held_out_"  # of the streams in the run's token folder


def prepare_held_out(paths: Mapping[str, str], tokenizer: Tokenizer | None, folder: Path) -> None:
    """Encode the text files among the named sets into the token folder of a new run.

    Args:
        paths: of text files, or of folders with a prepared stream `validation`, by name.
        tokenizer: of the run; None for data that came without one.
        folder: gets the streams.
    Raises:
        ValueError: a file that is no text, or text without a tokenizer.
    """
    for name, path in paths.items():
        if Path(path).is_dir():
            continue
        if tokenizer is None:
            raise ValueError(f"validation_sets: {name}={path} is text, expected a folder of tokens: the run's data "
                             "have no tokenizer")  # fmt: skip
        if not (text := read_text(path)):
            raise ValueError(f"validation_sets: {name}={path} is empty, expected text")
        write_shards(
            folder, PREFIX + name, tokenizer.encode_documents([text]), tokenizer.vocab_size,
            text_bytes=len(text.encode()), corpus_digest=hashlib.sha256(text.encode()).hexdigest(),
        )  # fmt: skip


def held_out_sets(data: TrainingData, paths: Mapping[str, str], folder: Path) -> dict[str, TokenShards]:
    """Return all held-out sets of a run by name: first those of its data, then the named ones.

    Args:
        data: of the run.
        paths, folder: as for `prepare_held_out`.
    Raises:
        ValueError: a set is missing, damaged, has the tokens of another tokenizer, or a name that the data have.
    """
    own = data.validation
    sets = own if len(own) > 1 else dict(zip([HELD_OUT], own.values(), strict=True))
    for name, path in paths.items():
        if name in sets:
            raise ValueError(f"validation_sets: got {name}, expected a name that no data set of the run has")
        is_folder = Path(path).is_dir()
        shards = TokenShards.open(path, HELD_OUT) if is_folder else TokenShards.open(folder, PREFIX + name)
        train = data.datasets[0].train
        if shards.vocab_size != train.vocab_size or (is_folder and shards.tokenizer != train.tokenizer):
            raise ValueError(f"validation_sets: {name}={path} has tokens of another tokenizer than the run's data, "
                             "expected the same")  # fmt: skip
        sets[name] = shards
    return sets
