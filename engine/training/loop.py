"""The training loop: an iterator of events. The caller prints, logs and saves between them.

    validator = Validator(model, {"validation": shards[1]}, ValidationConfig(), batch=8, tokens=256)
    loop = TrainingLoop(Trainer(model, config, steps=1000), Batches(shards[0], 8, 256, seed=0), validator)
    for event in loop.run(validate_every=250):
        print(event)

`CheckpointManager` (checkpoint_manager.py) saves a loop, and continues it bit for bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from peakgpt.engine.checkpoint.model_folder import TokenizerFiles, write_model
from peakgpt.engine.model.flops import mfu, recomputed_flops, trained_weights, training_flops
from peakgpt.engine.model.positions import refuse_relative_positions
from peakgpt.engine.training.delayed_metrics import DelayedMetrics
from peakgpt.engine.training.figures import significant
from peakgpt.engine.training.loss_spikes import LossSpike, SpikeDetector
from peakgpt.engine.training.random_state import RandomState
from peakgpt.engine.training.skipped_steps import SkippedStep, SkippedSteps
from peakgpt.engine.training.trainer import Trainer
from peakgpt.engine.training.validation import BestValidation, ValidationMetrics
from peakgpt.kernels.hardware.peaks import peak_flops_s

PEAK_MEASUREMENTS = 4  # most in a run, each about a second


@dataclass(frozen=True)
class StepMetrics:
    """One update has finished.

    Args:
        step: its number, from 1.
        loss: mean loss of its batch before the update, in nats per token.
        tokens_per_s: training speed since the step before.
        seconds: since the step before.
        lr: learning rate of the update.
        grad_norm: norm of the gradients before clipping.
        mfu: model FLOPs utilization, 0 to 1; None without `report_mfu`.
        hfu: the same with recomputed FLOPs counted; None if nothing is recomputed.
    """

    step: int
    loss: float
    tokens_per_s: float
    seconds: float
    lr: float | None = None
    grad_norm: float | None = None
    mfu: float | None = None
    hfu: float | None = None

    def row(self) -> dict[str, Any]:
        """Return the event as a line of metrics.jsonl."""
        rest = {name: getattr(self, name) for name in ("tokens_per_s", "lr", "grad_norm", "mfu", "hfu")}
        return {
            "step": self.step,
            "loss": self.loss,
            **{name: significant(value) for name, value in rest.items() if value is not None},
        }


@dataclass(frozen=True)
class SaveDue:
    """The loop should be saved now: all metrics and validations of earlier steps have been yielded.

    Args:
        step: updates made so far.
    """

    step: int


class Update(NamedTuple):
    """An update that has been started. Its loss and gradient norm reach the host later.

    Args:
        step: its number, from 1.
        batch: its sequences.
        tokens: of them, without padding.
        lr: its learning rate.
        position: in the data, before its batch.
    """

    step: int
    batch: int
    tokens: int
    lr: float
    position: dict[str, Any] | None


class Stateful(Protocol):
    """A part of the loop whose state changes in training, so that every checkpoint contains it."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state: dicts, lists and tuples of tensors, numbers and strings."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned."""


Event = StepMetrics | SkippedStep | LossSpike | ValidationMetrics | SaveDue


class TrainingLoop:
    """Trains a model on batches and evaluates it.

    Attributes:
        parts: everything whose state changes in training, by name; a checkpoint has the state of each. Add parts of
            your own before the first step, and before a checkpoint is loaded.
    """

    def __init__(
        self,
        trainer: Trainer,
        batches: Iterator[tuple[Tensor, ...]],
        validator: BestValidation | None = None,
        *,
        report_mfu: bool = False,
    ):
        """
        Args:
            trainer: makes the updates. Its model needs a `config`, a GPTConfig.
            batches: of tensors that `Trainer.step` takes; `peakgpt.engine.data.batches.Batches` can be resumed. Batches
                with padding have `tokens_seen`, the number of tokens of all batches so far without their padding.
            validator: evaluates the model.
            report_mfu: whether the events include MFU. If the device has no datasheet, its peak is measured first, for
                about a second.
        Raises:
            ValueError: too few validation tokens, or sequences longer than the model's block_size.
        """
        config, model_config = trainer.config, trainer.model.config
        if config.tokens > model_config.block_size:
            raise ValueError(f"tokens is {config.tokens}, expected at most the model's {model_config.block_size}")
        if len(trainer.schedule.stages) > 1 and not hasattr(batches, "take"):
            raise ValueError("TrainingLoop: got an iterator for a batch that grows, expected Batches")
        if config.mask_documents != (getattr(batches, "document_token", None) is not None):
            raise ValueError(
                f"TrainingLoop: mask_documents is {config.mask_documents}, expected batches with a document_token for "
                "True, and without for False"
            )
        if config.mask_documents:
            refuse_relative_positions(model_config)
        self.trainer, self.batches, self.validator = trainer, batches, validator
        self.parts: dict[str, Stateful] = {
            "trainer": trainer, "data": batches, "random": RandomState(trainer.device),
        }  # fmt: skip
        self.skipped = SkippedSteps()
        self.spikes = None if config.spike_sigma is None else SpikeDetector(config)
        if self.spikes is not None:
            self.parts["spikes"] = self.spikes
        if validator is not None:
            self.parts["validation"] = validator
        self._delayed = DelayedMetrics(trainer.device)
        self._describe: Callable[[dict[str, Any], int], str] | None = getattr(batches, "describe", None)
        self.flops_per_token = training_flops(model_config, config.tokens, **trained_weights(trainer.model))
        self.recomputed_flops_per_token = recomputed_flops(model_config, config.tokens, config.recompute)
        self.peak_flops_s = peak_flops_s(trainer.device, config.dtype) if report_mfu else None
        self._peak_measurements = 1

    @property
    def finished(self) -> bool:
        """Whether all planned updates are made, or the validator has stopped the run early."""
        return self.trainer.steps_done >= self.trainer.steps or self.stopped_early

    @property
    def stopped_early(self) -> bool:
        """Whether the validations have not become better for too long."""
        return self.validator is not None and self.validator.should_stop

    def run(
        self,
        steps: int | None = None,
        *,
        validate_every: int | None = None,
        save_every: int | None = None,
        should_stop: Callable[[], bool] = lambda: False,
        synchronous: bool = False,
    ) -> Iterator[Event]:
        """Train, and yield an event per step, per validation and per save.

        Between two events the caller may save, load, validate and print. On CUDA the metrics of a step arrive while the
        next step runs. After a skipped step there is no validation and no save until a step is finite.

        Args:
            steps: at most this many updates. None: all that the trainer has planned.
            validate_every: validate after each multiple of this many updates, and after the last planned one. All
                metrics of earlier steps have arrived by then. None: never.
            save_every: yield SaveDue after each multiple of this many updates, and before the run ends. None: never.
            should_stop: called before each step; True ends the run. It may change the number of planned updates,
                `trainer.steps`.
            synchronous: wait for each step before the next one starts, for benchmarks.
        Raises:
            Diverged: ten updates in a row were skipped, because their losses or gradient norms are not finite, or the
                last one of the run was. What was saved before is the last good state.
            FloatingPointError: a validation loss is not finite.
            ValueError: `validate_every` without a validator.
        """
        if validate_every and self.validator is None:
            raise ValueError(f"TrainingLoop: got validate_every={validate_every} without a validator, expected both")
        trainer = self.trainer
        end = math.inf if steps is None else trainer.steps_done + steps
        validated, saved = trainer.steps_done, None
        self._last_step_s = time.perf_counter()
        while not should_stop() and not self.finished and trainer.steps_done < end:
            arrived, step = self._step(synchronous=synchronous), trainer.steps_done
            yield from self._events(arrived)
            validates = bool(validate_every) and step % validate_every == 0
            saves = bool(save_every) and step % save_every == 0 and step < min(end, trainer.steps)
            if validates or saves:
                yield from self._events(self._delayed.take())
            if trainer.steps_done != step or self.skipped.in_a_row:  # rolled back, or no weights to keep
                continue
            if validates:
                yield self.validate()
                validated = step
            if saves:
                yield SaveDue(saved := step)
            if validates or saves:
                self._last_step_s = time.perf_counter()  # neither validation nor the caller's save counts
        yield from self._events(self._delayed.take())
        self.skipped.require_end(trainer.steps_done, finished=self.finished)
        if validate_every and self.finished and trainer.steps_done > validated:
            yield self.validate()
        if save_every and not self.skipped.in_a_row and saved != trainer.steps_done:
            yield SaveDue(trainer.steps_done)

    def _step(self, *, synchronous: bool) -> list[tuple[Update, float, float]]:
        """Make one update; return the (update, loss, gradient norm) that have reached the host by then."""
        trainer, batch = self.trainer, self.trainer.batch
        position = None if self._describe is None else self.batches.state_dict()
        seen = getattr(self.batches, "tokens_seen", None)
        tensors = self._next_batch(batch)
        tokens = batch * trainer.config.tokens if seen is None else self.batches.tokens_seen - seen
        loss = trainer.step(*tensors)
        update = Update(trainer.steps_done, batch, tokens, trainer.lr, position)
        arrived = self._delayed.put(update, loss, trainer.grad_norm)
        return arrived + self._delayed.take() if synchronous else arrived

    def _next_batch(self, batch: int) -> tuple[Tensor, ...]:
        tensors = next(self.batches) if batch == self.trainer.config.batch else self.batches.take(batch)
        device = self.trainer.device
        if device.type == "cuda":  # a copy from unpinned memory would wait for the step that is running
            tensors = tuple(tensor if tensor.is_cuda else tensor.pin_memory() for tensor in tensors)
        return tuple(tensor.to(device, non_blocking=True) for tensor in tensors)

    def _events(self, arrived: Iterable[tuple[Update, float, float]]) -> Iterator[Event]:
        """Yield the events of updates whose loss and gradient norm have just reached the host."""
        for update, loss, norm in arrived:
            previous_s, self._last_step_s = self._last_step_s, time.perf_counter()
            if skipped := self.skipped.check(update.step, loss, norm, lambda update=update: self._batch_of(update)):
                yield skipped
                self.skipped.require_end(update.step, finished=False)
                continue
            step_s = self._last_step_s - previous_s
            yield self.step_metrics(update.step, loss, step_s, tokens=update.tokens, lr=update.lr, grad_norm=norm)
            if self.spikes is not None and (spike := self.spikes.check(update.step, loss)):
                yield spike

    def _batch_of(self, update: Update) -> str:
        return "unknown" if self._describe is None else self._describe(update.position, update.batch)

    def step_metrics(
        self, step: int, loss: float, step_s: float, *, tokens: int | None = None, lr: float | None = None,
        grad_norm: float | None = None,
    ) -> StepMetrics:  # fmt: skip
        """Return the metrics of a step that took step_s seconds, by any contender; None: tokens of a whole batch."""
        config, recomputed = self.trainer.config, self.recomputed_flops_per_token
        speed = (tokens or config.batch * config.tokens) / step_s
        peak = self._peak_above(speed * (self.flops_per_token + recomputed))
        return StepMetrics(
            step, loss, speed, step_s, lr, grad_norm,
            mfu=mfu(speed, self.flops_per_token, peak) if peak else None,
            hfu=mfu(speed, self.flops_per_token + recomputed, peak) if peak and recomputed else None,
        )  # fmt: skip

    def _peak_above(self, flops_s: float) -> float | None:
        """Return the peak; measure it again if a step had more FLOP/s, because the machine was busy at the start."""
        if self.peak_flops_s and flops_s > self.peak_flops_s and self._peak_measurements < PEAK_MEASUREMENTS:
            self._peak_measurements += 1
            self.peak_flops_s = peak_flops_s(self.trainer.device, self.trainer.config.dtype, again=True)
            self._last_step_s = time.perf_counter()  # the measurement is no part of the next step
        return self.peak_flops_s

    def validate(self, batches: int | None = None) -> ValidationMetrics:
        """Evaluate the model. With ema_decay, evaluate the average of its weights.

        Args:
            batches: of each held-out set; None means the config's number.
        Raises:
            ValueError: the loop has no validator.
            FloatingPointError: a loss is not finite.
        """
        if self.validator is None:
            raise ValueError("TrainingLoop: got no validator, expected one")
        with self.trainer.validated_weights():
            return self.validator.validate(self.trainer.steps_done, batches=batches)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of all parts; with `Trainer.saved_weights`, all that the next steps depend on."""
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
        """Continue from a state.

        Args:
            state: from `state_dict`.
            weights: from `Trainer.saved_weights`.
        Raises:
            ValueError: the state has other parts, or belongs to another model or other data.
        """
        if state.keys() != self.parts.keys():
            raise ValueError(f"training state: got {', '.join(state)}, expected {', '.join(self.parts)}")
        self.trainer.load_saved_weights(weights)
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        # Steps that are still running belong to the state before.
        self._delayed, self.skipped = DelayedMetrics(self.trainer.device), SkippedSteps()

    def save_model(self, folder: Path | str, tokenizer: TokenizerFiles | None = None) -> None:
        """Write the model alone, from the optimizer's float32 master.

        Raises:
            OSError: the folder cannot be written; an earlier model is still there.
            FloatingPointError: a weight is not finite; nothing is written.
        """
        weights, model = dict(self.trainer.saved_weights()), self.trainer.model
        require_finite_weights(self.trainer.steps_done, weights)
        write_model(folder, model.config, weights, tokenizer, source_files=model.source_files)


def require_finite_weights(step: int, weights: Mapping[str, Tensor]) -> None:
    """Check the weights after a step.

    Raises:
        FloatingPointError: a weight is not finite.
    """
    for name, tensor in weights.items():
        # numpy uses one thread. In the thread that saves, torch would start a second team of threads on all cores.
        if not (torch.isfinite(tensor).all() if tensor.is_cuda else np.isfinite(tensor.float().numpy()).all()):
            raise FloatingPointError(f"step {step}: {name} has values that are not finite, expected only numbers")
