"""RunSettings: what the configs of all kinds of runs have in common.

A config is a frozen dataclass of sections, each of which is a dataclass of settings and belongs to the layer that uses
it. The names of all settings are unique, so that a run is one flat mapping from names to values: the keys of a TOML
file (run_file.py), the flags of a command. Three groups of values can give a setting. The later one wins: defaults, the
file, the flags.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch

from peakgpt.engine.checkpoint.checkpoint_config import CheckpointConfig
from peakgpt.engine.checkpoint.model_folder import MODEL_FILES, read_config
from peakgpt.engine.data.model_source import locate
from peakgpt.engine.model.config import RATES, TRAINING_ONLY, GPTConfig
from peakgpt.engine.settings.setting import Setting, settings_of
from peakgpt.engine.settings.values import show
from peakgpt.engine.training.train_config import TrainConfig
from peakgpt.engine.training.validation_config import MetricsConfig, ValidationConfig

MODEL_FIELDS = frozenset(s.name for s in settings_of(GPTConfig))
WEIGHT_FIELDS = MODEL_FIELDS.difference(TRAINING_ONLY)  # which the weights of a checkpoint decide


class RunSettings(ABC):
    """The settings of a run, by section. A subclass is a frozen dataclass with these fields and more.

    Args:
        fields: fields of GPTConfig.
        train, validation, metrics, checkpoint: sections that every run has.
    """

    COMMAND: ClassVar[str]  # `peakgpt COMMAND` makes such runs
    RECIPES: ClassVar[Path]  # folder of TOML files, each a recipe
    UNUSED: ClassVar[frozenset[str]] = frozenset()  # declared settings without an effect on such runs

    fields: Mapping[str, Any]
    train: TrainConfig
    validation: ValidationConfig
    metrics: MetricsConfig
    checkpoint: CheckpointConfig

    @classmethod
    @abstractmethod
    def of(cls, values: Mapping[str, Any], device: torch.device | None = None) -> RunSettings:
        """Build the config from the values of some settings, by name, and choose the others.

        Args:
            values: of settings; the others have their defaults.
            device: decides dtype if it is not given. None: float32.
        Raises:
            ValueError: a value is out of range, or values contradict each other, or one would have no effect.
        """

    @abstractmethod
    def model_fields(self) -> dict[str, Any]:
        """Return the fields of GPTConfig, of which None stands for a value that GPTConfig derives."""

    @abstractmethod
    def default_values(self, model: GPTConfig, device: torch.device) -> dict[str, Any]:
        """Return what the settings would be if only the model was given, by name; without fields of a checkpoint."""

    @classmethod
    @abstractmethod
    def other_name(cls, name: str, *, as_flag: bool = False) -> str | None:
        """Return what to use instead of a name of another program; see `synonyms.our_name`."""

    @classmethod
    def settings(cls) -> dict[str, Setting]:
        """Return all settings of such runs by name, section by section."""
        return _settings(cls)

    @classmethod
    def flags(cls) -> dict[str, Setting]:
        """Return the settings that are flags of the command."""
        return cls.settings()

    def values(self) -> dict[str, Any]:
        """Return the value of every declared setting, by name; of GPTConfig the fields that were given."""
        sections = (getattr(self, section) for section in sections_of(type(self)))
        return {**{s.name: getattr(part, s.name) for part in sections for s in settings_of(type(part))}, **self.fields}

    def check_lengths(self, model: GPTConfig) -> None:
        """Raise ValueError if the sequences are longer than the model's."""
        if self.train.tokens > model.block_size:
            raise ValueError(f"tokens is {self.train.tokens}, expected at most block_size {model.block_size}")

    def check_effects(self, given: Mapping[str, Any], model: GPTConfig, *, has_checkpoint: bool) -> None:
        """Raise ValueError if a given value would be ignored because of another setting.

        Args:
            given: values by name.
            model: of the run.
            has_checkpoint: whether the fields of the model are those of a checkpoint, which nobody chose.
        """
        settings, resolved = self.settings(), {**self.values(), **model.to_dict()}
        for name, value in given.items():
            if value == settings[name].default or (has_checkpoint and name in WEIGHT_FIELDS):
                continue
            if (obstacle := settings[name].obstacle(resolved)) is not None:
                other, expected = obstacle
                got = show(resolved[other], quoted=False)
                raise ValueError(f"{name}: got it with {other} {got}, expected it only with {other} {expected}")


@functools.cache
def sections_of(kind: type[RunSettings]) -> dict[str, Any]:
    """Return the dataclass of each section of a config."""
    kinds = typing.get_type_hints(kind)
    return {part.name: kinds[part.name] for part in dataclasses.fields(kind) if part.name != "fields"}


@functools.cache
def _settings(kind: type[RunSettings]) -> dict[str, Setting]:
    source, *others = sections_of(kind).values()
    settings = [s for config in (source, GPTConfig, *others) for s in settings_of(config) if s.name not in kind.UNUSED]
    assert len({s.name for s in settings}) == len(settings), "two settings have one name"
    return {s.name: s for s in settings}


def build(section: type, values: Mapping[str, Any]) -> Any:
    """Build a section from those of the values that are its settings."""
    return section(**{s.name: values[s.name] for s in settings_of(section) if s.name in values})


def checkpoint_fields(source: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of GPTConfig of a checkpoint, in which the given ones may change only what weights ignore.

    If all fields are given, as in the file of a resumed run, the checkpoint is not needed and not read.

    Raises:
        ValueError: no checkpoint, or a given field contradicts it.
    """
    if given.keys() == MODEL_FIELDS:
        return dict(given)
    _, config = read_config(locate(source, MODEL_FILES))
    fields = {**config.to_dict(), **(dict.fromkeys(RATES) if "dropout" in given else {}), **given}
    expect_weights_of(GPTConfig(**fields), config, source, given)
    return fields


def expect_weights_of(model: GPTConfig, checkpoint: GPTConfig, source: str, given: Collection[str] = ()) -> None:
    """Check that the weights of a checkpoint are those of a model.

    Args:
        model, checkpoint: their configs.
        source: of the checkpoint.
        given: fields that the error names before others.
    Raises:
        ValueError: a field that the weights decide differs.
    """
    for name in sorted(WEIGHT_FIELDS, key=lambda name: (name not in given, name)):
        got, expected = getattr(model, name), getattr(checkpoint, name)
        if got != expected:
            raise ValueError(f"{name} is {got}, expected {expected}, that of init {source}")
