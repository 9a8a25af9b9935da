"""Batch size and learning rate of each update, as functions of the number of updates before it.

    lr(t) = lr min(rise, floor + (1 - floor) shape(s))
    rise  = progress after update t / warmup                        progress: updates, or tokens
    s     = min(1, (end - progress before update t) / (end - start)), the share of the decay that is left

start is the end of the warmup; of "wsd" (warmup, stable, decay) it is end - decay_fraction end. The shapes of s:

    constant  1        linear  s        cosine  (1 - cos(pi s)) / 2        sqrt  1 - sqrt(1 - s)

All is measured in tokens if warmup_tokens or decay_tokens is given, else in updates. Both count the same: the batch of
each update is known beforehand, so the tokens before update t are a function of t, and a resumed run needs no state.

Linear decay to zero: Bergsma et al. 2025, "Straight to Zero", arXiv:2502.15938. Cosine: Loshchilov, Hutter 2017,
"SGDR", arXiv:1608.03983. Warmup, stable, decay: Hu et al. 2024, "MiniCPM", arXiv:2404.06395; its square root: Hägele et
al. 2024, "Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations", arXiv:2405.18392. A batch that
grows: Brown et al. 2020, GPT-3, arXiv:2005.14165, appendix B (linearly); Chowdhery et al. 2022, "PaLM",
arXiv:2204.02311, section 5 (doubled at two points).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator
from typing import NamedTuple

from peakgpt.engine.training.train_config import TrainConfig, parse_stages

DEFAULT_STEPS, DEFAULT_WARMUP, DEFAULT_DECAY_FRACTION = 1000, 0.05, 0.2
SHAPES: dict[str, Callable[[float], float]] = {
    "constant": lambda s: 1.0,
    "linear": lambda s: s,
    "cosine": lambda s: 0.5 * (1.0 - math.cos(math.pi * s)),
    "sqrt": lambda s: 1.0 - math.sqrt(1.0 - s),
}


class Stage(NamedTuple):
    """Updates of one batch size: from update `step` on, with `tokens` before it."""

    step: int
    tokens: int
    batch: int


class Schedule:
    """Batch size and learning rate of each update of a run."""

    def __init__(self, config: TrainConfig):
        self.config, self.stages = config, _stages(config)
        self._first_steps = [stage.step for stage in self.stages]
        is_wsd = config.schedule == "wsd"
        self._shape = SHAPES[(config.decay_shape or "linear") if is_wsd else config.schedule]
        self._decay_fraction = (config.decay_fraction or DEFAULT_DECAY_FRACTION) if is_wsd else None
        self._floor = config.min_lr_fraction or (config.min_lr or 0.0) / config.lr
        in_tokens = config.warmup_tokens is not None or config.decay_tokens is not None
        self._progress = self.tokens if in_tokens else lambda step: step

    def batch(self, step: int) -> int:
        """Return the sequences of update `step`, counted from 0."""
        return self._stage(step).batch

    def tokens(self, step: int) -> int:
        """Return the tokens of all updates before update `step`."""
        stage = self._stage(step)
        return stage.tokens + (step - stage.step) * stage.batch * self.config.tokens

    def steps(self, data_tokens: int | None = None) -> int:
        """Return the number of updates of the run.

        Args:
            data_tokens: length of the token stream; only epochs needs it.
        Raises:
            ValueError: max_tokens or epochs is less than one update, or epochs is given without data_tokens.
        """
        config = self.config
        if config.max_tokens is None and config.epochs is None:
            return config.steps or DEFAULT_STEPS
        if config.max_tokens is None and data_tokens is None:
            raise ValueError(f"TrainConfig: epochs is {config.epochs} for data of unknown length, expected steps")
        limit = config.max_tokens or math.floor(config.epochs * data_tokens)
        stage = max((s for s in self.stages if s.tokens <= limit), key=lambda s: s.step)
        steps = stage.step + (limit - stage.tokens) // (stage.batch * config.tokens)
        if steps == 0:
            name, value = ("max_tokens", limit) if config.max_tokens else ("epochs", config.epochs)
            raise ValueError(
                f"TrainConfig: {name} is {value}, which is {limit} tokens, expected at least the "
                f"{stage.batch * config.tokens} of one update"
            )
        return steps

    def lr(self, step: int, steps: int) -> float:
        """Return the learning rate of update `step`, counted from 0, of `steps` planned updates."""
        config, progress = self.config, self._progress
        warmup = max(1, config.warmup_tokens or progress(self._warmup_steps(steps)))
        end = config.decay_tokens or progress(config.decay_steps or steps)
        start = warmup if self._decay_fraction is None else max(warmup, end - round(self._decay_fraction * end))
        left = min(1.0, max(0, end - progress(step)) / max(1, end - start))
        height = self._floor + (1.0 - self._floor) * self._shape(left)
        return config.lr * min(progress(step + 1) / warmup, height)

    def _warmup_steps(self, steps: int) -> int:
        if self.config.warmup_steps is not None:
            return self.config.warmup_steps
        return round((DEFAULT_WARMUP if self.config.warmup is None else self.config.warmup) * steps)

    def _stage(self, step: int) -> Stage:
        return self.stages[bisect_right(self._first_steps, step) - 1]


def _stages(config: TrainConfig) -> list[Stage]:
    """Return the batch sizes of a run in order; each begins with the first update at or after its token."""
    stages: list[Stage] = []
    for batch, begin in _batches(config):
        step = tokens = 0
        if stages:
            last = stages[-1]
            step_tokens = last.batch * config.tokens
            count = max(0, -(-(begin - last.tokens) // step_tokens))
            step, tokens = last.step + count, last.tokens + count * step_tokens
            if count == 0:
                stages.pop()
        stages.append(Stage(step, tokens, batch))
    return stages


def _batches(config: TrainConfig) -> Iterator[tuple[int, int]]:
    """Yield each batch size with the number of tokens at which it begins."""
    if config.batch_stages is not None:
        begin = 0
        for batch, end in parse_stages(config.batch_stages):
            yield batch, begin
            begin = end
        yield config.batch, begin
    elif config.ramp_batch is not None:
        first, unit = config.ramp_batch, config.micro_batch or config.ramp_batch
        yield first, 0
        for batch in (*range((first // unit + 1) * unit, config.batch, unit), config.batch):
            yield batch, math.ceil(config.ramp_tokens * (batch - first) / (config.batch - first))
    else:
        yield config.batch, 0
