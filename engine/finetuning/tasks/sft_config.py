"""The settings of supervised fine-tuning, and the values that it gives to others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peakgpt.engine.settings.setting import check_settings, setting

ANSWERS, ALL = "answers", "all"
SFT = {"task": ("sft",)}

# TRL's SFTConfig: learning rate, epochs, no weight decay; torch's betas. The whole held-out part is cheap to evaluate.
DEFAULTS: dict[str, Any] = {
    "lr": 2e-5, "epochs": 3.0, "weight_decay": 0.0, "betas": (0.9, 0.999), "validate_every": 100,
    "validation_batches": None,
}  # fmt: skip


@dataclass(kw_only=True, frozen=True)
class SftConfig:
    """How conversations become tokens.

    Raises:
        ValueError: a value is out of range.
    """

    packing: bool = setting(
        True, "several examples share a row of `tokens` and do not attend to each other; false: a row each, padded to "
        "the longest of its batch", section="sft", only_with=SFT,
    )  # fmt: skip
    train_on: str = setting(
        ANSWERS, "tokens with a loss: those of the answers, or all", section="sft", choices=(ANSWERS, ALL),
        only_with=SFT,
    )  # fmt: skip
    chat_template: str | None = setting(
        None, "file with a chat template in Jinja, for a checkpoint without one or in place of its own; it is saved "
        "with the model", section="sft", metavar="FILE", is_path=lambda text: True, only_with=SFT,
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_settings(self)
