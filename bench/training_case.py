"""What the cases of training steps share: `train`, `packing` and `fp8`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from peakgpt.bench.case import Case
from peakgpt.bench.interleave import OnFailure, interleave
from peakgpt.bench.peak_meter import PeakMeter
from peakgpt.bench.schema import Result
from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.model.flops import training_flops
from peakgpt.engine.training.train_config import TrainConfig


@dataclass(frozen=True)
class TrainingCase(Case):
    """A training step of one model, which the contenders compute in different ways.

    Args:
        model: name of the model, for the name of the case.
        config: the model.
        recipe: batch size, tokens, dtype and optimizer.
    """

    model: str
    config: GPTConfig
    recipe: TrainConfig

    @property
    def shape(self) -> str:
        """Batch size and tokens, as a part of the case's name: "4x256"."""
        return f"{self.recipe.batch}x{self.recipe.tokens}"

    @property
    def dtype(self) -> str:
        return str(self.recipe.dtype).removeprefix("torch.")

    @property
    def sizes(self) -> dict[str, Any]:
        return {"batch": self.recipe.batch, "tokens": self.recipe.tokens, "n_layer": self.config.n_layer,
                "n_embd": self.config.n_embd}  # fmt: skip

    @property
    def flops(self) -> float:
        """Model FLOPs of a step."""
        return training_flops(self.config, self.recipe.tokens) * self.recipe.batch * self.recipe.tokens

    def _time_steps(
        self, steps: Mapping[str, Callable[[], object]], notes: Mapping[str, str], start: float,
        device: torch.device, on_failure: OnFailure,
    ) -> list[Result]:  # fmt: skip
        """Time steps of trainers in this process, within the budget that is left; `start` as in `left_s`.

        Args:
            steps, notes: of each contender.
        """
        timings = interleave(
            {name: steps[name] for name in self.contenders(device)}, rounds=self.rounds, device=device,
            budget_s=self.left_s(start), peaks=PeakMeter(device, [self.recipe.dtype]), on_failure=on_failure,
        )  # fmt: skip
        return [
            Result.of(
                timing.noted(notes[name]), bench="train", contender=name, backend="auto", case=self.sizes,
                device=str(device), dtype=self.dtype, flops=self.flops, flops_kind="model",
            )
            for name, timing in timings.items()
        ]  # fmt: skip
