"""RunConfig: everything that decides what a training run computes, logs and saves.

Each part belongs to the layer that uses it. The names of all settings are unique, so that a run is one flat mapping
from names to values: the keys of a TOML file (run_file.py), the flags of `peakgpt train`. Three groups of values can
give a setting. The later one wins: defaults, the file, the flags.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from peakgpt.engine.checkpoint.checkpoint_config import CheckpointConfig
from peakgpt.engine.checkpoint.model_folder import MODEL_FILES, read_config
from peakgpt.engine.data.data_config import DataConfig
from peakgpt.engine.data.model_source import NAMES, is_path, locate
from peakgpt.engine.model.config import RATES, TRAINING_ONLY, GPTConfig
from peakgpt.engine.model.presets import PRESETS
from peakgpt.engine.settings.setting import Setting, check_settings, setting, settings_of
from peakgpt.engine.settings.values import show
from peakgpt.engine.training.train_config import TrainConfig, best_dtype
from peakgpt.engine.training.validation_config import MetricsConfig, ValidationConfig

DEFAULT_PRESET = "gpt2-tiny"


@dataclass(kw_only=True, frozen=True)
class ModelSource:
    """The model that a run begins with, and its tokenizer.

    Raises:
        ValueError: an unknown preset, or a preset and a checkpoint.
    """

    preset: str | None = setting(
        None, "sizes and variant, such as gpt2 or pythia-70m; docs/families.md lists all", section="model",
        choices=PRESETS, automatic=f"{DEFAULT_PRESET}, none with init",
    )  # fmt: skip
    init: str | None = setting(
        None, f"start from the weights and the tokenizer of this model: {NAMES}", section="model",
        metavar="MODEL", is_path=is_path,
    )  # fmt: skip
    tokenizer: str | None = setting(
        None, "tokenizer of this model or folder, instead of training one", section="model", metavar="MODEL",
        is_path=is_path,
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_settings(self)
        if self.preset is not None and self.init is not None:
            raise ValueError(f"preset is {self.preset} and init is {self.init}, expected one of the two")


@dataclass(kw_only=True, frozen=True)
class RunConfig:
    """All settings of a run, by section.

    Args:
        source: the initial model and the tokenizer.
        fields: fields of GPTConfig that replace those of the preset; with `init` all fields of the checkpoint.
        data, train, validation, metrics, checkpoint: the other sections.
    """

    source: ModelSource = field(default_factory=ModelSource)
    fields: Mapping[str, Any] = field(default_factory=dict)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    @classmethod
    def of(cls, values: Mapping[str, Any], device: torch.device | None = None) -> RunConfig:
        """Build the config from the values of some settings, by name, and choose the others.

        Args:
            values: of settings; the others have their defaults.
            device: decides dtype if it is not given. None: float32.
        Raises:
            ValueError: a value is out of range, or values contradict each other, or one would have no effect.
        """
        values = dict(values)
        if device is not None:
            values.setdefault("dtype", best_dtype(device))
        if values.get("init") is None and values.get("preset") is None:
            values["preset"] = DEFAULT_PRESET
        _build(ModelSource, values)  # raises before the checkpoint is read
        fields = {name: value for name, value in values.items() if name in MODEL_FIELDS}
        if values.get("init") is not None:
            fields = checkpoint_fields(values["init"], fields)
        values.setdefault("tokens", _block_size(values, fields))
        config = cls(fields=fields, **{part: _build(kind, values) for part, kind in _parts().items()})
        config._check(values)
        return config

    def values(self) -> dict[str, Any]:
        """Return the value of every setting, by name; of GPTConfig's fields those that differ from the preset's."""
        parts = (getattr(self, part) for part in _parts())
        return {**{s.name: getattr(part, s.name) for part in parts for s in settings_of(type(part))}, **self.fields}

    def model_config(self, tokenizer_size: int | None = None) -> GPTConfig:
        """Return the config of the model.

        Args:
            tokenizer_size: number of tokens; the model's vocabulary if the run has no vocab_size. None: not yet known.
        Raises:
            ValueError: fields that do not fit each other, or a tokenizer larger than the vocabulary.
        """
        fields = self.model_fields()
        if tokenizer_size is not None:
            if "vocab_size" not in self.fields:
                fields["vocab_size"] = tokenizer_size
            if tokenizer_size > fields["vocab_size"]:
                raise ValueError(
                    f"vocab_size is {fields['vocab_size']}, expected at least {tokenizer_size}, the tokenizer's size"
                )
        return GPTConfig(**fields)

    def model_fields(self) -> dict[str, Any]:
        """Return the fields of GPTConfig, of which None stands for a value that GPTConfig derives."""
        base = {} if self.source.preset is None else PRESETS[self.source.preset]
        return {**{s.name: s.default for s in settings_of(GPTConfig)}, **base, **self.fields}

    def _check(self, given: Mapping[str, Any]) -> None:
        """Check what several sections decide together."""
        model, settings = self.model_config(), run_settings()
        source, data = self.source, self.data
        if data.vocab is not None and (owner := source.init or source.tokenizer):
            raise ValueError(f"vocab is {data.vocab}, expected none with the tokenizer of {owner}")
        if self.train.tokens > model.block_size:
            raise ValueError(f"tokens is {self.train.tokens}, expected at most block_size {model.block_size}")
        resolved = {**self.values(), **model.to_dict()}
        for name, value in given.items():
            if value == settings[name].default:
                continue
            if (obstacle := settings[name].obstacle(resolved)) is not None:
                other, expected = obstacle
                got = show(resolved[other], quoted=False)
                raise ValueError(f"{name}: got it with {other} {got}, expected it only with {other} {expected}")


def without_preset_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a file without the model's fields that only repeat its preset.

    A run writes all fields. Without this, a flag --preset over its file would get the sizes of the old preset.
    """
    if (preset := values.get("preset")) is None:
        return dict(values)
    base = {s.name: s.default for s in settings_of(GPTConfig)} | PRESETS[preset]
    return {name: value for name, value in values.items() if name not in base or value != base[name]}


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
    changed = GPTConfig(**fields)
    for name in sorted(MODEL_FIELDS.difference(TRAINING_ONLY), key=lambda name: name not in given):
        if getattr(changed, name) != getattr(config, name):
            raise ValueError(f"{name} is {given[name]}, expected {getattr(config, name)}, that of init {source}")
    return fields


@functools.cache
def run_settings() -> dict[str, Setting]:
    """Return all settings of a run by name, section by section."""
    source, *others = _parts().values()
    settings = [s for config in (source, GPTConfig, *others) for s in settings_of(config)]
    assert len({s.name for s in settings}) == len(settings), "two settings have one name"
    return {s.name: s for s in settings}


MODEL_FIELDS = frozenset(s.name for s in settings_of(GPTConfig))


@functools.cache
def _parts() -> dict[str, Any]:
    kinds = typing.get_type_hints(RunConfig)
    return {part.name: kinds[part.name] for part in dataclasses.fields(RunConfig) if part.name != "fields"}


def _build(config: type, values: Mapping[str, Any]) -> Any:
    return config(**{s.name: values[s.name] for s in settings_of(config) if s.name in values})


def _block_size(values: Mapping[str, Any], fields: Mapping[str, Any]) -> int:
    base = PRESETS.get(values.get("preset") or "", {})
    return {"block_size": GPTConfig.block_size, **base, **fields}["block_size"]
