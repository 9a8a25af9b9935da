"""RunConfig: everything that decides what a training run computes, logs and saves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from peakgpt.engine.checkpoint.checkpoint_config import CheckpointConfig
from peakgpt.engine.data.data_config import DataConfig
from peakgpt.engine.data.model_source import NAMES, is_path
from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.model.presets import PRESETS
from peakgpt.engine.settings.setting import Setting, check_settings, setting, settings_of
from peakgpt.engine.training.run_settings import MODEL_FIELDS, RunSettings, build, checkpoint_fields, sections_of
from peakgpt.engine.training.synonyms import our_name
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
class RunConfig(RunSettings):
    """All settings of a run of `peakgpt train`, by section.

    Args:
        source: the initial model and the tokenizer.
        fields: fields of GPTConfig that replace those of the preset; with `init` all fields of the checkpoint.
        data, train, validation, metrics, checkpoint: the other sections.
    """

    COMMAND: ClassVar[str] = "train"
    RECIPES: ClassVar[Path] = Path(__file__).with_name("recipes")

    source: ModelSource = field(default_factory=ModelSource)
    fields: Mapping[str, Any] = field(default_factory=dict)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    @classmethod
    def of(cls, values: Mapping[str, Any], device: torch.device | None = None) -> RunConfig:
        values = dict(values)
        if device is not None:
            values.setdefault("dtype", best_dtype(device))
        if values.get("init") is None and values.get("preset") is None:
            values["preset"] = DEFAULT_PRESET
        build(ModelSource, values)  # raises before the checkpoint is read
        fields = {name: value for name, value in values.items() if name in MODEL_FIELDS}
        if values.get("init") is not None:
            fields = checkpoint_fields(values["init"], fields)
        values.setdefault("tokens", _block_size(values, fields))
        config = cls(fields=fields, **{part: build(kind, values) for part, kind in sections_of(cls).items()})
        config._check(values)
        return config

    @classmethod
    def other_name(cls, name: str, *, as_flag: bool = False) -> str | None:
        return our_name(name, cls.settings(), as_flag=as_flag)

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
        base = {} if self.source.preset is None else PRESETS[self.source.preset]
        return {**{s.name: s.default for s in settings_of(GPTConfig)}, **base, **self.fields}

    def default_values(self, model: GPTConfig, device: torch.device) -> dict[str, Any]:
        source = self.source
        if source.init is not None:
            return {name: setting.default for name, setting in run_settings().items() if name not in MODEL_FIELDS}
        plain = RunConfig.of({"preset": source.preset, "tokenizer": source.tokenizer}, device)
        fields, derived = plain.model_fields(), plain.model_config()
        filled = {name: getattr(derived, name) if value is None else value for name, value in fields.items()}
        own = {"preset": DEFAULT_PRESET, "tokenizer": None}
        size = {} if "vocab_size" in self.fields else {"vocab_size": model.vocab_size}
        return {**plain.values(), **filled, **own, **size}

    def _check(self, given: Mapping[str, Any]) -> None:
        """Check what several sections decide together."""
        model, source, data = self.model_config(), self.source, self.data
        if data.vocab is not None and (owner := source.init or source.tokenizer):
            raise ValueError(f"vocab is {data.vocab}, expected none with the tokenizer of {owner}")
        self.check_lengths(model)
        self.check_effects(given, model, has_checkpoint=source.init is not None)


def without_preset_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a file without the model's fields that only repeat its preset.

    A run writes all fields. Without this, a flag --preset over its file would get the sizes of the old preset.
    """
    if (preset := values.get("preset")) is None:
        return dict(values)
    base = {s.name: s.default for s in settings_of(GPTConfig)} | PRESETS[preset]
    return {name: value for name, value in values.items() if name not in base or value != base[name]}


def run_settings() -> dict[str, Setting]:
    """Return all settings of a run of `peakgpt train` by name, section by section."""
    return RunConfig.settings()


def _block_size(values: Mapping[str, Any], fields: Mapping[str, Any]) -> int:
    base = PRESETS.get(values.get("preset") or "", {})
    return {"block_size": GPTConfig.block_size, **base, **fields}["block_size"]
