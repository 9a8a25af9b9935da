"""peakgpt train: train a GPT on text files. A resumed run has the same bits as an uninterrupted run."""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from peakgpt.closed_output import PIPE_EXIT_CODE, Output
from peakgpt.engine.checkpoint.folder import TRAINING_STATE
from peakgpt.engine.data.batches import Batches
from peakgpt.engine.data.corpus import load_corpus
from peakgpt.engine.data.run_layout import SETTINGS, STATE
from peakgpt.engine.data.shards import TokenShards, tokenize_corpus
from peakgpt.engine.data.tokenizer import Tokenizer, train_tokenizer
from peakgpt.engine.gpt import GPT
from peakgpt.engine.settings.flags import add_flags, read_flags
from peakgpt.engine.training.loop import StepMetrics, TrainingLoop, ValidationMetrics
from peakgpt.engine.training.run_config import RunConfig, run_settings
from peakgpt.engine.training.run_folder import RunFolder
from peakgpt.engine.training.stop_signals import stop_on_signals
from peakgpt.engine.training.train_config import best_dtype
from peakgpt.engine.training.trainer import Trainer
from peakgpt.heartbeat import enter_phase
from peakgpt.kernels.files import write_atomically
from peakgpt.kernels.hardware.device import choose_device
from peakgpt.kernels.strict_json import dumps

SETTINGS_OF_FILE = ("preset", "steps", "batch", "tokens", "lr", "vocab", "seed", "dtype", "recompute", "micro_batch")
DIGEST = "sha256"  # the key of the digest of all other settings
LINE_S = 5.0  # a step's line is printed at least this often, if the steps are fast enough


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
    with folder:
        return _train(folder, tokenizer, loop, config, output)


def _start(
    config: RunConfig, out: str | None, device: torch.device, output: Output
) -> tuple[RunFolder, Tokenizer, TrainingLoop]:
    folder = RunFolder.with_default_name("train") if out is None else RunFolder(out)
    with folder.discarded_on_bad_input():
        corpus = load_corpus(config.data.text)
        output.say(f"corpus: {corpus}")
        enter_phase("training the tokenizer and encoding the text")
        texts = (document.text for document in corpus.train)
        tokenizer = train_tokenizer(texts, config.data.vocab, report=output.say)
        tokenize_corpus(corpus, tokenizer, folder.tokens)
        tokenizer.save(folder.tokens)
        enter_phase("building the model and measuring the device's peak")
        settings = {name: _plain(config.values()[name]) for name in SETTINGS_OF_FILE}
        text = dumps({**settings, DIGEST: _digest(settings)}, indent=1)
        write_atomically(folder.root / SETTINGS, f"{text}\n".encode())
        return folder, *build_loop(folder, config, device)


def _resume(
    path: Path, given: dict[str, Any], device: torch.device
) -> tuple[RunFolder, RunConfig, Tokenizer, TrainingLoop]:
    """Open a run at its last save, or at step 0 if it was killed before the first one."""
    folder = RunFolder.reopen(path)
    try:
        config = RunConfig.of({**read_settings(path), **given})
        tokenizer, loop = build_loop(folder, config, device)
        if (path / STATE / TRAINING_STATE).exists():
            loop.load(path)
        elif folder.checkpoint.exists():
            raise ValueError(f"run folder {path}: got a checkpoint without {STATE}/{TRAINING_STATE}, expected both")
        folder.drop_rows_after(loop.trainer.steps_done)
    except BaseException:
        folder.close()
        raise
    return folder, config, tokenizer, loop


def _train(folder: RunFolder, tokenizer: Tokenizer, loop: TrainingLoop, config: RunConfig, output: Output) -> int:
    """Train until the end, a signal, or a closed standard output; then save. Return the exit code."""
    enter_phase("training")
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
    trainer = Trainer(model, config, steps=config.steps)
    return tokenizer, TrainingLoop(trainer, batches, validation, report_mfu=True)


def _print(event: StepMetrics | ValidationMetrics, steps: int, log_every: int, output: Output) -> None:
    if isinstance(event, ValidationMetrics):
        output.say(f"step {event.step}  held-out loss {event.loss:.4f}, {event.bits_per_byte:.4f} bits per byte")
    elif event.step % log_every == 0 or event.step == steps or output.silent_s >= LINE_S:
        output.say(f"step {event.step}/{steps}  loss {event.loss:.4f}  {event.tokens_per_s:,.0f} tok/s  "
                  f"MFU {100 * event.mfu:.1f} %")  # fmt: skip
