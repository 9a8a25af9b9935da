"""A GPT-2 training step (forward, backward, AdamW) versus PyTorch: `peakgpt bench train`."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from peakgpt.bench.contenders.contender import contenders_on
from peakgpt.bench.contenders.time_contenders import RunningContender, time_contenders
from peakgpt.bench.contenders.training import TRAINING_CONTENDERS, training_inputs
from peakgpt.bench.contenders.worker_process import WorkerProcess
from peakgpt.bench.gpu_memory import peak_allocated_bytes
from peakgpt.bench.interleave import OnFailure, raise_failure
from peakgpt.bench.run_results import Emit, record_failures
from peakgpt.bench.schema import Result
from peakgpt.engine.graph_capture import WARMUP
from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.model.flops import training_flops
from peakgpt.engine.model.presets import preset
from peakgpt.engine.training.train_config import TrainConfig
from peakgpt.kernels.command_line import integer
from peakgpt.kernels.hardware.peaks import peak_for

# A contender is timed only if its loss after a few updates at the full learning rate equals that of eager. Eager
# computes bf16 from float32 parameters under autocast and so rounds differently: 0.05 % at 124M.
CHECKED_UPDATES = 3
CHECKED_UPDATES_GPU = WARMUP + 3  # the last updates replay the CUDA graph
LOSS_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-3}  # relative


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="gpt2", help="preset (default gpt2, 124M)")
    parser.add_argument("--batch", type=integer(), default=4)
    parser.add_argument("--tokens", type=integer(), default=256, help="context length (default 256)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), action="append", help="repeatable; default both")
    parser.add_argument(
        "--contenders", nargs="+", choices=tuple(TRAINING_CONTENDERS), help="default: all that can run on the device"
    )
    parser.add_argument(
        "--recompute", default="none", metavar="PLAN", help="activation checkpointing of peakgpt, as in `peakgpt train`"
    )
    parser.add_argument("--rounds", type=integer(), default=9)


def run(args: argparse.Namespace, device: torch.device, emit: Emit) -> None:
    for dtype in args.dtype or ("float32", "bfloat16"):
        recipe = TrainConfig(batch=args.batch, tokens=args.tokens, dtype=getattr(torch, dtype), warmup=0.0,
                        recompute=args.recompute)  # fmt: skip
        for row in compare_training(preset(args.model), recipe, device, args.contenders, rounds=args.rounds,
                                    on_failure=record_failures(emit)):  # fmt: skip
            emit(row)


def compare_training(
    config: GPTConfig,
    recipe: TrainConfig,
    device: torch.device,
    names: Sequence[str] | None = None,
    *,
    rounds: int = 9,
    budget_s: float | None = None,
    on_failure: OnFailure = raise_failure,
) -> list[Result]:
    """Time one update of the same model by several contenders, with the same weights and batch.

    Args:
        config: the model.
        recipe: batch size, tokens and dtype.
        device: on a CPU each contender has its own process, because allocators differ; on a GPU all share this process.
        names: keys of TRAINING_CONTENDERS; None means all that can run on the device.
        rounds, budget_s: see `interleave`.
        on_failure: called with a contender that raises or whose loss differs from eager's; the others are timed.
    Returns:
        A result for each contender, with model FLOPs.
    """
    names = names or contenders_on(TRAINING_CONTENDERS, device)
    updates = CHECKED_UPDATES if device.type == "cpu" else CHECKED_UPDATES_GPU
    measured = time_contenders(
        _starts(config, recipe, device, names), lambda name, s: [float(s.step()) for _ in range(updates)][-1],
        lambda name, losses: _expect_same_loss(name, losses, updates, recipe.dtype),
        rounds=rounds, device=device, budget_s=budget_s, on_failure=on_failure,
    )  # fmt: skip
    peak = peak_for(device, recipe.dtype)
    case = {"batch": recipe.batch, "tokens": recipe.tokens, "n_layer": config.n_layer, "n_embd": config.n_embd}
    if recipe.recompute != "none":
        case["recompute"] = recipe.recompute  # only peakgpt recomputes
    return [
        Result.of(
            m.timing.noted(m.note), bench="train", case=case, contender=name,
            backend=TRAINING_CONTENDERS[name].backend, device=str(device), dtype=_name(recipe.dtype),
            memory_bytes=m.memory_bytes, base_bytes=m.base_bytes,
            flops=training_flops(config, recipe.tokens) * recipe.batch * recipe.tokens, flops_kind="model",
            peak_flops_s=peak.flops_s, peak_source=peak.source,
        )
        for name, m in measured.items()
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
