"""An update of supervised fine-tuning on examples of different lengths versus TRL: `peakgpt bench finetune`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar

import torch

from peakgpt.bench.case import Case, expect_cpu, joined
from peakgpt.bench.contenders.finetuning import FINETUNING_CONTENDERS, make_examples, train_config
from peakgpt.bench.contenders.models import expect_family
from peakgpt.bench.contenders.time_contenders import Work, time_contenders
from peakgpt.bench.contenders.worker_process import WorkerProcess
from peakgpt.bench.interleave import OnFailure
from peakgpt.bench.model_choice import add_model_arguments, chosen_model
from peakgpt.bench.peak_meter import PeakMeter
from peakgpt.bench.schema import Result
from peakgpt.bench.train import CHECKED_UPDATES, DTYPES, LOSS_TOLERANCE, loss_after
from peakgpt.bench.training_case import TrainingCase
from peakgpt.engine.model.flops import training_flops
from peakgpt.kernels.command_line import integer

EXAMPLES, LONGEST = 16, 512


@dataclass(frozen=True)
class FinetuneCase(TrainingCase):
    """One update on the same examples by several contenders, with the same weights. TRL pads or packs them.

    Args:
        model, config, recipe: as in TrainingCase; the recipe's tokens are those of the longest example.
        examples: number of examples of an update.
    """

    kind: ClassVar[str] = "finetune"
    examples: int

    @property
    def name(self) -> str:
        return joined(self.kind, self.model, f"{self.examples}x{self.recipe.tokens}", self.dtype)

    @cached_property
    def example_tokens(self) -> int:
        """The tokens of all examples, without padding."""
        return sum(len(e["ids"]) for e in make_examples(self.config, self.examples, self.recipe.tokens))

    @property
    def sizes(self) -> dict[str, Any]:
        return {"tokens": self.example_tokens, "examples": self.examples, "longest": self.recipe.tokens,
                "n_layer": self.config.n_layer, "n_embd": self.config.n_embd}  # fmt: skip

    @property
    def flops(self) -> float:
        """Model FLOPs of an update, without padding; attention as if all examples had the mean length."""
        return training_flops(self.config, self.example_tokens // self.examples) * self.example_tokens

    def all_contenders(self, device: torch.device) -> list[str]:
        return list(FINETUNING_CONTENDERS)

    @contextlib.contextmanager
    def work(self) -> Iterator[Work]:
        """Yield the work on a CPU."""
        yield Work(FINETUNING_CONTENDERS, start=self._start, first_output=partial(loss_after, CHECKED_UPDATES),
                   expect_correct=self._expect_same_loss)  # fmt: skip

    def _start(self, name: str) -> WorkerProcess:
        request = {
            "make": "peakgpt.bench.contenders.finetuning:finetuning_step", "threads": torch.get_num_threads(),
            "contender": name, "config": dataclasses.asdict(self.config), "examples": self.examples,
            "tokens": self.recipe.tokens, "dtype": self.dtype,
        }  # fmt: skip
        return WorkerProcess(name, request, FINETUNING_CONTENDERS[name].environment)

    def _expect_same_loss(self, name: str, losses: Mapping[str, float]) -> None:
        loss, reference = losses[name], losses.get("TRL", next(iter(losses.values())))
        if not abs(loss - reference) <= LOSS_TOLERANCE[self.recipe.dtype] * abs(reference):
            raise ValueError(f"{name}: loss {loss:.4f} after {CHECKED_UPDATES} updates, expected {reference:.4f}")

    def _measure(self, device: torch.device, on_failure: OnFailure) -> list[Result]:
        expect_cpu(self.kind, device)
        measured = time_contenders(
            [(name, partial(self._start, name)) for name in self.contenders(device)],
            partial(loss_after, CHECKED_UPDATES), self._expect_same_loss,
            rounds=self.rounds, warmup=0, device=device, budget_s=self.seconds,
            peaks=PeakMeter(device, [self.recipe.dtype]), on_failure=on_failure,
        )  # fmt: skip
        return [
            Result.of(
                m.timing.noted(m.note), bench="finetune", case=self.sizes, contender=name,
                backend=FINETUNING_CONTENDERS[name].backend, device=str(device), dtype=self.dtype,
                memory_bytes=m.memory_bytes, base_bytes=m.base_bytes, flops=self.flops, flops_kind="model",
            )
            for name, m in measured.items()
        ]  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--examples", type=integer(), default=EXAMPLES,
                        help=f"of an update, of different lengths (default {EXAMPLES})")  # fmt: skip
    parser.add_argument("--tokens", type=integer(), default=LONGEST, help=f"of the longest (default {LONGEST})")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="repeatable; default both")


def cases(args: argparse.Namespace, device: torch.device) -> list[Case]:
    model, config = chosen_model(args)
    expect_family(config)
    return [
        FinetuneCase(model, config, train_config(args.tokens, getattr(torch, dtype)), args.examples)
        for dtype in args.dtype or DTYPES
    ]
