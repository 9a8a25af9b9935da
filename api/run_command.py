"""What `peakgpt train` and `peakgpt finetune` share: flags, files, and the loop over the events of a run."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from peakgpt.closed_output import PIPE_EXIT_CODE, Output
from peakgpt.engine.data.run_layout import RUN_CONFIG, step_folder
from peakgpt.engine.run_session import Reporter, RunSession
from peakgpt.engine.settings.flags import add_flags, read_flags
from peakgpt.engine.training.loop import SaveDue
from peakgpt.engine.training.loss_spikes import LossSpike
from peakgpt.engine.training.run_file import read_config_file, recipe_names
from peakgpt.engine.training.run_folder import RunFolder
from peakgpt.engine.training.run_settings import RunSettings
from peakgpt.engine.training.stop_signals import stop_on_signals
from peakgpt.heartbeat import enter_phase
from peakgpt.kernels.hardware.device import choose_device
from peakgpt.run_reporter import RunReporter


@dataclass(frozen=True)
class RunCommand:
    """A command that trains.

    Args:
        kind: of its configs.
        check: (config, device, reporter): checks what a run needs, before its folder is made.
        start: (config, folder, device, reporter) -> a new run.
        resume: (path, changed settings, device, reporter) -> a saved run.
    """

    kind: type[RunSettings]
    check: Callable[[Any, torch.device, Reporter], None]
    start: Callable[[Any, RunFolder, torch.device, Reporter], RunSession]
    resume: Callable[[Path, Mapping[str, Any], torch.device, Reporter], RunSession]

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        kind, settings = self.kind, self.kind.flags()
        parser.add_argument("--config", metavar="NAME|FILE",
                            help=f"a TOML file, or a recipe: {', '.join(recipe_names(kind))}; flags win")  # fmt: skip
        parser.add_argument("--device", help='"cpu" or "cuda" (default: the CUDA device if there is one)')
        parser.add_argument("--out", metavar="FOLDER",
                            help=f"new folder of the run (default runs/{kind.COMMAND}-DATE-TIME)")  # fmt: skip
        resumable = ", ".join(s.flag for s in settings.values() if s.resumable)
        parser.add_argument("--resume", metavar="FOLDER", help=f"continue this run; takes {resumable}")
        add_flags(parser, settings.values())
        parser.other_name = functools.partial(kind.other_name, as_flag=True)

    def run(self, args: argparse.Namespace) -> int:
        """Return the exit code."""
        given, device, output = read_flags(args, self.kind.flags().values()), choose_device(args.device), Output()
        reporter = Reporter(output.say, enter_phase)
        if args.resume is not None:
            self._refuse_on_resume(args, given)
            session = self.resume(Path(args.resume), given, device, reporter)
        else:
            file = {} if args.config is None else read_config_file(args.config, self.kind)
            config = self.kind.of({**file, **given}, device)  # raises before the data are read
            self.check(config, device, reporter)
            command = self.kind.COMMAND
            folder = RunFolder.with_default_name(command) if args.out is None else RunFolder(args.out)
            session = self.start(config, folder, device, reporter)
        with session.folder, session.checkpoints:
            return train(session, output)

    def _refuse_on_resume(self, args: argparse.Namespace, given: Mapping[str, Any]) -> None:
        fixed = [s.flag for name, s in self.kind.flags().items() if name in given and not s.resumable]
        fixed += [f"--{name}" for name in ("config", "out") if getattr(args, name) is not None]
        for flag in fixed:
            raise ValueError(f"{flag}: got it with --resume, expected none; {RUN_CONFIG} has the settings of the run")


def train(session: RunSession, output: Output) -> int:
    """Train until the end, a signal, or a closed standard output; then save. Return the exit code."""
    config, folder, loop, checkpoints = session.config, session.folder, session.loop, session.checkpoints
    reporter = RunReporter(folder, loop, config, output)
    try:
        with reporter, stop_on_signals() as stop:

            def should_stop() -> bool:
                reporter.before_step()
                return stop() or output.lost

            for event in loop.run(
                validate_every=config.validation.validate_every,
                save_every=config.checkpoint.save_every,
                should_stop=should_stop,
            ):
                checkpoints.check()
                if isinstance(event, LossSpike):
                    event = checkpoints.roll_back(event) or event
                if not isinstance(event, SaveDue):
                    reporter.take(event)
                if isinstance(event, SaveDue) or getattr(event, "is_best", False):
                    checkpoints.save(best=loop.validator.best_step or None)
            checkpoints.wait()
    except FloatingPointError as error:
        checkpoints.wait()
        kept = "nothing was saved" if checkpoints.saved_step is None else f"step {checkpoints.saved_step} is kept"
        raise FloatingPointError(f"{error}; {kept} in {folder.path}; a lower --lr may help") from None
    reporter.finish()
    if loop.stopped_early:
        output.say(f"stopped early after step {loop.trainer.steps_done}: the best validation was after step "
                  f"{loop.validator.best_step}; a higher --patience goes on")  # fmt: skip
    if loop.finished:
        output.say(f"checkpoint: {step_folder(folder.path, loop.trainer.steps_done)}")
        for line in session.finish():
            output.say(line)
    else:
        output.say(f"\nstopped after {loop.trainer.steps_done} steps; continue with: "
                  f"peakgpt {config.COMMAND} --resume {folder.path}")  # fmt: skip
    return PIPE_EXIT_CODE if output.lost else 0 if loop.finished else stop.exit_code
