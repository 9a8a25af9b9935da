"""The training step: recipe, schedule, and one update through the fused ops.

Parameters are bf16 where the hardware multiplies it, with the float32 master inside the optimizer; no autocast.
The learning rate warms up linearly and falls linearly to zero: Bergsma et al. 2025, "Straight to Zero",
arXiv:2502.15938.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peakgpt.engine.graph_capture import GraphedFunction, graph_factory
from peakgpt.engine.model.fp8 import set_fp8
from peakgpt.engine.model.recompute import parse, set_recompute
from peakgpt.engine.training.optimizer import AdamW, decay_groups
from peakgpt.kernels.core.autograd import accumulate_into
from peakgpt.kernels.cpu.memory import keep_pages
from peakgpt.kernels.hardware.device import describe

IGNORED = -100  # targets that do not count, as in torch


@dataclass(kw_only=True, frozen=True)
class Recipe:
    """How to train: batch geometry and optimizer settings.

    Args:
        batch: sequences an update. tokens: length of each.
        micro_batch: sequences that go through the model at a time, whose gradients are added; None means all.
        lr: peak learning rate. warmup: fraction of the steps that it rises over.
        weight_decay: on matrices only. max_norm: global gradient norm is clipped to this.
        dtype: of parameters, activations and gradients.
        recompute: which layers compute again in backward what they have not kept, as engine/model/recompute.py says.
        fp8: whether products take 8-bit operands, as engine/model/fp8.py says.
        seed: of initialisation and data order.
    """

    batch: int = 8
    tokens: int = 256
    micro_batch: int | None = None
    lr: float = 1e-3
    warmup: float = 0.05
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    max_norm: float = 1.0
    dtype: torch.dtype = torch.float32
    recompute: str = "none"
    fp8: bool = False
    seed: int = 1337

    def __post_init__(self) -> None:
        for name in ("batch", "tokens", "lr", "eps", "max_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"recipe: {name} is {getattr(self, name)}, expected more than 0")
        if self.micro_batch is not None and not 0 < self.micro_batch <= self.batch:
            raise ValueError(f"recipe: micro_batch is {self.micro_batch}, expected 1 to batch {self.batch}, or None")
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
    """Updates a model in place, one batch at a time; on CUDA the update is one graph (engine/graph_capture.py)."""

    def __init__(self, model: nn.Module, recipe: Recipe, *, steps: int):
        """Take over a model.

        Args:
            model: called as model(ids, targets) -> mean loss; with micro-batches as model(ids, targets,
                loss_weight=...) -> sum of the weighted losses. Cast to recipe.dtype here.
            recipe: how to train.
            steps: updates planned; the schedule's length.
        """
        self.model, self.recipe, self.steps, self.done = model, recipe, steps, 0
        set_recompute(model, recipe.recompute)
        set_fp8(model, recipe.fp8)
        device = next(model.parameters()).device
        if device.type == "cpu":
            keep_pages()
        # The optimizer takes its float32 master before the parameters are rounded.
        self.optimizer = AdamW(
            decay_groups(model, recipe.weight_decay), lr=recipe.lr, betas=recipe.betas, eps=recipe.eps,
            max_norm=recipe.max_norm, dtype=recipe.dtype,
        )  # fmt: skip
        self.rate = self.optimizer.rate = torch.ones((), device=device)  # of recipe.lr, by the schedule
        self.grad_norm: Tensor | None = None
        self.update = GraphedFunction(self._update, graph_factory(device), self._fixed)

    def step(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Make one update.

        Args:
            ids, targets: (B, T) int64 on the model's device, targets already shifted.
        Returns:
            The mean loss before the update, detached, on the device: reading it is what waits for it. So is
            `grad_norm`, the norm of the gradients before clipping.
        """
        self.rate.fill_(schedule(self.recipe, self.done, self.steps) / self.recipe.lr)
        loss, self.grad_norm = self.update(ids, targets)
        self.done += 1
        return loss

    def _update(self, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(loss, gradient norm); what changes from step to step is read from device memory."""
        self.optimizer.zero_grad()
        with accumulate_into(self.optimizer.gradients()):
            loss = self._backward(ids, targets)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.lr  # a state that was loaded may say otherwise
        self.optimizer.step()
        return loss, self.optimizer.grad_norm

    def _backward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Add the gradients of the mean loss over all targets that count, however they fall on micro-batches."""
        most = self.recipe.micro_batch or len(ids)
        if len(ids) <= most:
            loss = self.model(ids, targets)
            loss.backward()
            return loss.detach()
        weight = (1.0 / (targets != IGNORED).sum()).expand(targets.shape)  # on the device: nobody waits for the count
        total = torch.zeros((), device=ids.device)
        for part in zip(ids.split(most), targets.split(most), weight.split(most), strict=True):
            loss = self.model(*part[:2], loss_weight=part[2])
            loss.backward()
            total += loss.detach()
        return total

    def _fixed(self) -> tuple[Any, ...]:
        """What a recorded update takes as it was: where parameters and step counts lie, and how the model runs."""
        held = self.optimizer.state.items()
        return self.model.training, *((p.data_ptr(), state["step"].data_ptr()) for p, state in held)
