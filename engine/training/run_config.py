"""RunConfig: everything that decides what a training run computes, logs and saves.

Each part belongs to the layer that uses it. The names of all settings are unique, so that a run is one flat mapping
from names to values: the keys of a TOML file, the flags of `peakgpt train`.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from peakgpt.engine.checkpoint.checkpoint_config import CheckpointConfig
from peakgpt.engine.data.data_config import DataConfig
from peakgpt.engine.model.presets import PRESETS
from peakgpt.engine.settings.setting import Setting, check_settings, setting, settings_of
from peakgpt.engine.training.train_config import TrainConfig
from peakgpt.engine.training.validation_config import MetricsConfig, ValidationConfig


@dataclass(kw_only=True, frozen=True)
class ModelSource:
    """Which model a run trains.

    Raises:
        ValueError: an unknown preset.
    """

    preset: str = setting(
        "gpt2-tiny", "sizes and variant, such as gpt2 or pythia-70m; docs/families.md lists all", section="model",
        choices=PRESETS,
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(kw_only=True, frozen=True)
class RunConfig:
    """All settings of a run, by section."""

    model: ModelSource = field(default_factory=ModelSource)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> RunConfig:
        """Build the config from the values of some settings, by name; the others have their defaults.

        Raises:
            ValueError: a value is out of range, or values contradict each other.
        """
        parts = {
            part: config(**{s.name: values[s.name] for s in settings_of(config) if s.name in values})
            for part, config in _parts().items()
        }
        return cls(**parts)

    def values(self) -> dict[str, Any]:
        """Return the value of every setting, by name."""
        parts = (getattr(self, part) for part in _parts())
        return {s.name: getattr(part, s.name) for part in parts for s in settings_of(type(part))}


@functools.cache
def run_settings() -> dict[str, Setting]:
    """Return all settings of a run by name, section by section."""
    settings = [s for config in _parts().values() for s in settings_of(config)]
    assert len({s.name for s in settings}) == len(settings), "two settings have one name"
    return {s.name: s for s in settings}


@functools.cache
def _parts() -> dict[str, Any]:
    kinds = typing.get_type_hints(RunConfig)
    return {part.name: kinds[part.name] for part in dataclasses.fields(RunConfig)}
