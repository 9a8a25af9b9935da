"""A training step (forward, backward, AdamW) versus PyTorch: `peakgpt bench train`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from peakgpt.bench.case import Case, joined
from peakgpt.bench.contenders.contender import contenders_on
from peakgpt.bench.contenders.models import expect_family
from peakgpt.bench.contenders.time_contenders import RunningContender, Work, time_contenders
from peakgpt.bench.contenders.training import TRAINING_CONTENDERS, training_inputs
from peakgpt.bench.contenders.worker_process import WorkerProcess
from peakgpt.bench.gpu_memory import peak_allocated_bytes
from peakgpt.bench.interleave import OnFailure
from peakgpt.bench.model_choice import add_model_arguments, chosen_model
from peakgpt.bench.peak_meter import PeakMeter
from peakgpt.bench.schema import Result
from peakgpt.bench.training_case import TrainingCase
from peakgpt.engine.graph_capture import WARMUP
from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.training.train_config import TrainConfig
from peakgpt.kernels.command_line import integer

# A contender is timed only if its loss after a few updates at the full learning rate equals that of eager. Eager
# computes bf16 from float32 parameters under autocast and so rounds differently: 0.05 % at 124M.
CHECKED_UPDATES = 2
CHECKED_UPDATES_GPU = WARMUP + 3  # the last updates replay the CUDA graph
DTYPES = ("bfloat16", "float32")
SHAPES = ((4, 256), (1, 1024))  # (batch, tokens) of the suite
LOSS_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-3}  # relative


@dataclass(frozen=True)
class TrainCase(TrainingCase):
    """One update of the same model by several contenders, with the same weights and batch.

    On a CPU each contender has its own process, because allocators differ; on a GPU all share this process.
    """

    kind: ClassVar[str] = "train"

    @property
    def name(self) -> str:
        recompute = "" if self.recipe.recompute == "none" else f"recompute={self.recipe.recompute}"
        return joined(self.kind, self.model, self.shape, recompute, self.dtype)

    def all_contenders(self, device: torch.device) -> list[str]:
        return contenders_on(TRAINING_CONTENDERS, device)

    @contextlib.contextmanager
    def work(self) -> Iterator[Work]:
        """Yield the work on a CPU."""
        cpu = torch.device("cpu")
        starts = dict(_starts(self.config, self.recipe, cpu, self.all_contenders(cpu)))
        yield Work(
            TRAINING_CONTENDERS,
            start=lambda name: starts[name](),
            first_output=partial(loss_after, CHECKED_UPDATES),
            expect_correct=lambda name, losses: _expect_same_loss(name, losses, CHECKED_UPDATES, self.recipe.dtype),
        )

    def _measure(self, device: torch.device, on_failure: OnFailure) -> list[Result]:
        config, recipe = self.config, self.recipe
        updates = CHECKED_UPDATES if device.type == "cpu" else CHECKED_UPDATES_GPU
        names = self.contenders(device)
        measured = time_contenders(
            _starts(config, recipe, device, names), partial(loss_after, updates),
            lambda name, losses: _expect_same_loss(name, losses, updates, recipe.dtype),
            rounds=self.rounds, warmup=0, device=device, budget_s=self.seconds,
            peaks=PeakMeter(device, [recipe.dtype]), on_failure=on_failure,
        )  # fmt: skip
        recompute = {} if recipe.recompute == "none" else {"recompute": recipe.recompute}  # only peakgpt recomputes
        return [
            Result.of(
                m.timing.noted(m.note), bench="train", case=self.sizes | recompute, contender=name,
                backend=TRAINING_CONTENDERS[name].backend, device=str(device), dtype=self.dtype,
                memory_bytes=m.memory_bytes, base_bytes=m.base_bytes,
                flops=self.flops, flops_kind="model",
            )
            for name, m in measured.items()
        ]  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--batch", type=integer(), help="sequences (default 4; also 1 of 1024 tokens)")
    parser.add_argument("--tokens", type=integer(), help="context length (default 256; also 1 x 1024)")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="repeatable; default both")
    parser.add_argument(
        "--recompute", default="none", metavar="PLAN", help="activation checkpointing of peakgpt, as in `peakgpt train`"
    )


def cases(args: argparse.Namespace, device: torch.device) -> list[Case]:
    model, config = chosen_model(args)
    expect_family(config)
    shapes = [(args.batch or 4, args.tokens or 256)] if args.batch or args.tokens else SHAPES
    return [
        TrainCase(
            model, config,
            TrainConfig(batch=batch, tokens=tokens, dtype=getattr(torch, dtype), warmup=0.0, recompute=args.recompute),
        )
        for batch, tokens in shapes
        for dtype in args.dtype or DTYPES
    ]  # fmt: skip


class LocalContender:
    """A contender in this process, with the interface of RunningContender.

    Its memory is the peak of the second update: the first one allocates the optimizer state, and a CUDA graph that is
    captured later keeps its memory pool.
    """

    pid, base_bytes, note = None, None, ""

    def __init__(self, trainer: Any, batch: tuple[Tensor, Tensor], device: torch.device):
        self.trainer, self.batch, self.device, self.steps, self.peak_bytes = trainer, batch, device, 0, None

    def step(self) -> Tensor:
        """Make one update and return its loss, without waiting for the device."""
        self.steps += 1
        if self.steps == 2:
            loss: list[Tensor] = []
            self.peak_bytes = peak_allocated_bytes(lambda: loss.append(self.trainer.step(*self.batch)), self.device)
            return loss[0]
        return self.trainer.step(*self.batch)

    def memory_bytes(self) -> int | None:
        return self.peak_bytes

    def close(self) -> None:
        del self.trainer


def _starts(
    config: GPTConfig, recipe: TrainConfig, device: torch.device, names: Sequence[str]
) -> Iterator[tuple[str, Callable[[], RunningContender]]]:
    if device.type == "cpu":
        request = {"make": "peakgpt.bench.contenders.training:training_step", "threads": torch.get_num_threads(),
                   "config": dataclasses.asdict(config), "batch": recipe.batch, "tokens": recipe.tokens,
                   "dtype": _name(recipe.dtype), "warmup": recipe.warmup,
                   "recompute": recipe.recompute}  # fmt: skip
        for name in names:
            yield (
                name,
                partial(WorkerProcess, name, {**request, "contender": name}, TRAINING_CONTENDERS[name].environment),
            )
        return
    state, batch = training_inputs(config, recipe, device)
    for name in names:
        yield (
            name,
            lambda name=name: LocalContender(
                TRAINING_CONTENDERS[name].build(state, config, recipe, device), batch, device
            ),
        )


def loss_after(updates: int, name: str, contender: RunningContender) -> float:
    """Make updates and return the last loss."""
    return [float(contender.step()) for _ in range(updates)][-1]


def _expect_same_loss(name: str, losses: Mapping[str, float], updates: int, dtype: torch.dtype) -> None:
    """
    Raises:
        ValueError: the loss differs from eager's, or from the first contender's if eager does not run.
    """
    loss, reference = losses[name], losses.get("eager", next(iter(losses.values())))
    if not abs(loss - reference) <= LOSS_TOLERANCE[dtype] * abs(reference):
        expected = f"expected {reference:.4f} within {LOSS_TOLERANCE[dtype]:.1%}"
        raise ValueError(f"{name}: loss {loss:.4f} after {updates} updates, {expected}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
