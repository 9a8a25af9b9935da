"""Contenders of training: peakgpt, PyTorch eager, torch.compile; on a CPU also PyTorch with a tuned allocator.

Eager is plain torch for GPT-2, and the model of transformers for other families, with the same training step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peakgpt.bench.contenders.contender import SEED, TUNED_ENVIRONMENT, Contender, State
from peakgpt.bench.contenders.eager_gpt import EagerGPT, EagerTrainer, is_gpt2
from peakgpt.engine.checkpoint.families.catalogue import family_of
from peakgpt.engine.checkpoint.model_folder import to_layout
from peakgpt.engine.gpt import GPT
from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.training.train_config import TrainConfig
from peakgpt.engine.training.trainer import Trainer

SCHEDULE_STEPS = 1000  # length of the learning-rate schedule, far more than any benchmark makes


def _loaded(model: nn.Module, state: State, device: torch.device) -> nn.Module:
    model = model.to(device)
    model.load_state_dict(state)
    return model


def _ours(state: State, config: GPTConfig, train_config: TrainConfig, device: torch.device) -> Trainer:
    with device:  # initializing a billion weights on the host would exceed the benchmark's time
        model = GPT(config)
    return Trainer(_loaded(model, state, device), train_config, steps=SCHEDULE_STEPS)


class TransformersGPT(nn.Module):
    """A model of transformers with SDPA attention: ids and targets (B, T) -> the mean loss."""

    def __init__(self, config: GPTConfig):
        from transformers import AutoConfig, AutoModelForCausalLM

        super().__init__()
        self.config = config
        # transformers writes into the nested dicts of what it is given, which belong to the config.
        content = deepcopy({**family_of(config).config_json(config), "use_cache": False})
        self.model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**content))

    def load_state_dict(self, state: State, strict: bool = True, assign: bool = False) -> Any:
        """Load weights under the names of peakgpt.GPT. A tied head has no tensor of its own."""
        theirs = dict(to_layout(self.config, state.keys(), state.items()))
        found = self.model.load_state_dict(theirs, strict=False, assign=assign)
        tied = {"lm_head.weight"} if self.config.tied_head else set()
        if found.unexpected_keys or set(found.missing_keys) - tied:
            raise ValueError(f"transformers: got other names of weights than expected: {found}")
        return found

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        logits = self.model(ids).logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)


def _eager(state: State, config: GPTConfig, train_config: TrainConfig, device: torch.device) -> EagerTrainer:
    model = EagerGPT(config) if is_gpt2(config) else TransformersGPT(config)
    return EagerTrainer(_loaded(model.train(), state, device), train_config, steps=SCHEDULE_STEPS)


def _compiled(state: State, config: GPTConfig, train_config: TrainConfig, device: torch.device) -> EagerTrainer:
    trainer = _eager(state, config, train_config, device)
    trainer.model = torch.compile(trainer.model)
    return trainer


# build(state, config, train_config, device) -> trainer with step(ids, targets) -> loss
TRAINING_CONTENDERS = {
    "peakgpt": Contender(_ours, package="peakgpt"),
    "eager": Contender(_eager),
    "eager, tuned malloc": Contender(_eager, TUNED_ENVIRONMENT),
    "compile": Contender(_compiled),
    "compile, tuned malloc": Contender(_compiled, TUNED_ENVIRONMENT),
}


def training_inputs(
    config: GPTConfig, train_config: TrainConfig, device: torch.device
) -> tuple[State, tuple[Tensor, Tensor]]:
    """Return the initial weights and the batch of every contender, the same in each process.

    Returns:
        (state dict, (ids, targets)); ids and targets are (B, T) int64 on the device.
    """
    torch.manual_seed(SEED)
    with device:
        state = GPT(config).state_dict()
    ids = torch.randint(config.vocab_size, (train_config.batch, train_config.tokens + 1)).to(device)
    return state, (ids[:, :-1].contiguous(), ids[:, 1:].contiguous())


def training_step(request: Mapping[str, Any]) -> Callable[[], float]:
    """Return a contender's training step on a CPU: `make` of a worker process.

    Args:
        request: contender, config, batch, tokens, dtype, warmup, recompute.
    Returns:
        A function that makes one update and returns its loss. It refers only to the trainer and the batch.
    """
    device, config = torch.device("cpu"), GPTConfig(**request["config"])
    train_config = TrainConfig(batch=request["batch"], tokens=request["tokens"], dtype=getattr(torch, request["dtype"]),
                    warmup=request["warmup"], recompute=request["recompute"])  # fmt: skip
    state, batch = training_inputs(config, train_config, device)
    trainer = TRAINING_CONTENDERS[request["contender"]].build(state, config, train_config, device)
    return lambda: float(trainer.step(*batch))
