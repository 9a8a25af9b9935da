"""How a run is evaluated and what it reports."""

from __future__ import annotations

from dataclasses import dataclass

from peakgpt.engine.settings.setting import check_settings, setting


@dataclass(kw_only=True, frozen=True)
class ValidationConfig:
    """The settings of the evaluation on held-out text.

    Raises:
        ValueError: a value is out of range.
    """

    validation_batches: int = setting(32, "batches per evaluation, at most", section="validation", at_least=1)

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(kw_only=True, frozen=True)
class MetricsConfig:
    """The settings of what a run prints and logs.

    Raises:
        ValueError: a value is out of range.
    """

    log_every: int = setting(
        10, "steps between printed lines", section="metrics", at_least=1, metavar="STEPS", resumable=True
    )

    def __post_init__(self) -> None:
        check_settings(self)
