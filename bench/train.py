"""A GPT-2 training step, forward, backward and AdamW, beside PyTorch: `peakgpt bench train`."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from peakgpt.bench.contenders import CONTENDERS, start
from peakgpt.bench.findings import Findings
from peakgpt.bench.ops import OnFailure, allocated, raise_it
from peakgpt.bench.steppers import Stepper, measure
from peakgpt.bench.worker import Worker
from peakgpt.engine.graph_capture import WARMUP
from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.model.flops import training_flops
from peakgpt.engine.model.presets import preset
from peakgpt.engine.training.train_config import TrainConfig
from peakgpt.kernels.hardware.clock import Result
from peakgpt.kernels.hardware.device import peak_for

# Contenders must have the same loss after the same few updates at the full learning rate, else nothing is timed. Eager
# computes bf16 from float32 parameters under autocast, so that its rounding is not ours: 0.05 % off at 124M.
CHECKED_STEPS = 3
REPLAYED = WARMUP + 3  # on a GPU: the last of them replay the recorded step
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-3}  # relative


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="gpt2", help="preset (default gpt2, 124M)")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256, help="context length (default 256)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), action="append", help="repeatable; default both")
    parser.add_argument("--contenders", nargs="+", choices=tuple(CONTENDERS), help="default: all that the device has")
    parser.add_argument("--recompute", default="none", metavar="PLAN", help="of ours, as in `peakgpt train`")
    parser.add_argument("--rounds", type=int, default=9)


def run(args: argparse.Namespace, device: torch.device) -> Findings:
    found, config = Findings(), preset(args.model)
    for dtype in args.dtype or ("float32", "bfloat16"):
        recipe = TrainConfig(batch=args.batch, tokens=args.tokens, dtype=getattr(torch, dtype), warmup=0.0,
                        recompute=args.recompute)  # fmt: skip
        found.results += compare_training(config, recipe, device, args.contenders, rounds=args.rounds)
    return found


def compare_training(
    config: GPTConfig,
    recipe: TrainConfig,
    device: torch.device,
    names: Sequence[str] | None = None,
    *,
    rounds: int = 9,
    budget_s: float | None = None,
    on_failure: OnFailure = raise_it,
) -> list[Result]:
    """Time one update of the same model by several contenders, from the same weights over the same batch.

    Args:
        config: the model.
        recipe: its batch geometry and dtype.
        device: on a GPU all contenders share this process; on CPU each has its own, whose allocator differs.
        names: of CONTENDERS; None means all that the device has.
        rounds, budget_s: see clock.interleave.
        on_failure: told of a contender that raises or has another loss than eager; the others are timed.
    Returns:
        A result a contender, with model FLOPs.
    """
    names = names or [n for n, c in CONTENDERS.items() if device.type == "cpu" or not c.environment]
    updates = CHECKED_STEPS if device.type == "cpu" else REPLAYED
    measured = measure(
        _starts(config, recipe, device, names), lambda name, s: [float(s.step()) for _ in range(updates)][-1],
        lambda name, losses: _learns_alike(name, losses, updates, recipe.dtype),
        rounds=rounds, device=device, budget_s=budget_s, on_failure=on_failure,
    )  # fmt: skip
    peak = peak_for(device, recipe.dtype)
    case = {"batch": recipe.batch, "tokens": recipe.tokens, "n_layer": config.n_layer, "n_embd": config.n_embd}
    if recipe.recompute != "none":
        case["recompute"] = recipe.recompute  # of ours
    return [
        Result.of(
            found.timing.noted(found.note), bench="train", case=case, contender=name,
            backend="auto" if name == "peakgpt" else "torch", device=str(device), dtype=_name(recipe.dtype),
            memory_bytes=found.memory_bytes, base_bytes=found.base_bytes,
            flops=training_flops(config, recipe.tokens) * recipe.batch * recipe.tokens, flops_kind="model",
            peak_flops_s=peak.flops_s, peak_source=peak.source,
        )
        for name, found in measured.items()
    ]  # fmt: skip


class Local:
    """A contender in this process, with a worker's interface.

    Its memory is what the second update holds: the first makes the optimizer's state, and one that is recorded later
    keeps its memory from then on.
    """

    pid, base_bytes, note = None, None, ""

    def __init__(self, trainer: Any, batch: tuple[Tensor, Tensor], device: torch.device):
        self.trainer, self.batch, self.device, self.steps, self.held = trainer, batch, device, 0, None

    def step(self) -> Tensor:
        """One update; its loss, not waited for."""
        self.steps += 1
        if self.steps == 2:
            loss: list[Tensor] = []
            self.held = allocated(lambda: loss.append(self.trainer.step(*self.batch)), self.device)
            return loss[0]
        return self.trainer.step(*self.batch)

    def memory_bytes(self) -> int | None:
        return self.held

    def close(self) -> None:
        del self.trainer


def _starts(
    config: GPTConfig, recipe: TrainConfig, device: torch.device, names: Sequence[str]
) -> Iterator[tuple[str, Callable[[], Stepper]]]:
    if device.type == "cpu":
        request = {"make": "peakgpt.bench.contenders:training_step", "threads": torch.get_num_threads(),
                   "config": dataclasses.asdict(config), "batch": recipe.batch, "tokens": recipe.tokens,
                   "dtype": _name(recipe.dtype), "warmup": recipe.warmup,
                   "recompute": recipe.recompute}  # fmt: skip
        for name in names:
            yield name, partial(Worker, name, {**request, "contender": name}, CONTENDERS[name].environment)
        return
    state, batch = start(config, recipe, device)
    for name in names:
        yield name, lambda name=name: Local(CONTENDERS[name].build(state, config, recipe, device), batch, device)


def _learns_alike(name: str, losses: Mapping[str, float], updates: int, dtype: torch.dtype) -> None:
    """
    Raises:
        ValueError: the loss is not eager's, or the first one's where eager does not run.
    """
    loss, reference = losses[name], losses.get("eager", next(iter(losses.values())))
    if not abs(loss - reference) <= TOLERANCE[dtype] * abs(reference):
        expected = f"expected {reference:.4f} within {TOLERANCE[dtype]:.1%}"
        raise ValueError(f"{name}: loss {loss:.4f} after {updates} updates, {expected}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
