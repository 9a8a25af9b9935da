"""The progress of a training run: a bar on a terminal, elsewhere plain lines.

A line is printed for the first step, and then every LINE_S seconds, so that fast steps do not flood a log. While a step
takes longer than that, the heartbeat prints lines with the last step's number (heartbeat.py).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from peakgpt.engine.training.figures import duration_text, percent_text, speed_text
from peakgpt.engine.training.loop import StepMetrics
from peakgpt.engine.training.validation import ValidationMetrics
from peakgpt.heartbeat import enter_phase

LINE_S = 5.0
MEMORY = 0.9  # share of the older steps in the mean time of a step, from which the time left is computed
SAMPLE_CHARS = 300  # of a sample that are printed; metrics.jsonl has all of it


class TrainingProgress:
    """Prints the events of a TrainingLoop. A context, as a bar must be taken off the terminal."""

    def __init__(self, console: Console, done: int = 0, clock: Callable[[], float] = time.monotonic):
        """
        Args:
            console: gets the bar or the lines.
            done: steps of earlier processes of this run.
            clock: seconds.
        """
        self.console, self._clock = console, clock
        self._line_s, self._step_s = -math.inf, 0.0
        self._bar = Progress(
            BarColumn(bar_width=30), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn(),
            console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task("", total=None, completed=done)

    def __enter__(self) -> TrainingProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def step(self, event: StepMetrics, steps: int) -> None:
        """Show a step; `steps` are planned."""
        enter_phase(f"after step {event.step}/{steps}")
        self._step_s = event.seconds if not self._step_s else MEMORY * self._step_s + (1 - MEMORY) * event.seconds
        figures = f"loss {event.loss:.4f}  {speed_text(event.tokens_per_s)}"
        if event.mfu is not None:
            figures += f"  MFU {percent_text(event.mfu)}"
        if self.console.is_terminal:
            self._bar.update(self._task, completed=event.step, total=steps, description=figures)
        elif event.step >= steps or self._clock() - self._line_s >= LINE_S:
            left = duration_text(max(0, steps - event.step) * self._step_s)
            self._line_s = self._clock()
            self.say(f"step {event.step}/{steps}  {figures}  ETA {left}")

    def validation(self, event: ValidationMetrics) -> None:
        """Show a validation and its samples."""
        for number, (name, found) in enumerate(event.sets.items()):
            best = "  (best so far)" if event.is_best and not number else ""
            self.say(f"step {event.step}  {name} {found}{best}")
        for sample in event.samples:
            text = f"{sample.prompt}{sample.text}"
            self.say(f"  sample: {text[:SAMPLE_CHARS]!r}{' ...' if len(text) > SAMPLE_CHARS else ''}")

    def show(self, event: Any, steps: int) -> None:
        """Show any event of a TrainingLoop; `steps` are planned."""
        if isinstance(event, ValidationMetrics):
            self.validation(event)
        elif isinstance(event, StepMetrics):
            self.step(event, steps)
        else:  # rare: a skipped step, a loss spike
            self.say(str(event))

    def say(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)
