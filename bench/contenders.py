"""Who trains the same model: peakgpt, PyTorch eager, torch.compile; on CPU also PyTorch with a tuned allocator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peakgpt.bench.eager_gpt import EagerGPT, EagerTrainer
from peakgpt.engine.config import GPTConfig
from peakgpt.engine.model import GPT
from peakgpt.engine.train import Recipe, Trainer

# glibc keeps freed blocks and backs them with huge pages: half of what PyTorch loses on CPU is page faults.
TUNED_MALLOC = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=40000000000:glibc.malloc.hugetlb=1"


@dataclass(frozen=True)
class Contender:
    """How one contender is built, and the environment that its process starts with."""

    build: Callable[[GPTConfig, Recipe, torch.device], Any]
    environment: dict[str, str]


def _ours(config: GPTConfig, recipe: Recipe, device: torch.device) -> Trainer:
    return Trainer(GPT(config).to(device), recipe, steps=1000)


def _eager(config: GPTConfig, recipe: Recipe, device: torch.device) -> EagerTrainer:
    return EagerTrainer(EagerGPT(config).to(device), recipe, steps=1000)


def _compiled(config: GPTConfig, recipe: Recipe, device: torch.device) -> EagerTrainer:
    trainer = _eager(config, recipe, device)
    trainer.model: nn.Module = torch.compile(trainer.model)
    return trainer


CONTENDERS = {
    "peakgpt": Contender(_ours, {}),
    "eager": Contender(_eager, {}),
    "eager, tuned malloc": Contender(_eager, {"GLIBC_TUNABLES": TUNED_MALLOC}),
    "compile": Contender(_compiled, {}),
    "compile, tuned malloc": Contender(_compiled, {"GLIBC_TUNABLES": TUNED_MALLOC}),
}


def random_batch(config: GPTConfig, recipe: Recipe, device: torch.device) -> tuple[Tensor, Tensor]:
    """(ids, targets), both (B, T) int64 over the whole vocabulary."""
    ids = torch.randint(config.vocab_size, (recipe.batch, recipe.tokens + 1), device=device)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
