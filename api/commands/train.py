"""peakgpt train: train a GPT on text. A resumed run has the same bits as an uninterrupted run."""

from __future__ import annotations

import argparse
from pathlib import Path

from peakgpt.closed_output import PIPE_EXIT_CODE, Output
from peakgpt.engine.checkpoint.folder import TRAINING_STATE
from peakgpt.engine.data.run_layout import RUN_CONFIG, STATE
from peakgpt.engine.run_session import Reporter, RunSession, resume, start
from peakgpt.engine.settings.flags import add_flags, read_flags
from peakgpt.engine.training.loop import StepMetrics, ValidationMetrics
from peakgpt.engine.training.run_config import RunConfig, run_settings
from peakgpt.engine.training.run_file import read_config_file, recipe_names
from peakgpt.engine.training.run_folder import RunFolder
from peakgpt.engine.training.stop_signals import stop_on_signals
from peakgpt.engine.training.synonyms import our_name
from peakgpt.heartbeat import enter_phase
from peakgpt.kernels.hardware.device import choose_device

LINE_S = 5.0  # a step's line is printed at least this often, if the steps are fast enough


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="NAME|FILE",
                        help=f"a TOML file, or a recipe: {', '.join(recipe_names())}; flags win")  # fmt: skip
    parser.add_argument("--device", help='"cpu" or "cuda" (default: the CUDA device if there is one)')
    parser.add_argument("--out", metavar="FOLDER", help="new folder of the run (default runs/train-DATE-TIME)")
    resumable = ", ".join(s.flag for s in run_settings().values() if s.resumable)
    parser.add_argument("--resume", metavar="FOLDER", help=f"continue this run; takes {resumable}")
    add_flags(parser, run_settings().values())
    parser.other_name = our_name


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
        folder = RunFolder.with_default_name("train") if args.out is None else RunFolder(args.out)
        session = start(config, folder, device, reporter)
    with session.folder:
        return _train(session, output)


def _refuse_on_resume(args: argparse.Namespace, given: dict[str, object]) -> None:
    fixed = [setting.flag for name, setting in run_settings().items() if name in given and not setting.resumable]
    fixed += [f"--{name}" for name in ("config", "out") if getattr(args, name) is not None]
    for flag in fixed:
        raise ValueError(f"{flag}: got it with --resume, expected none; {RUN_CONFIG} has the settings of the run")


def _train(session: RunSession, output: Output) -> int:
    """Train until the end, a signal, or a closed standard output; then save. Return the exit code."""
    enter_phase("training")
    config, folder, tokenizer, loop = session.config, session.folder, session.tokenizer, session.loop
    try:
        with stop_on_signals() as stop:
            for event in loop.run(
                validate_every=config.checkpoint.save_every,
                validation_batches=config.validation.validation_batches,
                should_stop=lambda: stop() or output.lost,
            ):
                folder.log(contender="peakgpt", **event.row())
                _print(event, loop.trainer.steps, config.metrics.log_every, output)
                if isinstance(event, ValidationMetrics) and not loop.finished:
                    loop.save(folder.path, tokenizer)
            loop.save(folder.path, tokenizer)
    except FloatingPointError as error:
        kept = "the last save is kept" if (folder.path / STATE / TRAINING_STATE).exists() else "nothing was saved"
        raise FloatingPointError(f"{error}; {kept} in {folder.path}; a lower --lr may help") from None
    if loop.finished:
        output.say(f"checkpoint: {folder.checkpoint}")
    else:
        output.say(f"\nstopped after {loop.trainer.steps_done} steps; continue with: "
                  f"peakgpt train --resume {folder.path}")  # fmt: skip
    return PIPE_EXIT_CODE if output.lost else 0 if loop.finished else stop.exit_code


def _print(event: StepMetrics | ValidationMetrics, steps: int, log_every: int, output: Output) -> None:
    if isinstance(event, ValidationMetrics):
        output.say(f"step {event.step}  held-out loss {event.loss:.4f}, {event.bits_per_byte:.4f} bits per byte")
    elif event.step % log_every == 0 or event.step == steps or output.silent_s >= LINE_S:
        output.say(f"step {event.step}/{steps}  loss {event.loss:.4f}  {event.tokens_per_s:,.0f} tok/s  "
                  f"MFU {100 * event.mfu:.1f} %")  # fmt: skip
