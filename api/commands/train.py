"""peakgpt train: train a GPT on text files. A resumed run has the same bits as an uninterrupted run."""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from types import NoneType
from typing import Any

import torch

from peakgpt.closed_output import PIPE_EXIT_CODE, Output
from peakgpt.engine.checkpoint.folder import TRAINING_STATE
from peakgpt.engine.data.batches import Batches
from peakgpt.engine.data.corpus import load_corpus
from peakgpt.engine.data.run_layout import SETTINGS, STATE
from peakgpt.engine.data.shards import TokenShards, tokenize_corpus
from peakgpt.engine.data.tokenizer import Tokenizer
from peakgpt.engine.data.tokenizer_training import train_tokenizer
from peakgpt.engine.gpt import GPT
from peakgpt.engine.model.presets import PRESETS
from peakgpt.engine.training.loop import StepMetrics, TrainingLoop, ValidationMetrics
from peakgpt.engine.training.run_folder import RunFolder
from peakgpt.engine.training.stop_signals import stop_on_signals
from peakgpt.engine.training.train_config import TrainConfig, best_dtype
from peakgpt.engine.training.trainer import Trainer
from peakgpt.heartbeat import enter_phase
from peakgpt.kernels.command_line import MAX_SEED, integer, number, refuse_ignored
from peakgpt.kernels.files import write_atomically
from peakgpt.kernels.hardware.device import choose_device
from peakgpt.kernels.strict_json import dumps

# Options that a run writes to settings.json, with their defaults. A resumed run reads them from this file.
# dtype: None is the best of the device. micro_batch: None is the whole batch.
DEFAULTS = {"model": "gpt2-tiny", "steps": 1000, "batch": 8, "tokens": 256, "lr": 1e-3, "vocab": 4096, "seed": 1337,
            "dtype": None, "recompute": "none", "micro_batch": None}  # fmt: skip
DTYPES = ("float32", "bfloat16")
DIGEST = "sha256"  # the key of the digest of all other settings
SAVE_EVERY = 250
LINE_S = 5.0  # a step's line is printed at least this often, if the steps are fast enough
ACTS_ON_RESUME = ("resume", "device", "save_every")  # the flags that a resumed run takes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # No flag has a default here, so that `run` sees which ones were given.
    parser.add_argument("--text", nargs="+", metavar="FILE", help="UTF-8 files or folders (default: Python's library)")
    parser.add_argument("--model", choices=sorted(PRESETS), metavar="PRESET",
                        help="such as gpt2 or pythia-70m; docs/families.md lists all (default gpt2-tiny)")  # fmt: skip
    parser.add_argument("--steps", type=integer(), help="updates (default 1000)")
    parser.add_argument("--batch", type=integer(), help="sequences per update (default 8)")
    parser.add_argument("--micro-batch", type=integer(),
                        help="sequences per pass; gradients are accumulated (default: all)")  # fmt: skip
    parser.add_argument("--tokens", type=integer(), help="tokens per sequence (default 256)")
    parser.add_argument("--lr", type=number(), help="peak learning rate (default 1e-3)")
    parser.add_argument("--vocab", type=integer(), help="vocabulary size of the tokenizer (default 4096)")
    parser.add_argument("--seed", type=integer(0, MAX_SEED),
                        help="seed of initial weights and data order (default 1337)")  # fmt: skip
    parser.add_argument("--dtype", choices=DTYPES,
                        help="default: bfloat16 if the device multiplies it in hardware")  # fmt: skip
    parser.add_argument("--recompute", metavar="PLAN",
                        help="none, norm, mlp, block or block/N: activations that backward recomputes")  # fmt: skip
    parser.add_argument("--device", help='"cpu" or "cuda" (default: the CUDA device if there is one)')
    parser.add_argument("--save-every", type=integer(), metavar="STEPS",
                        help="steps between checkpoints (default 250); the last step always has one")  # fmt: skip
    parser.add_argument("--out", help="folder of the run (default runs/train-DATE-TIME)")
    parser.add_argument("--resume", metavar="FOLDER",
                        help="continue the run in this folder; it takes only --device and --save-every")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    if args.resume is not None:
        ignored = [name for name in vars(args) if name not in ACTS_ON_RESUME]
        refuse_ignored(
            args, ignored, f"with --resume, expected only --device or --save-every; {SETTINGS} has the rest"
        )
    device = choose_device(args.device)
    output = Output()
    if args.resume is None:
        folder, tokenizer, loop = _start(args, device, output)
    else:
        folder, tokenizer, loop = _resume(Path(args.resume), device)
    with folder:
        return _train(folder, tokenizer, loop, args.save_every or SAVE_EVERY, output)


def _start(
    args: argparse.Namespace, device: torch.device, output: Output
) -> tuple[RunFolder, Tokenizer, TrainingLoop]:
    settings = {name: default if getattr(args, name) is None else getattr(args, name)
                for name, default in DEFAULTS.items()}  # fmt: skip
    settings["dtype"] = settings["dtype"] or str(best_dtype(device)).removeprefix("torch.")
    _config(settings)  # raises before the text is read
    folder = RunFolder.with_default_name("train") if args.out is None else RunFolder(args.out)
    with folder.discarded_on_bad_input():
        corpus = load_corpus(args.text)
        output.say(f"corpus: {corpus}")
        enter_phase("training the tokenizer and encoding the text")
        texts = (document.text for document in corpus.train)
        tokenizer = train_tokenizer(texts, settings["vocab"], report=output.say)
        tokenize_corpus(corpus, tokenizer, folder.tokens)
        tokenizer.save(folder.tokens)
        enter_phase("building the model and measuring the device's peak")
        text = dumps({**settings, DIGEST: _digest(settings)}, indent=1)
        write_atomically(folder.root / SETTINGS, f"{text}\n".encode())
        return folder, *build_loop(folder, settings, device)


def _resume(path: Path, device: torch.device) -> tuple[RunFolder, Tokenizer, TrainingLoop]:
    """Open a run at its last save, or at step 0 if it was killed before the first one."""
    folder = RunFolder.reopen(path)
    try:
        tokenizer, loop = build_loop(folder, read_settings(path), device)
        if (path / STATE / TRAINING_STATE).exists():
            loop.load(path)
        elif folder.checkpoint.exists():
            raise ValueError(f"run folder {path}: got a checkpoint without {STATE}/{TRAINING_STATE}, expected both")
        folder.drop_rows_after(loop.trainer.steps_done)
    except BaseException:
        folder.close()
        raise
    return folder, tokenizer, loop


def _train(folder: RunFolder, tokenizer: Tokenizer, loop: TrainingLoop, save_every: int, output: Output) -> int:
    """Train until the end, a signal, or a closed standard output; then save. Return the exit code."""
    enter_phase("training")
    try:
        with stop_on_signals() as stop:
            for event in loop.run(validate_every=save_every, should_stop=lambda: stop() or output.lost):
                folder.log(contender="peakgpt", **event.row())
                _print(event, loop.trainer.steps, output)
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
    if not isinstance(settings, dict) or sorted(settings) != sorted(DEFAULTS):
        raise ValueError(f"{file}: got {', '.join(settings)}, expected {', '.join(DEFAULTS)}")
    for name, value in settings.items():
        kinds = {"lr": (float, int), "micro_batch": (int, NoneType), "dtype": (str,)}
        if type(value) not in kinds.get(name, (type(DEFAULTS[name]),)) or (name == "dtype" and value not in DTYPES):
            raise ValueError(f"{file}: {name} is {value!r}, expected a value that `peakgpt train` writes")
    if settings["steps"] < 1:  # TrainConfig checks the others
        raise ValueError(f"{file}: steps is {settings['steps']}, expected at least 1")
    if digest is not None and digest != _digest(settings):
        raise ValueError(f"{file}: got other settings than the run began with, expected the same; --out begins another")
    return settings


def _digest(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _config(settings: dict[str, Any]) -> TrainConfig:
    return TrainConfig(
        batch=settings["batch"], tokens=settings["tokens"], lr=settings["lr"], seed=settings["seed"],
        dtype=getattr(torch, settings["dtype"]), recompute=settings["recompute"], micro_batch=settings["micro_batch"],
    )  # fmt: skip


def build_loop(folder: RunFolder, settings: dict[str, Any], device: torch.device) -> tuple[Tokenizer, TrainingLoop]:
    """Build the training loop of a run from its settings and the tokens in its folder."""
    tokenizer = Tokenizer.load(folder.tokens)
    shards, validation = (TokenShards.open(folder.tokens, name) for name in ("train", "validation"))
    config = _config(settings)
    batches = Batches(shards, config.batch, config.tokens, config.seed)
    torch.manual_seed(config.seed)
    model = GPT.from_preset(settings["model"], vocab_size=tokenizer.vocab_size).to(device)
    trainer = Trainer(model, config, steps=settings["steps"])
    return tokenizer, TrainingLoop(trainer, batches, validation, report_mfu=True)


def _print(event: StepMetrics | ValidationMetrics, steps: int, output: Output) -> None:
    if isinstance(event, ValidationMetrics):
        output.say(f"step {event.step}  held-out loss {event.loss:.4f}, {event.bits_per_byte:.4f} bits per byte")
    elif event.step % 10 == 0 or event.step == steps or output.silent_s >= LINE_S:
        output.say(f"step {event.step}/{steps}  loss {event.loss:.4f}  {event.tokens_per_s:,.0f} tok/s  "
                  f"MFU {100 * event.mfu:.1f} %")  # fmt: skip
