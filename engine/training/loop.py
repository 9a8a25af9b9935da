"""The training loop: an iterator of events. The caller prints, logs and saves between them.

    loop = TrainingLoop(Trainer(model, config, steps=1000), Batches(shards, 8, 256, seed=0), validation_shards)
    for event in loop.run(validate_every=250):
        print(event)
        if isinstance(event, ValidationMetrics):
            loop.save("runs/mine", tokenizer)

A loop over the same data that starts with `loop.load("runs/mine")` continues bit for bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peakgpt.engine.checkpoint.model_folder import TokenizerFiles, write_model
from peakgpt.engine.checkpoint.training_state import load_training_state, save_training_state
from peakgpt.engine.data.batches import validation_batches
from peakgpt.engine.data.run_layout import CHECKPOINT, STATE
from peakgpt.engine.data.shards import TokenShards
from peakgpt.engine.model.flops import mfu, recomputed_flops, training_flops
from peakgpt.engine.training.delayed_metrics import DelayedMetrics
from peakgpt.engine.training.evaluate import validation_loss
from peakgpt.engine.training.trainer import Trainer
from peakgpt.kernels.hardware.peaks import peak_for

VALIDATION_BATCHES = 32


@dataclass(frozen=True)
class StepMetrics:
    """One update has finished.

    Args:
        step: its number, from 1.
        loss: mean loss of its batch before the update, in nats per token.
        tokens_per_s: training speed since the step before.
        mfu: model FLOPs utilization, 0 to 1; None without `report_mfu`.
        hfu: the same with recomputed FLOPs counted; None if nothing is recomputed.
    """

    step: int
    loss: float
    tokens_per_s: float
    mfu: float | None = None
    hfu: float | None = None

    def row(self) -> dict[str, Any]:
        """Return the event as a line of metrics.jsonl."""
        utilization = {"mfu": self.mfu, "hfu": self.hfu}
        return {
            "step": self.step,
            "loss": self.loss,
            "tokens_per_s": round(self.tokens_per_s, 1),
            **{name: round(value, 4) for name, value in utilization.items() if value is not None},
        }


@dataclass(frozen=True)
class ValidationMetrics:
    """The model was evaluated on the validation tokens.

    Args:
        step: updates made so far.
        loss: mean loss in nats per token.
        bits_per_byte: the loss in bits per UTF-8 byte of text.
    """

    step: int
    loss: float
    bits_per_byte: float

    def row(self) -> dict[str, Any]:
        """Return the event as a line of metrics.jsonl."""
        return {"step": self.step, "validation_loss": self.loss, "bits_per_byte": self.bits_per_byte}


class TrainingLoop:
    """Trains a model on batches, evaluates it, saves it, and resumes it."""

    def __init__(
        self,
        trainer: Trainer,
        batches: Iterator[tuple[Tensor, Tensor]],
        validation: TokenShards | None = None,
        *,
        report_mfu: bool = False,
    ):
        """
        Args:
            trainer: makes the updates. Its model needs a `config`, a GPTConfig.
            batches: of (ids, targets), (B, T) int64 each; `peakgpt.engine.data.batches.Batches` can be resumed.
            validation: tokens to evaluate on.
            report_mfu: whether the events include MFU. If the device has no datasheet, its peak is measured first, for
                some seconds.
        Raises:
            ValueError: too few validation tokens, or sequences longer than the model's block_size.
        """
        config, model_config = trainer.config, trainer.model.config
        if config.tokens > model_config.block_size:
            raise ValueError(f"tokens is {config.tokens}, expected at most the model's {model_config.block_size}")
        if validation is not None:
            validation_batches(validation, config.batch, config.tokens)  # raises now, not after hours of training
        self.trainer, self.batches, self.validation = trainer, batches, validation
        self.flops_per_token = training_flops(model_config, config.tokens)
        self.recomputed_flops_per_token = recomputed_flops(model_config, config.tokens, config.recompute)
        self.peak_flops_s = peak_for(trainer.device, config.dtype).flops_s if report_mfu else None

    @property
    def finished(self) -> bool:
        """Whether all planned updates are made."""
        return self.trainer.steps_done >= self.trainer.steps

    def run(
        self,
        steps: int | None = None,
        *,
        validate_every: int | None = None,
        validation_batches: int = VALIDATION_BATCHES,
        should_stop: Callable[[], bool] = lambda: False,
        synchronous: bool = False,
    ) -> Iterator[StepMetrics | ValidationMetrics]:
        """Train, and yield an event per step and per validation.

        Between two events the caller may save, validate and print. On CUDA the metrics of a step arrive while the next
        step runs.

        Args:
            steps: at most this many updates. None: all that the trainer has planned.
            validate_every: validate after each multiple of this many updates, and after the last planned one. All
                metrics of earlier steps have arrived by then. None: never.
            validation_batches: of one validation, at most.
            should_stop: called before each step; True ends the run.
            synchronous: wait for each step before the next one starts, for benchmarks.
        Raises:
            FloatingPointError: a loss or a gradient norm is not finite. The row of that step comes before. Do not save
                after it: what was saved before is the last good state.
        """
        trainer, device = self.trainer, self.trainer.device
        losses, norms = DelayedMetrics(device), DelayedMetrics(device)
        end = trainer.steps if steps is None else min(trainer.steps, trainer.steps_done + steps)
        self._last_step_s = time.perf_counter()
        while trainer.steps_done < end and not should_stop():
            loss = trainer.step(*self._next_batch())
            step = trainer.steps_done
            if synchronous:
                yield from self._metrics([(step, float(loss))], [(step, float(trainer.grad_norm))])
            else:
                yield from self._metrics(losses.put(step, loss), norms.put(step, trainer.grad_norm))
            if validate_every and (step % validate_every == 0 or self.finished):
                yield from self._metrics(losses.take(), norms.take())
                yield self.validate(validation_batches)
                self._last_step_s = time.perf_counter()  # neither validation nor the caller's save counts
        yield from self._metrics(losses.take(), norms.take())

    def _next_batch(self) -> tuple[Tensor, ...]:
        pair, device = next(self.batches), self.trainer.device
        if device.type == "cuda":  # a copy from unpinned memory would wait for the step that is running
            pair = tuple(tensor if tensor.is_cuda else tensor.pin_memory() for tensor in pair)
        return tuple(tensor.to(device, non_blocking=True) for tensor in pair)

    def _metrics(
        self, losses: Iterable[tuple[int, float]], norms: Iterable[tuple[int, float]]
    ) -> Iterator[StepMetrics]:
        """Yield the metrics of (step, loss) and (step, gradient norm) pairs that have just reached the host."""
        for (step, loss), (_, norm) in zip(losses, norms, strict=True):
            previous_s, self._last_step_s = self._last_step_s, time.perf_counter()
            yield self.step_metrics(step, loss, self._last_step_s - previous_s)
            _require_finite(step, "the loss", loss)
            _require_finite(step, "the norm of the gradients", norm)

    def step_metrics(self, step: int, loss: float, step_s: float) -> StepMetrics:
        """Return the metrics of a step of this loop's size that took step_s seconds, by any contender."""
        config, peak, recomputed = self.trainer.config, self.peak_flops_s, self.recomputed_flops_per_token
        speed = config.batch * config.tokens / step_s
        return StepMetrics(
            step, loss, speed,
            mfu=mfu(speed, self.flops_per_token, peak) if peak else None,
            hfu=mfu(speed, self.flops_per_token + recomputed, peak) if peak and recomputed else None,
        )  # fmt: skip

    def validate(self, batches: int = VALIDATION_BATCHES) -> ValidationMetrics:
        """Evaluate the model on the first batches of the validation tokens.

        Raises:
            ValueError: the loop has no validation tokens.
            FloatingPointError: the loss is not finite.
        """
        if self.validation is None:
            raise ValueError("TrainingLoop: got no validation tokens, expected TokenShards")
        config = self.trainer.config
        loss = validation_loss(self.trainer.model, self.validation, config.batch, config.tokens, batches=batches)
        _require_finite(self.trainer.steps_done, "the validation loss", loss)
        return ValidationMetrics(self.trainer.steps_done, loss, self.validation.bits_per_byte(loss))

    def save(self, folder: Path | str, tokenizer: TokenizerFiles | None = None) -> None:
        """Write the model for inference, and the training state that `load` resumes from.

        Args:
            folder: gets `checkpoint/`, in the family's Hugging Face layout, and `state/`.
            tokenizer: written into `checkpoint/`.
        Raises:
            OSError: the folder cannot be written; an earlier save is still there.
            FloatingPointError: a weight is not finite; nothing is written.
        """
        trainer = self.trainer
        weights = self._finite_weights()
        values = {"done": trainer.steps_done, "data": self.batches.state_dict()}
        # The state comes first: a killed run never has a checkpoint that no state continues.
        save_training_state(Path(folder, STATE), trainer.model, trainer.optimizer, values)
        self._write_model(Path(folder, CHECKPOINT), weights, tokenizer)

    def save_model(self, folder: Path | str, tokenizer: TokenizerFiles | None = None) -> None:
        """Write the model alone, from the optimizer's float32 master.

        Raises:
            OSError, FloatingPointError: as in `save`.
        """
        self._write_model(folder, self._finite_weights(), tokenizer)

    def _write_model(self, folder: Path | str, weights: dict[str, Tensor], tokenizer: TokenizerFiles | None) -> None:
        model = self.trainer.model
        write_model(folder, model.config, weights, tokenizer, source_files=model.source_files)

    def _finite_weights(self) -> dict[str, Tensor]:
        weights = self.trainer.master_weights()
        for name, tensor in weights.items():
            if not torch.isfinite(tensor).all():
                raise FloatingPointError(
                    f"step {self.trainer.steps_done}: {name} has values that are not finite, expected only numbers"
                )
        return weights

    def load(self, folder: Path | str) -> None:
        """Continue from what `save` wrote: weights, optimizer, random state, and position in the data.

        Raises:
            ValueError: no training state in `folder`, a damaged one, or one of another model or other data.
        """
        values = load_training_state(Path(folder, STATE), self.trainer.model, self.trainer.optimizer)
        self.batches.load_state_dict(values["data"])
        self.trainer.steps_done = values["done"]


def _require_finite(step: int, name: str, value: float) -> None:
    if not math.isfinite(value):
        raise FloatingPointError(f"step {step}: {name} is {value}, expected a finite number")
