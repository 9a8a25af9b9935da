"""Who trains the same model: peakgpt, PyTorch eager, torch.compile; on CPU also PyTorch with a tuned allocator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from peakgpt.bench.eager_gpt import EagerGPT, EagerTrainer
from peakgpt.engine.gpt import GPT
from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.training.train_config import TrainConfig
from peakgpt.engine.training.trainer import Trainer

# glibc keeps freed blocks and backs them with huge pages: eager's bf16 step is 29 % shorter (bench/results, 2026-11).
TUNED_MALLOC = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=40000000000:glibc.malloc.hugetlb=1"
STEPS = 1000  # of the schedule; no benchmark comes near
SEED = 0

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Contender:
    """How one contender is built from a state, and the environment that its process starts with."""

    build: Callable[[State, GPTConfig, TrainConfig, torch.device], Any]
    environment: dict[str, str] = field(default_factory=dict)


def _loaded(model: nn.Module, state: State, device: torch.device) -> nn.Module:
    model = model.to(device)
    model.load_state_dict(state)
    return model


def _ours(state: State, config: GPTConfig, recipe: TrainConfig, device: torch.device) -> Trainer:
    with device:  # drawing a billion weights on the host takes longer than the benchmark may
        model = GPT(config)
    return Trainer(_loaded(model, state, device), recipe, steps=STEPS)


def _eager(state: State, config: GPTConfig, recipe: TrainConfig, device: torch.device) -> EagerTrainer:
    return EagerTrainer(_loaded(EagerGPT(config), state, device), recipe, steps=STEPS)


def _compiled(state: State, config: GPTConfig, recipe: TrainConfig, device: torch.device) -> EagerTrainer:
    trainer = _eager(state, config, recipe, device)
    trainer.model = torch.compile(trainer.model)
    return trainer


CONTENDERS = {
    "peakgpt": Contender(_ours),
    "eager": Contender(_eager),
    "eager, tuned malloc": Contender(_eager, {"GLIBC_TUNABLES": TUNED_MALLOC}),
    "compile": Contender(_compiled),
    "compile, tuned malloc": Contender(_compiled, {"GLIBC_TUNABLES": TUNED_MALLOC}),
}


def start(config: GPTConfig, recipe: TrainConfig, device: torch.device) -> tuple[State, tuple[Tensor, Tensor]]:
    """What every contender starts from, the same in each process.

    Returns:
        (state, (ids, targets)): initial weights; one random batch, both (B, T) int64, on the device.
    """
    torch.manual_seed(SEED)
    with device:
        state = GPT(config).state_dict()
    ids = torch.randint(config.vocab_size, (recipe.batch, recipe.tokens + 1)).to(device)
    return state, (ids[:, :-1].contiguous(), ids[:, 1:].contiguous())


def training_step(request: Mapping[str, Any]) -> Callable[[], float]:
    """A contender's training step on CPU, for a worker.

    Args:
        request: contender, config, batch, tokens, dtype, warmup, recompute.
    Returns:
        A function that makes one update and returns its loss; it holds nothing but the trainer and the batch.
    """
    device, config = torch.device("cpu"), GPTConfig(**request["config"])
    recipe = TrainConfig(batch=request["batch"], tokens=request["tokens"], dtype=getattr(torch, request["dtype"]),
                    warmup=request["warmup"], recompute=request["recompute"])  # fmt: skip
    state, batch = start(config, recipe, device)
    trainer = CONTENDERS[request["contender"]].build(state, config, recipe, device)
    return lambda: float(trainer.step(*batch))
