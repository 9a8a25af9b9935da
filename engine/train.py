"""The training step: recipe, schedule, and one update through the fused ops.

Parameters are bf16 where the hardware multiplies it, with the float32 master inside the optimizer; no autocast.
The learning rate warms up linearly and falls linearly to zero: Bergsma et al. 2025, "Straight to Zero",
arXiv:2502.15938.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peakgpt.engine.optim import AdamW, decay_groups
from peakgpt.engine.recompute import parse, set_recompute
from peakgpt.kernels.cpu.memory import keep_pages
from peakgpt.kernels.device import describe
from peakgpt.kernels.dispatch import accumulate_into


@dataclass(kw_only=True, frozen=True)
class Recipe:
    """How to train: batch geometry and optimizer settings.

    Args:
        batch: sequences an update. tokens: length of each.
        lr: peak learning rate. warmup: fraction of the steps that it rises over.
        weight_decay: on matrices only. max_norm: global gradient norm is clipped to this.
        dtype: of parameters, activations and gradients.
        recompute: which layers compute again in backward what they have not kept, as engine/recompute.py says.
        seed: of initialisation and data order.
    """

    batch: int = 8
    tokens: int = 256
    lr: float = 1e-3
    warmup: float = 0.05
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    max_norm: float = 1.0
    dtype: torch.dtype = torch.float32
    recompute: str = "none"
    seed: int = 1337

    def __post_init__(self) -> None:
        for name in ("batch", "tokens", "lr", "eps", "max_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"recipe: {name} is {getattr(self, name)}, expected more than 0")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"recipe: warmup is {self.warmup}, expected a fraction from 0 to below 1")
        if self.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"recipe: dtype is {self.dtype}, expected torch.float32 or torch.bfloat16")
        parse(self.recompute)


def best_dtype(device: torch.device | str) -> torch.dtype:
    """bfloat16 where the device has matrix instructions for it, else float32."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float32
    native = {"avx512_bf16", "amx_bf16", "bf16"} & set(describe(device).arch.split())
    return torch.bfloat16 if native else torch.float32


def schedule(recipe: Recipe, step: int, steps: int) -> float:
    """Learning rate of update number `step` (from 0) of `steps`."""
    warm = max(1, round(recipe.warmup * steps))
    return recipe.lr * min((step + 1) / warm, max(0, steps - step) / max(1, steps - warm))


class Trainer:
    """Updates a model in place, one batch at a time."""

    def __init__(self, model: nn.Module, recipe: Recipe, *, steps: int):
        """Take over a model.

        Args:
            model: called as model(ids, targets) -> mean loss; cast to recipe.dtype here.
            recipe: how to train.
            steps: updates planned; the schedule's length.
        """
        self.model, self.recipe, self.steps, self.done = model, recipe, steps, 0
        set_recompute(model, recipe.recompute)
        if next(model.parameters()).device.type == "cpu":
            keep_pages()
        # The optimizer takes its float32 master before the parameters are rounded.
        self.optimizer = AdamW(
            decay_groups(model, recipe.weight_decay), lr=recipe.lr, betas=recipe.betas, eps=recipe.eps,
            max_norm=recipe.max_norm, dtype=recipe.dtype,
        )  # fmt: skip

    def step(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Make one update.

        Args:
            ids, targets: (B, T) int64 on the model's device, targets already shifted.
        Returns:
            The mean loss before the update, detached, on the device: reading it is what waits for it.
        """
        self.optimizer.zero_grad()
        with accumulate_into(self.optimizer.gradients()):
            loss = self.model(ids, targets)
            loss.backward()
        for group in self.optimizer.param_groups:
            group["lr"] = schedule(self.recipe, self.done, self.steps)
        self.optimizer.step()
        self.done += 1
        return loss.detach()
