"""When a run saves."""

from __future__ import annotations

from dataclasses import dataclass

from peakgpt.engine.settings.setting import check_settings, setting


@dataclass(kw_only=True, frozen=True)
class CheckpointConfig:
    """The settings of a run's checkpoints.

    Raises:
        ValueError: a value is out of range.
    """

    save_every: int = setting(
        250, "steps between checkpoints; the last step always has one", section="checkpoint", at_least=1,
        metavar="STEPS", resumable=True,
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_settings(self)
