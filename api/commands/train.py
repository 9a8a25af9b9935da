"""peakgpt train: train a GPT on text files. A resumed run has the same bits as an uninterrupted run."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

from peakgpt.closed_output import PIPE_EXIT_CODE, Output
from peakgpt.engine.data.batches import Batches
from peakgpt.engine.data.corpus import load_corpus
from peakgpt.engine.data.run_layout import SETTINGS, step_folder
from peakgpt.engine.data.shards import TokenShards, tokenize_corpus
from peakgpt.engine.data.tokenizer import Tokenizer, train_tokenizer
from peakgpt.engine.gpt import GPT
from peakgpt.engine.model.presets import preset
from peakgpt.engine.settings.flags import add_flags, read_flags
from peakgpt.engine.training.checkpoint_manager import CheckpointManager
from peakgpt.engine.training.figures import bytes_text
from peakgpt.engine.training.held_out import open_held_out, prepare_held_out
from peakgpt.engine.training.loop import SaveDue, TrainingLoop
from peakgpt.engine.training.loss_spikes import LossSpike
from peakgpt.engine.training.memory_estimate import refuse_what_cannot_fit
from peakgpt.engine.training.metric_sinks import require_packages
from peakgpt.engine.training.run_config import RunConfig, run_settings
from peakgpt.engine.training.run_folder import RunFolder
from peakgpt.engine.training.schedule import Schedule
from peakgpt.engine.training.stop_signals import stop_on_signals
from peakgpt.engine.training.train_config import best_dtype
from peakgpt.engine.training.trainer import Trainer
from peakgpt.engine.training.validation import Validator
from peakgpt.engine.training.validation_config import HELD_OUT
from peakgpt.heartbeat import enter_phase
from peakgpt.kernels.files import write_atomically
from peakgpt.kernels.hardware.device import choose_device
from peakgpt.kernels.strict_json import dumps
from peakgpt.run_reporter import RunReporter

SETTINGS_OF_FILE = ("preset", "steps", "batch", "tokens", "lr", "vocab", "seed", "dtype", "recompute", "micro_batch")
DIGEST = "sha256"  # the key of the digest of all other settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help='"cpu" or "cuda" (default: the CUDA device if there is one)')
    parser.add_argument("--out", help="folder of the run (default runs/train-DATE-TIME)")
    parser.add_argument("--resume", metavar="FOLDER", help="continue the run in this folder")
    add_flags(parser, run_settings().values())


def run(args: argparse.Namespace) -> int:
    given = read_flags(args, run_settings().values())
    if args.resume is not None:
        refused = [s.flag for name, s in run_settings().items() if name in given and not s.resumable]
        for flag in refused + ["--out"] * (args.out is not None):
            raise ValueError(f"{flag}: got it with --resume, expected none; {SETTINGS} has the settings of the run")
    device = choose_device(args.device)
    output = Output()
    if args.resume is None:
        config = RunConfig.of({"dtype": best_dtype(device), **given})  # raises before the text is read
        folder, tokenizer, loop = _start(config, args.out, device, output)
    else:
        folder, config, tokenizer, loop = _resume(Path(args.resume), given, device)
    with folder, CheckpointManager(folder, loop, tokenizer, config.checkpoint) as checkpoints:
        if args.resume is not None:
            checkpoints.load(report=lambda fault: print(f"peakgpt: {fault}", file=sys.stderr))
        return _train(folder, checkpoints, loop, config, output)


def _start(
    config: RunConfig, out: str | None, device: torch.device, output: Output
) -> tuple[RunFolder, Tokenizer, TrainingLoop]:
    require_packages(config.metrics)
    model = preset(config.model.preset, vocab_size=config.data.vocab)
    predicted, available = refuse_what_cannot_fit(model, config.train, device)
    output.say(f"memory: about {predicted}; {bytes_text(available)} available")
    folder = RunFolder.with_default_name("train") if out is None else RunFolder(out)
    with folder.discarded_on_bad_input():
        corpus = load_corpus(config.data.text)
        output.say(f"corpus: {corpus}")
        enter_phase("training the tokenizer and encoding the text")
        texts = (document.text for document in corpus.train)
        tokenizer = train_tokenizer(texts, config.data.vocab, report=output.say)
        tokenize_corpus(corpus, tokenizer, folder.tokens)
        tokenizer.save(folder.tokens)
        prepare_held_out(config.validation.named_sets(), tokenizer, folder.tokens)
        enter_phase("building the model and measuring the device's peak")
        settings = {name: _plain(config.values()[name]) for name in SETTINGS_OF_FILE}
        text = dumps({**settings, DIGEST: _digest(settings)}, indent=1)
        write_atomically(folder.root / SETTINGS, f"{text}\n".encode())
        return folder, *build_loop(folder, config, device)


def _resume(
    path: Path, given: dict[str, Any], device: torch.device
) -> tuple[RunFolder, RunConfig, Tokenizer, TrainingLoop]:
    """Open a run and build its loop as at its start."""
    folder = RunFolder.reopen(path)
    try:
        config = RunConfig.of({**read_settings(path), **given})
        tokenizer, loop = build_loop(folder, config, device)
    except BaseException:
        folder.close()
        raise
    return folder, config, tokenizer, loop


def _train(
    folder: RunFolder, checkpoints: CheckpointManager, loop: TrainingLoop, config: RunConfig, output: Output
) -> int:
    """Train until the end, a signal, or a closed standard output; then save. Return the exit code."""
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


def read_settings(path: Path) -> dict[str, Any]:
    """Read the settings of a run folder.

    Raises:
        ValueError: settings.json is missing, is not JSON, or has other keys or types than `peakgpt train` writes.
    """
    file = path / SETTINGS
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise ValueError(
            f"run folder {path}: got no readable {SETTINGS}, expected one of `peakgpt train`; a run that was killed "
            f"before its first step is started again with --out {path}"
        ) from None
    digest = settings.pop(DIGEST, None) if isinstance(settings, dict) else None  # older runs have none
    if isinstance(settings, dict) and "model" in settings:  # its name in version 0.1.0
        settings = {"preset": settings.pop("model"), **settings}
    if not isinstance(settings, dict) or sorted(settings) != sorted(SETTINGS_OF_FILE):
        raise ValueError(f"{file}: got {', '.join(settings)}, expected {', '.join(SETTINGS_OF_FILE)}")
    if digest is not None and digest != _digest(settings):
        raise ValueError(f"{file}: got other settings than the run began with, expected the same; --out begins another")
    values = {}
    for name, value in settings.items():
        try:
            values[name] = run_settings()[name].read("none" if value is None else value)
        except ValueError as error:
            raise ValueError(f"{file}: {name} {error}") from None
    return values


def _plain(value: Any) -> Any:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


def _digest(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def build_loop(folder: RunFolder, run: RunConfig, device: torch.device) -> tuple[Tokenizer, TrainingLoop]:
    """Build the training loop of a run from its settings and the tokens in its folder."""
    tokenizer = Tokenizer.load(folder.tokens)
    shards, validation = (TokenShards.open(folder.tokens, name) for name in ("train", "validation"))
    config = run.train
    batches = Batches(shards, config.batch, config.tokens, config.seed)
    torch.manual_seed(config.seed)
    model = GPT.from_preset(run.model.preset, vocab_size=tokenizer.vocab_size).to(device)
    trainer = Trainer(model, config, steps=Schedule(config).steps(len(shards)))
    sets = {HELD_OUT: validation, **open_held_out(run.validation.named_sets(), tokenizer, folder.tokens)}
    validator = Validator(model, sets, run.validation, batch=config.micro_batch or config.batch, tokens=config.tokens,
                          tokenizer=tokenizer, seed=config.seed)  # fmt: skip
    return tokenizer, TrainingLoop(trainer, batches, validator, report_mfu=True)
