"""FinetuneConfig: everything that decides what a run of `peakgpt finetune` computes, logs and saves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from peakgpt.engine.checkpoint.checkpoint_config import CheckpointConfig
from peakgpt.engine.data.model_source import NAMES, is_path
from peakgpt.engine.finetuning import lora_settings
from peakgpt.engine.finetuning.lora_settings import LoraSettings
from peakgpt.engine.finetuning.synonyms import FINETUNING
from peakgpt.engine.finetuning.tasks import label_config, sft_config
from peakgpt.engine.finetuning.tasks.label_config import LabelConfig
from peakgpt.engine.finetuning.tasks.sft_config import SftConfig
from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.settings.setting import Setting, check_settings, setting, settings_of
from peakgpt.engine.training.run_settings import (
    MODEL_FIELDS,
    WEIGHT_FIELDS,
    RunSettings,
    build,
    checkpoint_fields,
    sections_of,
)
from peakgpt.engine.training.synonyms import TRAINING, our_name
from peakgpt.engine.training.train_config import ALTERNATIVES, TrainConfig, best_dtype
from peakgpt.engine.training.validation_config import MetricsConfig, ValidationConfig

MAX_TOKENS = 1024  # of an example by default: the activations of longer ones may not fit
VALIDATION_SHARE = 0.05
# Values of settings that a task gives instead of their defaults, by the task's name.
TASK_DEFAULTS: dict[str, Mapping[str, Any]] = {
    **dict.fromkeys(label_config.LABEL_TASKS, label_config.DEFAULTS), "sft": sft_config.DEFAULTS,
}  # fmt: skip


@dataclass(kw_only=True, frozen=True)
class TaskConfig:
    """What is adapted to which task.

    Raises:
        ValueError: an unknown task, or no checkpoint.
    """

    task: str | None = setting(
        None, "what the model learns: the tasks of the GPT-1 paper have labels (docs/classification.md); sft is "
        "supervised fine-tuning, on answers", section="finetune", choices=TASK_DEFAULTS,
        automatic="must be given",
    )  # fmt: skip
    init: str | None = setting(
        None, f"checkpoint to adapt: {NAMES}", section="finetune", metavar="MODEL", is_path=is_path,
        automatic="must be given",
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_settings(self)
        for name in ("task", "init"):
            if getattr(self, name) is None:
                one_of = f"one of {', '.join(TASK_DEFAULTS)}" if name == "task" else f"the checkpoint to adapt: {NAMES}"
                raise ValueError(f"--{name}: got none, expected {one_of}")


@dataclass(kw_only=True, frozen=True)
class ExampleConfig:
    """The examples.

    Raises:
        ValueError: a value is out of range, or no file.
    """

    data: tuple[str, ...] = setting(
        (), "files of JSON lines to train on, one example a line; docs/finetuning.md has the fields of each task",
        section="data", metavar="FILE", is_path=lambda text: True,
    )  # fmt: skip
    validation_data: tuple[str, ...] | None = setting(
        None, "files of examples for validation", section="data", metavar="FILE", automatic="a share of the data",
        is_path=lambda text: True,
    )  # fmt: skip
    validation_share: float | None = setting(
        None, "share of the data for validation", section="data", above=0, below=1, automatic=f"{VALIDATION_SHARE:g}",
        only_with={"validation_data": (None,)},
    )  # fmt: skip
    truncate: bool = setting(
        False, "cut examples that have more than `tokens` tokens; false: such an example is an error", section="data"
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if not self.data:
            raise ValueError("--data: got none, expected files of JSON lines")


@dataclass(kw_only=True, frozen=True)
class FinetuneConfig(RunSettings):
    """All settings of a run of `peakgpt finetune`, by section.

    Args:
        task: and the checkpoint.
        fields: all fields of GPTConfig of the checkpoint.
        data, labels, sft, lora, train, validation, metrics, checkpoint: the other sections.
    """

    COMMAND: ClassVar[str] = "finetune"
    RECIPES: ClassVar[Path] = Path(__file__).with_name("recipes")
    # Batches have as many tokens as their examples. So nothing is planned in tokens, and tasks mask their examples.
    UNUSED: ClassVar[frozenset[str]] = frozenset({
        "mask_documents", "max_tokens", "ramp_batch", "ramp_tokens", "batch_stages", "warmup_tokens", "decay_tokens",
    })  # fmt: skip

    task: TaskConfig
    fields: Mapping[str, Any]
    data: ExampleConfig
    labels: LabelConfig = field(default_factory=LabelConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    lora: LoraSettings = field(default_factory=LoraSettings)
    train: TrainConfig = field(default_factory=TrainConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    @classmethod
    def of(cls, values: Mapping[str, Any], device: torch.device | None = None) -> FinetuneConfig:
        task = build(TaskConfig, values)  # raises before the checkpoint is read
        build(ExampleConfig, values)
        fields = checkpoint_fields(task.init, {name: v for name, v in values.items() if name in MODEL_FIELDS})
        filled = {
            **({} if device is None else {"dtype": best_dtype(device)}),
            "tokens": min(fields["block_size"], MAX_TOKENS), **_task_defaults(task.task, values), **values,
        }  # fmt: skip
        config = cls(fields=fields, **{part: build(kind, filled) for part, kind in sections_of(cls).items()})
        config.check_lengths(config.model_config())
        config.check_effects(values, config.model_config(), has_checkpoint=True)
        return config

    @classmethod
    def flags(cls) -> dict[str, Setting]:
        """Return the settings that are flags: of GPTConfig only what the weights of a checkpoint leave open."""
        return {name: setting for name, setting in cls.settings().items() if name not in WEIGHT_FIELDS}

    @classmethod
    def other_name(cls, name: str, *, as_flag: bool = False) -> str | None:
        return our_name(name, cls.settings(), as_flag=as_flag, others=(FINETUNING, TRAINING))

    def model_config(self) -> GPTConfig:
        """Return the config of the checkpoint's model, with the rates and penalties of this run."""
        return GPTConfig(**self.model_fields())

    def model_fields(self) -> dict[str, Any]:
        return {**{s.name: s.default for s in settings_of(GPTConfig)}, **self.fields}

    def default_values(self, model: GPTConfig, device: torch.device) -> dict[str, Any]:
        own = {"dtype": best_dtype(device), "tokens": min(model.block_size, MAX_TOKENS)}
        plain = {name: s.default for name, s in self.settings().items() if name not in MODEL_FIELDS}
        chosen = {n: getattr(self.task, n) for n in ("task", "init")}
        return {**plain, **own, **_all_defaults(self.task.task, has_adapter=self.lora.lora_rank is not None), **chosen}


def _task_defaults(task: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a task's values of settings, without those for which the user chose an alternative."""
    replaced = {
        name for names in ALTERNATIVES if any(given.get(other) is not None for other in names) for name in names
    }
    defaults = _all_defaults(task, has_adapter=given.get("lora_rank") is not None)
    return {name: value for name, value in defaults.items() if name not in replaced}


def _all_defaults(task: str, *, has_adapter: bool) -> Mapping[str, Any]:
    return {**TASK_DEFAULTS[task], **(lora_settings.DEFAULTS if has_adapter else {})}
