"""The settings of LoRA, with any task: an adapter trains instead of the weights of the checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peakgpt.engine.model.lora import ALL_LINEAR, LoraConfig
from peakgpt.engine.settings.setting import check_settings, setting

# Tasks that add nothing to the model, which a run would save beside the adapter.
ALLOWED = {"task": ("sft",), "optimizer": ("adamw",)}
WITH_RANK = {"lora_rank": None}
# Hu et al. 2021, arXiv:2106.09685, table 11: GPT-2 M and L.
DEFAULTS: dict[str, Any] = {"lr": 2e-4}


@dataclass(kw_only=True, frozen=True)
class LoraSettings:
    """The adapter of a run, if it trains one.

    Raises:
        ValueError: a value is out of range.
    """

    lora_rank: int | None = setting(
        None, "rank of a LoRA adapter, which trains while the checkpoint's weights are frozen; they may be quantized; "
        "none: all weights train", section="lora", at_least=1, metavar="N", only_with=ALLOWED,
    )  # fmt: skip
    lora_alpha: float = setting(
        16.0, "the adapter's product is multiplied by alpha / rank", section="lora", above=0, only_with=WITH_RANK
    )
    lora_dropout: float = setting(
        0.0, "probability of dropping an input of the adapter", section="lora", at_least=0, below=1, metavar="RATE",
        only_with=WITH_RANK,
    )  # fmt: skip
    lora_targets: tuple[str, ...] | None = setting(
        None, f"layers with an adapter, by their names in transformers, such as q_proj v_proj; {ALL_LINEAR}: all "
        "linear layers but the head", section="lora", metavar="NAME", automatic="those of queries and values",
        only_with=WITH_RANK,
    )  # fmt: skip
    lora_rslora: bool = setting(
        False, "divide alpha by the root of the rank, as rsLoRA does", section="lora", only_with=WITH_RANK
    )

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def adapter(self) -> LoraConfig | None:
        """The adapter's settings; None if all weights train."""
        if self.lora_rank is None:
            return None
        targets = ALL_LINEAR if self.lora_targets == (ALL_LINEAR,) else self.lora_targets
        return LoraConfig(r=self.lora_rank, lora_alpha=self.lora_alpha, lora_dropout=self.lora_dropout,
                          use_rslora=self.lora_rslora, target_modules=targets)  # fmt: skip
