"""Documents of a data set of Hugging Face, read as a stream with the `datasets` package."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peakgpt.engine.data.documents import Document, ReadOptions, record_documents, refuse_tags, require

PREFIX = "hf:"
SAVED = ("state.json", "dataset_dict.json")  # a folder that `Dataset.save_to_disk` wrote has one of them


class HuggingFaceDataset:
    """One split of a data set: hf:NAME, hf:NAME:CONFIG or hf:NAME:CONFIG:SPLIT; NAME is one of the hub or a folder."""

    def __init__(self, name: str, options: ReadOptions):
        """
        Raises:
            ValueError: the name has another form, `datasets` is missing, or the data set cannot be read.
        """
        parts = name.removeprefix(PREFIX).split(":")
        if len(parts) > 3 or not parts[0]:
            raise ValueError(f"data set: got {name!r}, expected {PREFIX}NAME, {PREFIX}NAME:CONFIG or "
                             f"{PREFIX}NAME:CONFIG:SPLIT")  # fmt: skip
        refuse_tags(f"data set {name}", options)
        path, config, split = (*parts, "", "")[:3]
        self.name, self.options, self.places = name, options, (name,)
        self.rereadable = Path(path).is_dir()  # each reading of a data set of the hub downloads it
        with _readable(name):
            self._rows = _open(path, config or None, split or "train")

    def __iter__(self) -> Iterator[Document]:
        rows, number = iter(self._rows), 0
        while True:
            with _readable(self.name):
                row = next(rows, None)
            if row is None:
                break
            number += 1
            yield from record_documents(f"{self.name} row {number}", f"{self.name}:{number}", row, self.options)
        if not number:
            raise ValueError(f"data set {self.name}: got no rows, expected at least 1")


def _open(path: str, config: str | None, split: str) -> Any:
    """Return the rows of a split."""
    datasets = require("datasets")
    if not any(Path(path, file).is_file() for file in SAVED):
        return datasets.load_dataset(path, config, split=split, streaming=True)
    saved = datasets.load_from_disk(path)
    return saved[split] if isinstance(saved, dict) else saved


@contextlib.contextmanager
def _readable(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # `datasets` raises anything, also errors of the packages that it reads with
        reason = f"{type(error).__name__}: {error}".partition("\n")[0][:300]
        raise ValueError(f"data set {name}: got {reason}, expected one that `datasets` can load") from None
