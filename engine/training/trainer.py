"""One update of a model: forward, backward, gradient clipping, optimizer, and the average of the weights.

Parameters are bfloat16 if the hardware multiplies bfloat16, with the float32 master inside the optimizer; there is no
autocast.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peakgpt.engine.graph_capture import GraphedFunction, step_graphs
from peakgpt.engine.model.fp8 import set_fp8
from peakgpt.engine.model.quantized_linear import refuse_quantized
from peakgpt.engine.model.recompute import set_recompute
from peakgpt.engine.training.captured_state import model_state, runs_other_code, settings_of
from peakgpt.engine.training.gradient_memory import GradientMemory
from peakgpt.engine.training.layer_depths import GradualUnfreezing
from peakgpt.engine.training.muon import make_optimizer
from peakgpt.engine.training.optimizer import AdamW
from peakgpt.engine.training.schedule import Schedule
from peakgpt.engine.training.train_config import TrainConfig
from peakgpt.engine.training.weight_average import WeightAverage
from peakgpt.kernels.core.autograd import accumulate_into
from peakgpt.kernels.core.backends import forced_backend
from peakgpt.kernels.core.recording import recorder
from peakgpt.kernels.cpu.memory import keep_pages
from peakgpt.kernels.ops.linear_cross_entropy import IGNORE_INDEX

# How the tensors of a batch are passed to a model without `batch_names`: by the keyword, or "" by position.
BATCH_NAMES = ("", "", "position_ids")
# Micro-batches of a model with at most so many bytes of parameters get gradients of their own, so that a CPU runs them
# at the same time. A larger model keeps all cores busy with one product.
SEPARATE_BYTES = 32 << 20


class Trainer:
    """Updates a model in place, one batch per step.

    On CUDA a step is one CUDA graph. On a CPU the step of a small model that has no modules of others is recorded and
    replayed in the same way (engine/graph_capture.py). A model whose parameters have hooks runs without a replay.

    Attributes:
        steps: planned updates; may change between two steps, and the schedule follows.
        steps_done: updates made so far.
        schedule: batch size and learning rate of each update.
        lr: learning rate of the last step; 0 before a step.
        grad_norm: norm of the last step's gradients before clipping, a tensor () on the device; None before a step.
    """

    def __init__(
        self, model: nn.Module, config: TrainConfig, *, steps: int | None = None, fixed_shapes: bool = True
    ):
        """Cast the model to config.dtype and build its optimizer.

        A model is called as model(ids, targets) -> mean loss, with packed documents also with position_ids, and with
        micro-batches as model(ids, targets, loss_weight=...) -> sum of the weighted losses. A model whose batches have
        other tensors has two more attributes:

            batch_names: the keyword of each tensor of a batch; "" passes it by position.
            loss_weights(*batch): returns {keyword: tensor (B, ...)}, the factor of each term of the mean loss over a
                whole batch. Called with a micro-batch and its part of these tensors, the model returns the sum of its
                weighted terms.

        Args:
            model: the model.
            config: how to train.
            steps: planned updates; the length of the learning-rate schedule. None: from the config.
            fixed_shapes: whether all batches have the same shapes. Otherwise no step is captured for a replay.
        Raises:
            ValueError: `steps` contradicts the config, or the config has epochs, whose data only the caller knows; or
                the model has quantized weights and no parameter that trains.
        """
        if steps is not None and config.steps not in (None, steps):
            raise ValueError(f"Trainer: steps is {steps} and the config's is {config.steps}, expected one of the two")
        refuse_quantized(model, "Trainer")
        self.model, self.config, self.schedule, self.steps_done, self.lr = model, config, Schedule(config), 0, 0.0
        self.steps = self.schedule.steps() if steps is None else steps
        set_recompute(model, config.recompute)
        set_fp8(model, config.fp8)
        self.device = next(model.parameters()).device
        if self.device.type == "cpu":
            keep_pages()
        # The optimizer takes its float32 master before the parameters are rounded to config.dtype.
        self.optimizer = make_optimizer(model, config)
        self._lrs = [group["lr"] for group in self.optimizer.param_groups]
        share = config.gradual_unfreezing
        self.unfreezing = GradualUnfreezing(model, share) if share else None
        self.average = None if config.ema_decay is None else WeightAverage(self.optimizer, config.ema_decay)
        self.optimizer.register_load_state_dict_post_hook(self._set_lr)
        # A tensor on the device: a CUDA graph reads the new value at every replay.
        self.lr_scale = self.optimizer.lr_scale = torch.ones((), device=self.device)
        self.gradients = GradientMemory(self.optimizer)
        size = sum(parameter.nbytes for parameter in model.parameters())
        self.separate_gradients = self.device.type == "cpu" and size <= SEPARATE_BYTES
        self.grad_norm: Tensor | None = None
        self._names: Sequence[str] = getattr(model, "batch_names", BATCH_NAMES)
        graphs = step_graphs(self.device) if fixed_shapes else None
        self.update = GraphedFunction(self._update, graphs, self._captured_state)

    @property
    def batch(self) -> int:
        """The sequences of the next update."""
        return self.schedule.batch(self.steps_done)

    def step(self, *batch: Tensor) -> Tensor:
        """Make one update.

        Args:
            batch: what the model takes, on its device; the first dimension of each tensor is B. Of a GPT: ids and
                targets, (B, T) int64, targets already shifted by one; for packed documents also position_ids, (B, T)
                integers, position of each token in its document, which attends to itself alone.
        Returns:
            The mean loss before the update, detached, a tensor () on the device: reading it waits for the step.
        Raises:
            ValueError: someone else has changed the learning rate, which would have no effect.
        """
        if [group["lr"] for group in self.optimizer.param_groups] != self._lrs:
            raise ValueError(
                f"Trainer: lr of a parameter group is not the config's {self.config.lr}: the Trainer has a schedule of "
                "its own; use peakgpt.AdamW in a loop of your own with a scheduler of torch"
            )
        self.lr = self.schedule.lr(self.steps_done, self.steps)
        self.lr_scale.fill_(self.lr / self.config.lr)
        if self.unfreezing is not None:
            self.unfreezing.apply(self.steps_done, self.steps)
        if self.average is not None:
            self.average.set_step(self.steps_done)
        self._shapes = [tensor.shape for tensor in batch]
        has_graph = self.update.obstacle is None and not runs_other_code(self.model, self.optimizer, self.device)
        loss, self.grad_norm = (self.update if has_graph else self._update)(*batch)
        self.steps_done += 1
        return loss

    def _set_lr(self, optimizer: AdamW) -> None:
        for group, lr in zip(optimizer.param_groups, self._lrs, strict=True):
            group["lr"] = lr  # a loaded optimizer state may contain another lr

    def master_weights(self) -> dict[str, Tensor]:
        """Return the model's state dict in float32; see `AdamW.named_masters`."""
        return self.optimizer.master_weights(self.model)

    def validated_weights(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which the model has the weights that `saved_weights` yields, rounded to its dtype."""
        return contextlib.nullcontext() if self.average is None else self.average.in_place()

    # ---- checkpoints: the model folder has the weights, the training state has the rest ----

    def saved_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights of the model folder in float32: their average with ema_decay, else the masters."""
        source = self.optimizer.named_masters if self.average is None else self.average.named
        return source(self.model)

    def load_saved_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Load what `saved_weights` yields, bit for bit."""
        load = self.optimizer.load_master_weights if self.average is None else self.average.load
        load(self.model, weights)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that changes in training and is not in `saved_weights`. Tensors are not copied."""
        packed = self.optimizer.state_dict()
        entries = {i: {k: t for k, t in entry.items() if k != "remainder"} for i, entry in packed["state"].items()}
        state = {"steps_done": self.steps_done, "optimizer": {**packed, "state": entries}}
        return state if self.average is None else {**state, "weights": self.master_weights()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what `state_dict` returns, after `load_saved_weights`.

        Raises:
            ValueError: the state belongs to another model or optimizer.
        """
        if ("weights" in state) != (self.average is not None):
            got = "with" if "weights" in state else "without"
            raise ValueError(f"training state: got one {got} an average of the weights, expected ema_decay as it was")
        if self.average is not None:
            self.optimizer.load_master_weights(self.model, state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps_done = state["steps_done"]

    def _update(self, *batch: Tensor) -> tuple[Tensor, Tensor]:
        """Return (loss, gradient norm). A CUDA graph repeats it, so values that change must be in device memory."""
        with accumulate_into(self.gradients.zero()):
            loss = self._backward(*batch)
        self.gradients.drop_unwritten()
        self.optimizer.step()
        if self.average is not None:
            self.average.update()
        return loss, self.optimizer.grad_norm

    def _backward(self, *batch: Tensor) -> Tensor:
        """Accumulate the gradients of the mean loss over all targets that count; return that loss.

        Each token has the same weight, whatever micro-batch it is in.
        """
        size = self.config.micro_batch or len(batch[0])
        if len(batch[0]) <= size:
            return self._run_part(batch, {})
        weights = getattr(self.model, "loss_weights", _language_model_weights)(*batch)
        total = torch.zeros((), device=batch[0].device)
        pieces = zip(*(tensor.split(size) for tensor in (*batch, *weights.values())), strict=True)
        parts = [
            partial(self._run_part, piece[: len(batch)], dict(zip(weights, piece[len(batch) :], strict=True)))
            for piece in pieces
        ]
        for loss in self._run_separately(parts) if self.separate_gradients else (part() for part in parts):
            total += loss
        return total

    def _run_part(self, batch: Sequence[Tensor], weights: Mapping[str, Tensor]) -> Tensor:
        named = list(zip(self._names, batch, strict=False))  # a batch may have no position_ids
        positional = [tensor for name, tensor in named if not name]
        loss = self.model(*positional, **{name: tensor for name, tensor in named if name}, **weights)
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
        tensors = (t for p, state in states for t in (p.grad, *state.values()) if t is not None)
        averages = () if self.average is None else self.average.tensors.values()
        addresses = [tensor.data_ptr() for tensor in (*tensors, *averages)]
        options = [[value for key, value in group.items() if key != "params"] for group in self.optimizer.param_groups]
        settings = settings_of(self.device), self._shapes, forced_backend(), options
        return settings, self.optimizer.captured_state(), addresses, model_state(self.model)


def _language_model_weights(ids: Tensor, targets: Tensor, *position_ids: Tensor) -> dict[str, Tensor]:
    """Return the factor on the loss of each target; it is computed on the device, without a sync."""
    return {"loss_weight": (1.0 / (targets != IGNORE_INDEX).sum()).expand(targets.shape)}
