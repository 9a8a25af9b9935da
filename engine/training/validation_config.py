"""How a run is evaluated, and what it reports."""

from __future__ import annotations

from dataclasses import dataclass

from peakgpt.engine.settings.setting import check_settings, setting
from peakgpt.engine.training.step_profile import parse_window


@dataclass(kw_only=True, frozen=True)
class ValidationConfig:
    """The settings of the evaluation on held-out text.

    Raises:
        ValueError: a value is out of range, a held-out set has no name, or values contradict each other.
    """

    validate_every: int = setting(
        250, "steps between validations; the last step always has one", section="validation", at_least=1,
        metavar="STEPS",
    )  # fmt: skip
    validation_batches: int | None = setting(
        32, "batches of each held-out set, at most; none: the whole set", section="validation", at_least=1
    )
    validation_sets: tuple[str, ...] = setting(
        (), "further held-out sets: text files, or token folders as `peakgpt prepare` writes them",
        section="validation", metavar="NAME=PATH",
    )  # fmt: skip
    prompts: tuple[str, ...] = setting(
        (), "texts that the model continues at each validation", section="validation", metavar="TEXT"
    )
    sample_tokens: int = setting(
        100, "tokens of each continuation, at most", section="validation", at_least=1, only_with={"prompts": None}
    )
    sample_temperature: float = setting(
        0.8, "temperature of the continuations; 0 is greedy", section="validation", at_least=0,
        only_with={"prompts": None},
    )
    patience: int | None = setting(
        None, "stop after this many validations without a better loss; none: never", section="validation", at_least=1,
        metavar="VALIDATIONS", resumable=True,
    )  # fmt: skip
    min_delta: float = setting(
        0.0, "a loss is better for --patience if it is lower by more than this, in nats per token",
        section="validation", at_least=0, metavar="NATS",
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_settings(self)
        self.named_sets()
        if self.min_delta and self.patience is None:
            raise ValueError(f"ValidationConfig: min_delta is {self.min_delta} without patience, expected both")

    def named_sets(self) -> dict[str, str]:
        """Return the paths of the further held-out sets by name."""
        sets: dict[str, str] = {}
        for text in self.validation_sets:
            name, equals, path = text.partition("=")
            if not (equals and path and name.isidentifier()) or name in (*sets, HELD_OUT):
                raise ValueError(
                    f"ValidationConfig: validation_sets has {text!r}, expected NAME=PATH with a name of letters, "
                    f"digits and underscores that no other set has; the held-out part of the data is {HELD_OUT}"
                )
            sets[name] = path
        return sets


HELD_OUT = "validation"  # the set that is split from the training data


@dataclass(kw_only=True, frozen=True)
class MetricsConfig:
    """The settings of what a run logs besides metrics.jsonl.

    Raises:
        ValueError: a value is out of range, or wandb_project is given without enable_wandb.
    """

    enable_tensorboard: bool = setting(False, "write TensorBoard's event files", section="metrics", resumable=True)
    enable_wandb: bool = setting(
        False, "log to Weights & Biases; WANDB_MODE and its other variables apply", section="metrics", resumable=True
    )
    wandb_project: str | None = setting(
        None, "project in Weights & Biases", section="metrics", automatic="peakgpt", resumable=True
    )
    profile: str | None = setting(
        None, "steps to profile with torch.profiler, such as 10:12", section="metrics", metavar="START:END",
        resumable=True,
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_settings(self)
        if self.wandb_project is not None and not self.enable_wandb:
            raise ValueError(
                f"MetricsConfig: wandb_project is {self.wandb_project!r} without enable_wandb, expected both"
            )
        if self.profile is not None:
            parse_window(self.profile)
