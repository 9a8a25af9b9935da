"""What `peakgpt train` does with the events of a run besides saving: prints and logs them, and keeps the time."""

from __future__ import annotations

import contextlib
import time
from typing import Any

from rich.console import Console

from peakgpt.closed_output import Output
from peakgpt.engine.training.figures import bytes_text, duration_text
from peakgpt.engine.training.loop import StepMetrics, TrainingLoop, ValidationMetrics
from peakgpt.engine.training.metric_sinks import open_sinks
from peakgpt.engine.training.run_folder import RunFolder
from peakgpt.engine.training.run_report import settings_section, write_report
from peakgpt.engine.training.run_settings import RunSettings
from peakgpt.engine.training.step_profile import StepProfile
from peakgpt.engine.training.time_limit import TimeLimit
from peakgpt.heartbeat import enter_phase
from peakgpt.kernels.hardware.memory import peak_bytes, reset_peak, used_bytes
from peakgpt.progress import TrainingProgress

REPORT_S = 5.0  # the report takes 3 to 4 s on 2 busy cores of a Zen 4
WRITE_BYTES_S = 200e6  # of the last checkpoint; most disks are faster
UNMEASURED_SHARE = 0.5  # of a step's time a token of validation takes, before one was measured; it is about a third


class RunReporter:
    """Takes the events of a run. A context: closes sinks, the bar and a running trace."""

    def __init__(self, folder: RunFolder, loop: TrainingLoop, config: RunSettings, output: Output):
        """
        Args:
            folder: of the run; `elapsed_s` of its metrics counts the time of all its processes.
            loop: that yields the events, with a resumed state loaded.
            config: of the run.
            output: gets the lines.
        """
        self.folder, self.loop, self.config, self.output = folder, loop, config, output
        self._stack, trainer = contextlib.ExitStack(), loop.trainer
        folder.continue_clock()
        self.limit: TimeLimit | None = None
        if config.train.minutes is not None:
            left_s = 60 * config.train.minutes - (time.time() - folder.start)
            lengths = config.train.steps, config.train.max_tokens, config.train.epochs
            max_steps = None if lengths == (None, None, None) else trainer.steps
            self.limit = TimeLimit(left_s, max_steps=max_steps, reserve_s=self._reserve_s, clock=time.time)
        self._validated: ValidationMetrics | None = None
        self._pause_began_s, self._pause_s = 0.0, 0.0

    def __enter__(self) -> RunReporter:
        loop, metrics = self.loop, self.config.metrics
        with contextlib.ExitStack() as stack:
            done = loop.trainer.steps_done
            enter_phase("opening the logs")
            self.sinks = open_sinks(metrics, self.folder.path, self.config.values(), steps_done=done)
            for sink in self.sinks:
                stack.callback(sink.close)
            self.profile = None
            if metrics.profile is not None:
                self.profile = stack.enter_context(
                    StepProfile(metrics.profile, self.folder.path, loop.trainer.device)
                )
            self.progress = stack.enter_context(TrainingProgress(Console(file=self.output), done))
            self._memory_before = used_bytes(loop.trainer.device)
            reset_peak(loop.trainer.device)  # measuring the device took memory that training does not need
            enter_phase("training")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def before_step(self) -> None:
        """Plan the steps that are left, and start or end a trace; call it before each step."""
        if self._validated is not None:  # a validation, and the save that may have followed it, are over
            self._pause_s = max(self._pause_s, time.time() - self._pause_began_s + self._validated.seconds)
            self._validated = None
        if self.limit is not None:
            self.limit.plan(self.loop.trainer)
        if self.profile is not None:
            self.profile.before_step(self.loop.trainer.steps_done + 1)

    def take(self, event: Any) -> None:
        """Log an event to metrics.jsonl and the sinks, and show it."""
        row = {"contender": "peakgpt", **event.row()}
        self.folder.log(**row)
        for sink in self.sinks:
            sink.log(row)
        if isinstance(event, StepMetrics) and self.limit is not None:
            self.limit.observe(event.seconds)
            self.limit.plan(self.loop.trainer)
        if isinstance(event, ValidationMetrics):
            self._validated, self._pause_began_s = event, time.time()
        self.progress.show(event, self.loop.trainer.steps)

    def _reserve_s(self) -> float:
        """Return the seconds that the last validation, save and report will take."""
        trainer, validator = self.loop.trainer, self.loop.validator
        state_bytes = 12 * sum(parameter.numel() for parameter in trainer.model.parameters())
        pause_s = self._pause_s
        if not pause_s and validator is not None:
            token_s = self.limit.typical_step_s / (trainer.config.batch * trainer.config.tokens)
            pause_s = UNMEASURED_SHARE * token_s * validator.count_targets()
        return pause_s + state_bytes / WRITE_BYTES_S + REPORT_S

    def finish(self) -> None:
        """Write the report, and say what the run took. Call it after the context is closed and all is saved."""
        enter_phase("writing the report")
        peak = peak_bytes(self.loop.trainer.device)  # before the report, whose drawing is not training
        page = write_report(self.folder.path, settings_section(self.folder.path))
        self.output.say(
            f"time: {duration_text(time.time() - self.folder.start)}   peak memory: {bytes_text(peak)}, "
            f"{bytes_text(self._memory_before)} of them before the first step   report: {page}"
        )
