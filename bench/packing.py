"""A training step on packed documents that do not attend to each other, versus whole rows: `peakgpt bench packing`."""

from __future__ import annotations

import argparse
import time
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
from peakgpt.engine.model.presets import preset
from peakgpt.engine.training.train_config import TrainConfig, best_dtype
from peakgpt.engine.training.trainer import Trainer
from peakgpt.kernels.command_line import integer
from peakgpt.kernels.ops.attention_math import live_pairs

WHOLE_ROWS = "peakgpt"
SECONDS = 180.0  # of the case; a step takes 18 s on 2 cores


@dataclass(frozen=True)
class PackingCase(TrainingCase):
    """A step on whole rows, and on rows of several masked documents of equal length, by one trainer.

    Args:
        model, config, recipe: as in TrainingCase.
        documents: numbers of documents in a row, one contender for each.
    """

    kind: ClassVar[str] = "packing"
    documents: tuple[int, ...]

    @property
    def name(self) -> str:
        return joined(self.kind, self.model, self.shape, self.dtype)

    def all_contenders(self, device: torch.device) -> list[str]:
        return [WHOLE_ROWS, *map(_masked, self.documents)]

    def _measure(self, device: torch.device, on_failure: OnFailure) -> list[Result]:
        start, config, recipe = time.perf_counter(), self.config, self.recipe
        torch.manual_seed(recipe.seed)
        trainer = Trainer(GPT(config).to(device), recipe, steps=10_000)
        ids, targets = torch.randint(config.vocab_size, (2, recipe.batch, recipe.tokens), device=device)
        inputs: dict[str, tuple[Tensor, ...]] = {WHOLE_ROWS: (ids, targets)}
        notes = {WHOLE_ROWS: ""}
        for count in self.documents:
            position_ids = _positions(recipe.tokens, count).expand(recipe.batch, -1).contiguous().to(device)
            inputs[_masked(count)] = (ids, targets, position_ids)
            share = _live_share(position_ids[0])
            notes[_masked(count)] = f"{100 * share:.1f} % of the pairs of tokens that a whole row attends to"
        calls = {name: partial(trainer.step, *given) for name, given in inputs.items()}
        return self._time_steps(calls, notes, start, device, on_failure)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="gpt2", help="preset (default gpt2, 124M)")
    parser.add_argument("--batch", type=integer(), default=8)
    parser.add_argument("--tokens", type=integer(), default=1024)
    parser.add_argument("--documents", type=integer(), nargs="+", default=[1, 4, 16],
                        help="of equal length in a row; one contender for each number (default 1 4 16)")  # fmt: skip


def cases(args: argparse.Namespace, device: torch.device) -> list[Case]:
    recipe = TrainConfig(batch=args.batch, tokens=args.tokens, dtype=best_dtype(device))
    config = preset(args.model, block_size=max(args.tokens, preset(args.model).block_size))
    return [PackingCase(args.model, config, recipe, tuple(args.documents), rounds=20, seconds=SECONDS)]


def _masked(documents: int) -> str:
    return f"peakgpt, {documents} masked document{'s' if documents > 1 else ''} a row"


def _positions(tokens: int, documents: int) -> Tensor:
    """Return the position of each token in its document, (tokens,), for documents of equal length."""
    index = torch.arange(tokens, dtype=torch.int32)
    length = -(-tokens // documents)
    return index % length


def _live_share(position_ids: Tensor) -> float:
    """Return the share of a row's causal pairs of tokens that masked documents keep."""
    return float((position_ids + 1).sum()) / live_pairs(len(position_ids), len(position_ids), True, None)
