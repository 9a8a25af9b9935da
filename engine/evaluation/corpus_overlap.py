"""Which examples of tasks occur in training corpora, by the runs of words of engine/data/contamination.py."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from peakgpt.engine.data.contamination import ContaminationCheck, ngram_size
from peakgpt.engine.data.documents import Document, ReadOptions
from peakgpt.engine.data.run_layout import RUN_CONFIG
from peakgpt.engine.data.sources import open_sources
from peakgpt.engine.data.token_documents import shard_folder, token_documents
from peakgpt.engine.data.words import words_of
from peakgpt.engine.training.run_file import read_run_file

Texts = Sequence[tuple[str, str]]  # (name, text) of each example


@dataclass(frozen=True)
class Overlap:
    """What a corpus has of the examples of a task.

    Args:
        statuses: "dirty", "clean", or "short" (too short to be compared), one for each example.
        ngram: words of the runs that were compared.
    """

    statuses: tuple[str, ...]
    ngram: int

    @property
    def counts(self) -> dict[str, int]:
        found = Counter(self.statuses)
        return {status: found[status] for status in ("dirty", "clean", "short")}


def find_overlaps(
    tasks: Sequence[Texts], corpus: Iterable[Document], report: Callable[[str], None] = lambda phase: None
) -> list[Overlap]:
    """Find the n-grams that the examples of several tasks share with a corpus. The corpus is read once.

    Args:
        report: called with what is compared now.
    """
    sizes = [ngram_size([len(words_of(text)) for _, text in texts]) for texts in tasks]
    checks = [_check(texts, size) for texts, size in zip(tasks, sizes, strict=True)]
    for number, document in enumerate(corpus if any(checks) else (), 1):
        report(f"comparing document {number}, {document.name}")
        for check in filter(None, checks):
            check.add(document)
    statuses = [tuple(example.status for example in check.finish()) if check else ("short",) * len(texts)
                for check, texts in zip(checks, tasks, strict=True)]  # fmt: skip
    return [Overlap(*row) for row in zip(statuses, sizes, strict=True)]


def _check(texts: Texts, size: int) -> ContaminationCheck | None:
    """Return the check of a task; None if all its examples are shorter than a run."""
    return ContaminationCheck(texts, size) if any(len(words_of(text)) >= size for _, text in texts) else None


def corpus_documents(names: Sequence[str], options: ReadOptions) -> Iterator[Document]:
    """Yield the documents of corpora: texts as in `peakgpt prepare`, folders that it wrote, or runs.

    Raises:
        ValueError: a source is missing; at the call, not at the first document.
    """
    shards = {name: folders for name in names if (folders := _shard_folders(Path(name)))}
    texts = [name for name in names if name not in shards]
    sources = open_sources(texts, options) if texts else []

    def documents() -> Iterator[Document]:
        for source in sources:
            yield from source
        for folders in shards.values():
            for folder in folders:
                yield from token_documents(folder)

    return documents()


def _shard_folders(path: Path) -> list[Path]:
    """Return the folders of token shards that a path means; none if it is text.

    The tokens of a run are in its own folder, or in the prepared folders that its config.toml names.
    """
    if folder := shard_folder(path):
        return [folder]
    is_run = (path / RUN_CONFIG).is_file()
    return [Path(name) for name in read_run_file(path)["dataset"] or ()] if is_run else []
