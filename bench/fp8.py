"""Training with fp8 GEMMs versus bfloat16: loss of the same run, then time of a step: `peakgpt bench fp8`."""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from peakgpt.bench.case import Case, joined
from peakgpt.bench.interleave import OnFailure
from peakgpt.bench.schema import Result
from peakgpt.bench.training_case import TrainingCase
from peakgpt.engine.gpt import GPT
from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.model.presets import preset
from peakgpt.engine.training.train_config import TrainConfig
from peakgpt.engine.training.trainer import Trainer
from peakgpt.kernels.command_line import integer

VOCAB = 50304  # GPT-2's, padded to a multiple of 128
SYMBOLS = 512  # number of token ids in the synthetic sequences


@dataclass(frozen=True)
class Fp8Case(TrainingCase):
    """Training with both dtypes, then the time of a step of each; the notes contain the losses.

    Args:
        model, config, recipe: as in TrainingCase; each contender sets recipe.fp8.
        steps: of the run that gives the loss.
    """

    kind: ClassVar[str] = "fp8"
    steps: int

    @property
    def name(self) -> str:
        return joined(self.kind, self.model, self.shape)

    def all_contenders(self, device: torch.device) -> list[str]:
        return ["peakgpt", "peakgpt, fp8"]

    def _measure(self, device: torch.device, on_failure: OnFailure) -> list[Result]:
        start, config, recipe, steps = time.perf_counter(), self.config, self.recipe, self.steps
        trainers, losses = _trained(config, recipe, steps, device)
        for step in sorted({0, steps // 4, steps // 2, steps - 1}):
            print(f"step {step + 1}: loss " + ", ".join(f"{name} {row[step]:.4f}" for name, row in losses.items()))
        batch = next(_batches(config, recipe, device))
        calls = {name: partial(trainer.step, *batch) for name, trainer in trainers.items()}
        note = "loss {:.4f} after {} steps; the peak is bfloat16's for both"
        notes = {name: note.format(row[-1], steps) for name, row in losses.items()}
        return self._time_steps(calls, notes, start, device, on_failure)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="gpt2", help="preset (default gpt2, 124M)")
    parser.add_argument("--batch", type=integer(), default=8)
    parser.add_argument("--tokens", type=integer(), default=1024)
    parser.add_argument("--steps", type=integer(), default=100, help="of the run whose loss is printed (default 100)")


def cases(args: argparse.Namespace, device: torch.device) -> list[Case]:
    recipe = TrainConfig(batch=args.batch, tokens=args.tokens, dtype=torch.bfloat16, lr=6e-4)
    return [Fp8Case(args.model, preset(args.model, vocab_size=VOCAB), recipe, args.steps, rounds=20)]


def compare_losses(config: GPTConfig, recipe: TrainConfig, steps: int, device: torch.device) -> dict[str, list[float]]:
    """Return the losses of all steps, with the same weights and batches."""
    return _trained(config, recipe, steps, device)[1]


def _trained(config, recipe, steps, device) -> tuple[dict[str, Trainer], dict[str, list[float]]]:
    trainers, losses = {}, {}
    for name, fp8 in (("peakgpt", False), ("peakgpt, fp8", True)):
        torch.manual_seed(recipe.seed)
        model = GPT(config).to(device)
        trainers[name] = Trainer(model, dataclasses.replace(recipe, fp8=fp8), steps=2 * steps)
        batches = _batches(config, recipe, device)
        found = torch.stack([trainers[name].step(*next(batches)) for _ in range(steps)])
        losses[name] = found.tolist()
    return trainers, losses


def _batches(config: GPTConfig, recipe: TrainConfig, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of learnable sequences: each one counts up by its own step."""
    generator = torch.Generator().manual_seed(recipe.seed)
    symbols = min(SYMBOLS, config.vocab_size)
    while True:
        first, step = (torch.randint(1, symbols, (recipe.batch, 1), generator=generator) for _ in range(2))
        ids = (first + step % 7 * torch.arange(recipe.tokens + 1)) % symbols
        ids = ids.to(device)
        yield ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
