"""One update of a model: forward, backward, gradient clipping, AdamW.

Parameters are bfloat16 if the hardware multiplies bfloat16, with the float32 master inside the optimizer; there is no
autocast.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peakgpt.engine.graph_capture import GraphedFunction, step_graphs
from peakgpt.engine.model.fp8 import set_fp8
from peakgpt.engine.model.plain import has_own_call, walk
from peakgpt.engine.model.recompute import set_recompute
from peakgpt.engine.training.gradient_memory import GradientMemory
from peakgpt.engine.training.optimizer import AdamW, decay_groups
from peakgpt.engine.training.schedule import learning_rate
from peakgpt.engine.training.train_config import TrainConfig
from peakgpt.kernels.core.autograd import accumulate_into
from peakgpt.kernels.core.backends import forced_backend
from peakgpt.kernels.core.recording import recorder
from peakgpt.kernels.cpu.memory import keep_pages
from peakgpt.kernels.ops.linear_cross_entropy import IGNORE_INDEX

# Micro-batches of a model with at most so many bytes of parameters get gradients of their own, so that a CPU runs them
# at the same time. A larger model keeps all cores busy with one product.
SEPARATE_BYTES = 32 << 20


class Trainer:
    """Updates a model in place, one batch per step; on CUDA a step is one CUDA graph (engine/graph_capture.py).

    Attributes:
        steps_done: updates made so far.
        grad_norm: norm of the last step's gradients before clipping, a tensor () on the device; None before a step.
    """

    def __init__(self, model: nn.Module, config: TrainConfig, *, steps: int):
        """Cast the model to config.dtype and build its optimizer.

        Args:
            model: called as model(ids, targets) -> mean loss; with micro-batches as model(ids, targets,
                loss_weight=...) -> sum of the weighted losses.
            config: how to train.
            steps: planned updates; the length of the learning-rate schedule.
        """
        self.model, self.config, self.steps, self.steps_done = model, config, steps, 0
        set_recompute(model, config.recompute)
        set_fp8(model, config.fp8)
        self.device = next(model.parameters()).device
        if self.device.type == "cpu":
            keep_pages()
        # The optimizer takes its float32 master before the parameters are rounded to config.dtype.
        self.optimizer = AdamW(
            decay_groups(model, config.weight_decay), lr=config.lr, betas=config.betas, eps=config.eps,
            max_norm=config.max_norm, dtype=config.dtype,
        )  # fmt: skip
        self.optimizer.register_load_state_dict_post_hook(self._set_lr)
        # A tensor on the device: a CUDA graph reads the new value at every replay.
        self.lr_scale = self.optimizer.lr_scale = torch.ones((), device=self.device)
        self.gradients = GradientMemory(self.optimizer)
        size = sum(p.nbytes for group in self.optimizer.param_groups for p in group["params"])
        self.separate_gradients = self.device.type == "cpu" and size <= SEPARATE_BYTES
        self.grad_norm: Tensor | None = None
        self.update = GraphedFunction(self._update, step_graphs(self.device), self._captured_state)

    def step(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Make one update.

        Args:
            ids, targets: (B, T) int64 on the model's device; targets are already shifted by one.
        Returns:
            The mean loss before the update, detached, a tensor () on the device: reading it waits for the step.
        Raises:
            ValueError: someone else has changed the learning rate, which would have no effect.
        """
        if any(group["lr"] != self.config.lr for group in self.optimizer.param_groups):
            raise ValueError(
                f"Trainer: lr of a parameter group is not the config's {self.config.lr}: the Trainer has a schedule of "
                "its own; use peakgpt.AdamW in a loop of your own with a scheduler of torch"
            )
        self.lr_scale.fill_(learning_rate(self.config, self.steps_done, self.steps) / self.config.lr)
        # The replay of a graph calls no hook.
        is_hooked = self.update.obstacle is None and any(map(has_own_call, walk(self.model)))
        loss, self.grad_norm = (self._update if is_hooked else self.update)(ids, targets)
        self.steps_done += 1
        return loss

    def _set_lr(self, optimizer: AdamW) -> None:
        for group in optimizer.param_groups:
            group["lr"] = self.config.lr  # a loaded optimizer state may contain another lr

    def master_weights(self) -> dict[str, Tensor]:
        """Return the model's state dict in float32; see `AdamW.master_weights`."""
        return self.optimizer.master_weights(self.model)

    def _update(self, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return (loss, gradient norm). A CUDA graph repeats it, so values that change must be in device memory."""
        with accumulate_into(self.gradients.zero()):
            loss = self._backward(ids, targets)
        self.gradients.drop_unwritten()
        self.optimizer.step()
        return loss, self.optimizer.grad_norm

    def _backward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Accumulate the gradients of the mean loss over all targets that count; return that loss.

        Each token has the same weight, whatever micro-batch it is in.
        """
        size = self.config.micro_batch or len(ids)
        if len(ids) <= size:
            loss = self.model(ids, targets)
            loss.backward()
            return loss.detach()
        weight = (1.0 / (targets != IGNORE_INDEX).sum()).expand(targets.shape)  # computed on the device, without a sync
        batches = zip(ids.split(size), targets.split(size), weight.split(size), strict=True)
        parts = [partial(self._run_part, *batch) for batch in batches]
        total = torch.zeros((), device=ids.device)
        losses = self._run_separately(parts) if self.separate_gradients else [part() for part in parts]
        for loss in losses:
            total += loss
        return total

    def _run_part(self, ids: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
        loss = self.model(ids, targets, loss_weight=weight)
        loss.backward()
        return loss.detach()

    def _run_separately(self, parts: Sequence[Callable[[], Tensor]]) -> list[Tensor]:
        """Run micro-batches with gradients of their own, which are then added in the order of the parts.

        A recording replays them at the same time, each on one core, unless they draw random numbers. Then, and outside
        of a recording, they run one after the other, and the sums have the same bits.
        """
        memories = [GradientMemory(self.optimizer) for _ in parts[1:]]

        def run(memory: GradientMemory, part: Callable[[], Tensor]) -> Tensor:
            with accumulate_into(memory.zero()):
                return part()

        parts = [parts[0], *(partial(run, *pair) for pair in zip(memories, parts[1:], strict=True))]
        recording = recorder()
        losses = recording.capture_parallel(parts) if recording else []
        losses = losses or [part() for part in parts]
        self.gradients.add(memories)
        return losses

    def _captured_state(self) -> tuple[Any, ...]:
        """Return everything that a captured update depends on; the update is captured again when it changes."""
        states = self.optimizer.state.items()
        tensors = (t for p, state in states for t in (p, p.grad, *state.values()) if t is not None)
        addresses = [tensor.data_ptr() for tensor in tensors]
        options = [[value for key, value in group.items() if key != "params"] for group in self.optimizer.param_groups]
        settings = self.model.training, forced_backend(), torch.get_num_threads(), options
        return settings, self.optimizer.captured_state(), addresses, walk(self.model)
