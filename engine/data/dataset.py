"""Prepared folders as training data: opened, checked, mixed, and recorded in the run that trains on them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peakgpt.engine.data.batches import Batches
from peakgpt.engine.data.corpus import Corpus, load_corpus
from peakgpt.engine.data.data_config import VOCAB, DataConfig
from peakgpt.engine.data.freed_memory import release_freed_memory
from peakgpt.engine.data.prepare import JOURNAL, Progress, prepare
from peakgpt.engine.data.shards import TokenShards
from peakgpt.engine.data.split import VALIDATION_SHARE
from peakgpt.engine.data.tokenizer import Tokenizer
from peakgpt.engine.data.tokenizer_names import TOKENIZER
from peakgpt.engine.data.tokenizer_training import train_tokenizer
from peakgpt.kernels.files import write_atomically
from peakgpt.kernels.strict_json import dumps

RECORD = "data.json"  # in a run's token folder: the digests of what it trains on
SAMPLE_BYTES = 32 << 20  # of text for the tokenizer: it is in memory, and takes half a minute to learn from


@dataclass(frozen=True)
class Dataset:
    """A folder that `prepare` wrote.

    Args:
        name: of the folder, for reports.
        train, validation: its streams.
        tokenizer: None for token files without one.
    """

    name: str
    train: TokenShards
    validation: TokenShards
    tokenizer: Tokenizer | None

    @classmethod
    def open(cls, folder: Path | str) -> Dataset:
        """Open a folder, and compare the digests of all its shards.

        Raises:
            ValueError: the folder is not complete, or a file in it was changed.
        """
        folder = Path(folder)
        if (folder / JOURNAL).exists():
            raise ValueError(f"data set {folder}: got a folder that is not complete, expected one whose `peakgpt "
                             "prepare` has ended")  # fmt: skip
        train, validation = (TokenShards.open(folder, name) for name in ("train", "validation"))
        tokenizer = Tokenizer.load(folder) if (folder / TOKENIZER).exists() else None
        dataset = cls(folder.resolve().name, train, validation, tokenizer)
        for shards in (train, validation):
            if shards.tokenizer is not None:
                dataset.check_tokenizer(tokenizer, shards)
        return dataset

    def check_tokenizer(self, tokenizer: Tokenizer | None, shards: TokenShards) -> None:
        """Raise ValueError if the shards were encoded with another tokenizer."""
        digest = None if tokenizer is None else tokenizer.digest
        if digest != shards.tokenizer:
            raise ValueError(f"data set {self.name}: got shards of tokenizer {(shards.tokenizer or 'none')[:12]} with "
                             f"tokenizer {(digest or 'none')[:12]}, expected the same")  # fmt: skip


@dataclass(frozen=True)
class TrainingData:
    """What a run trains on: one or more data sets, and their shares of the tokens seen."""

    datasets: Sequence[Dataset]
    weights: Sequence[float] | None = None

    @classmethod
    def open(cls, config: DataConfig, tokens: Path) -> TrainingData:
        """Open a run's data: its prepared folders, or the shards in its own token folder.

        The digests are written into `tokens` the first time, and compared with it afterwards.

        Args:
            tokens: the run's token folder.
        Raises:
            ValueError: a folder is damaged, was changed since the run began, or has the tokenizer of no other one.
        """
        folders = [tokens] if config.dataset is None else config.dataset
        paths = [Path(folder).resolve() for folder in folders]
        if twice := [path for path in paths if paths.count(path) > 1]:
            raise ValueError(f"data sets: got {twice[0]} twice, expected each folder once")
        data = cls([Dataset.open(folder) for folder in folders], config.dataset_weights)
        if len({dataset.train.tokenizer for dataset in data.datasets}) > 1:
            raise ValueError("data sets: got different tokenizers, expected one tokenizer for all")
        data.check_record(tokens / RECORD)
        return data

    def check_record(self, path: Path) -> None:
        """Write the digests of all streams to a file; if it exists, compare with it.

        Raises:
            ValueError: a stream has another digest than in the file.
        """
        digests = [{"train": d.train.digest, "validation": d.validation.digest} for d in self.datasets]
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, dumps(digests, indent=1).encode())
            return
        try:
            recorded: Any = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: got {error}, expected the digests of the run's data") from None
        if recorded != digests:
            raise ValueError(f"data sets {', '.join(d.name for d in self.datasets)}: got other shards than the run "
                             "began with, expected the same")  # fmt: skip

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self.datasets[0].tokenizer

    @property
    def vocab_size(self) -> int:
        """All ids are below it."""
        return max(dataset.train.vocab_size for dataset in self.datasets)

    @property
    def validation(self) -> dict[str, TokenShards]:
        """The validation stream of each data set, by its name; a second one of a name gets a number."""
        names = [dataset.name for dataset in self.datasets]
        unique = [name if names.index(name) == i else f"{name}-{i + 1}" for i, name in enumerate(names)]
        return dict(zip(unique, (dataset.validation for dataset in self.datasets), strict=True))

    def batches(self, batch: int, tokens: int, seed: int, *, mask_documents: bool = False) -> Batches:
        """Return the run's batches; see `Batches`.

        Raises:
            ValueError: mask_documents, and the data have no token that ends a document.
        """
        shards = [dataset.train for dataset in self.datasets]
        end_id = shards[0].end_id
        if mask_documents and end_id is None:
            raise ValueError("mask_documents: got data without the id that ends a document, expected one (--end-id of "
                             "`peakgpt prepare`)")  # fmt: skip
        document_token = end_id if mask_documents else None
        return Batches(shards, batch, tokens, seed, self.weights, document_token=document_token)

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raise ValueError if the data were encoded with another tokenizer, such as that of a checkpoint."""
        for dataset in self.datasets:
            dataset.check_tokenizer(tokenizer, dataset.train)


def open_text(config: DataConfig) -> Corpus:
    """Open the text of a run; see `load_corpus`."""
    share = VALIDATION_SHARE if config.validation_share is None else config.validation_share
    return load_corpus(config.text, validation=config.validation_text, share=share, options=config.options)


def tokenizer_for(
    corpus: Corpus, vocab: int | None = None, report: Callable[[str], None] | None = None
) -> Tokenizer:
    """Train a tokenizer on a sample of the training text.

    Raises:
        ValueError: vocab is out of range, or the corpus can be read once only.
    """
    if corpus.train.size_bytes is None:
        raise ValueError("corpus: got text that can be read once only, expected a tokenizer for it (--tokenizer)")
    tokenizer = train_tokenizer(corpus.train.sample(SAMPLE_BYTES), VOCAB if vocab is None else vocab, report=report)
    release_freed_memory()
    return tokenizer


def prepare_text(
    config: DataConfig, corpus: Corpus, tokenizer: Tokenizer | None, folder: Path, *,
    report: Callable[[str], None] | None = None, progress: Progress = lambda done_bytes, tokens: None,
) -> tuple[Tokenizer, TokenShards, TokenShards]:  # fmt: skip
    """Encode a run's text into a folder; train a tokenizer first if there is none.

    Returns:
        The tokenizer, and both streams.
    Raises:
        ValueError: as in `prepare`, or `vocab` is set and would be ignored.
    """
    if tokenizer is not None and config.vocab is not None:
        raise ValueError("vocab: got it with a tokenizer, expected one of them")
    tokenizer = tokenizer or tokenizer_for(corpus, config.vocab, report)
    return tokenizer, *prepare(corpus, tokenizer, folder, progress=progress)
