"""peakgpt train: train a GPT on text. A resumed run has the same bits as an uninterrupted run."""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

from peakgpt.closed_output import PIPE_EXIT_CODE, Output
from peakgpt.engine.data.run_layout import RUN_CONFIG, step_folder
from peakgpt.engine.run_session import Reporter, RunSession, check_resources, resume, start
from peakgpt.engine.settings.flags import add_flags, read_flags
from peakgpt.engine.training.loop import SaveDue
from peakgpt.engine.training.loss_spikes import LossSpike
from peakgpt.engine.training.run_config import RunConfig, run_settings
from peakgpt.engine.training.run_file import read_config_file, recipe_names
from peakgpt.engine.training.run_folder import RunFolder
from peakgpt.engine.training.stop_signals import stop_on_signals
from peakgpt.engine.training.synonyms import our_name
from peakgpt.heartbeat import enter_phase
from peakgpt.kernels.hardware.device import choose_device
from peakgpt.run_reporter import RunReporter


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="NAME|FILE",
                        help=f"a TOML file, or a recipe: {', '.join(recipe_names())}; flags win")  # fmt: skip
    parser.add_argument("--device", help='"cpu" or "cuda" (default: the CUDA device if there is one)')
    parser.add_argument("--out", metavar="FOLDER", help="new folder of the run (default runs/train-DATE-TIME)")
    resumable = ", ".join(s.flag for s in run_settings().values() if s.resumable)
    parser.add_argument("--resume", metavar="FOLDER", help=f"continue this run; takes {resumable}")
    add_flags(parser, run_settings().values())
    parser.other_name = functools.partial(our_name, as_flag=True)


def run(args: argparse.Namespace) -> int:
    given = read_flags(args, run_settings().values())
    device = choose_device(args.device)
    output = Output()
    reporter = Reporter(output.say, enter_phase)
    if args.resume is not None:
        _refuse_on_resume(args, given)
        session = resume(Path(args.resume), given, device, reporter)
    else:
        file = {} if args.config is None else read_config_file(args.config)
        config = RunConfig.of({**file, **given}, device)  # raises before the text is read
        check_resources(config, device, reporter)
        folder = RunFolder.with_default_name("train") if args.out is None else RunFolder(args.out)
        session = start(config, folder, device, reporter)
    with session.folder, session.checkpoints:
        return _train(session, output)


def _refuse_on_resume(args: argparse.Namespace, given: dict[str, object]) -> None:
    fixed = [setting.flag for name, setting in run_settings().items() if name in given and not setting.resumable]
    fixed += [f"--{name}" for name in ("config", "out") if getattr(args, name) is not None]
    for flag in fixed:
        raise ValueError(f"{flag}: got it with --resume, expected none; {RUN_CONFIG} has the settings of the run")


def _train(session: RunSession, output: Output) -> int:
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
    else:
        output.say(f"\nstopped after {loop.trainer.steps_done} steps; continue with: "
                  f"peakgpt train --resume {folder.path}")  # fmt: skip
    return PIPE_EXIT_CODE if output.lost else 0 if loop.finished else stop.exit_code
