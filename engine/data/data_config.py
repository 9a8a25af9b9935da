"""What a run trains on."""

from __future__ import annotations

from dataclasses import dataclass

from peakgpt.engine.settings.setting import check_settings, setting


@dataclass(kw_only=True, frozen=True)
class DataConfig:
    """The settings of a run's data.

    Raises:
        ValueError: a value is out of range.
    """

    text: tuple[str, ...] | None = setting(
        None, "UTF-8 files or folders", section="data", metavar="FILE", automatic="Python's library"
    )
    vocab: int = setting(4096, "vocabulary size of the tokenizer that is trained", section="data", at_least=1)

    def __post_init__(self) -> None:
        check_settings(self)
