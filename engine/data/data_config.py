"""What a run trains on: text, which is encoded at its start, or prepared folders."""

from __future__ import annotations

from dataclasses import dataclass

from peakgpt.engine.data.documents import ERRORS, ReadOptions
from peakgpt.engine.data.split import VALIDATION_SHARE
from peakgpt.engine.settings.setting import check_settings, is_data_path, setting

VOCAB = 4096
TEXT = {"dataset": (None,)}  # what a setting of text acts with


@dataclass(kw_only=True, frozen=True)
class DataConfig:
    """The settings of a run's data. What a setting of text is if it is None, `automatic` says.

    Raises:
        ValueError: a value is out of range.
    """

    text: tuple[str, ...] | None = setting(
        None, "text to train on: files, folders, or hf:NAME of a Hugging Face data set", section="data",
        metavar="SOURCE", automatic="Python's library", is_path=is_data_path, only_with=TEXT,
    )  # fmt: skip
    dataset: tuple[str, ...] | None = setting(
        None, "folders that `peakgpt prepare` wrote, to train on without encoding", section="data", metavar="FOLDER",
        is_path=is_data_path,
    )  # fmt: skip
    dataset_weights: tuple[float, ...] | None = setting(
        None, "share of the tokens seen of each --dataset", section="data", above=0, metavar="WEIGHT",
        automatic="their sizes", only_with={"dataset": None},
    )  # fmt: skip
    vocab: int | None = setting(
        None, "vocabulary size of the tokenizer that is trained", section="data", at_least=1, automatic=str(VOCAB),
        only_with=TEXT,
    )  # fmt: skip
    field: str | None = setting(
        None, "JSON field or Parquet column of the text", section="data", metavar="NAME", automatic="text",
        only_with=TEXT,
    )  # fmt: skip
    errors: str | None = setting(
        None, "invalid UTF-8 is refused, or replaced by U+FFFD", section="data", choices=ERRORS, automatic="strict",
        only_with=TEXT,
    )  # fmt: skip
    tags: tuple[str, ...] | None = setting(
        None, "annotations of FASTA headers that become control tags before a sequence", section="data", metavar="KEY",
        automatic="none", only_with=TEXT,
    )  # fmt: skip
    validation_text: tuple[str, ...] | None = setting(
        None, "text for validation", section="data", metavar="SOURCE", automatic="a share of the text",
        is_path=is_data_path, only_with=TEXT,
    )  # fmt: skip
    validation_share: float | None = setting(
        None, "share of the text for validation", section="data", above=0, below=1, automatic=f"{VALIDATION_SHARE:g}",
        only_with={**TEXT, "validation_text": (None,)},
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_settings(self)
        if self.dataset_weights is not None and len(self.dataset_weights) != len(self.dataset or ()):
            raise ValueError(f"DataConfig: got {len(self.dataset_weights)} dataset_weights, expected one for each of "
                             f"{len(self.dataset or ())} folders")  # fmt: skip

    @property
    def options(self) -> ReadOptions:
        """How text is read."""
        return ReadOptions(field=self.field or "text", errors=self.errors or "strict", tags=self.tags or ())
