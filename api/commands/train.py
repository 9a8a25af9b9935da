"""peakgpt train: train a GPT on text files. A resumed run has the same bits as an uninterrupted run."""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch

from peakgpt.engine.data.batches import Batches
from peakgpt.engine.data.corpus import load_corpus
from peakgpt.engine.data.shards import TokenShards, tokenize_corpus
from peakgpt.engine.data.tokenizer import Tokenizer, train_tokenizer
from peakgpt.engine.gpt import GPT
from peakgpt.engine.model.presets import PRESETS
from peakgpt.engine.training.loop import StepMetrics, TrainingLoop, ValidationMetrics
from peakgpt.engine.training.run_folder import RunFolder, default_run_folder, stop_on_interrupt
from peakgpt.engine.training.train_config import TrainConfig, best_dtype
from peakgpt.engine.training.trainer import Trainer
from peakgpt.kernels.hardware.device import choose_device

# Options that a run writes to settings.json. A resumed run reads them from this file.
SETTINGS = ("model", "steps", "batch", "tokens", "lr", "vocab", "seed", "dtype", "recompute",
            "micro_batch")  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text", nargs="+", metavar="FILE", help="UTF-8 files or folders (default: Python's library)")
    parser.add_argument("--model", default="gpt2-tiny", choices=sorted(PRESETS), metavar="PRESET",
                        help="such as gpt2 or pythia-70m; docs/families.md lists all (default gpt2-tiny)")  # fmt: skip
    parser.add_argument("--steps", type=int, default=1000, help="updates (default 1000)")
    parser.add_argument("--batch", type=int, default=8, help="sequences per update (default 8)")
    parser.add_argument("--micro-batch", type=int, help="sequences per pass; gradients are accumulated (default: all)")
    parser.add_argument("--tokens", type=int, default=256, help="tokens per sequence (default 256)")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate (default 1e-3)")
    parser.add_argument("--vocab", type=int, default=4096, help="vocabulary size of the tokenizer (default 4096)")
    parser.add_argument("--seed", type=int, default=1337, help="seed of initial weights and data order (default 1337)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"),
                        help="default: bfloat16 if the device multiplies it in hardware")  # fmt: skip
    parser.add_argument("--recompute", default="none", metavar="PLAN",
                        help="none, norm, mlp, block or block/N: activations that backward recomputes")  # fmt: skip
    parser.add_argument("--device", help='"cpu" or "cuda" (default: the CUDA device if there is one)')
    parser.add_argument("--save-every", type=int, default=250, metavar="STEPS",
                        help="steps between checkpoints (default 250); the last step always has one")  # fmt: skip
    parser.add_argument("--out", help="folder of the run (default runs/train-DATE-TIME)")
    parser.add_argument("--resume", metavar="FOLDER",
                        help="continue the run in this folder; it takes only --device and --save-every")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    if args.save_every < 1 or args.steps < 1:
        raise ValueError(f"--steps is {args.steps} and --save-every is {args.save_every}, expected at least 1")
    device = choose_device(args.device)
    if args.resume:
        folder, settings = RunFolder.reopen(args.resume), read_settings(Path(args.resume))
        tokenizer, loop = build_loop(folder, settings, device)
        loop.load(folder.path)
    else:
        folder, settings = RunFolder(args.out or default_run_folder("train")), _settings(args, device)
        with folder.discarded_on_bad_input():
            _prepare(args.text, settings, folder)
            tokenizer, loop = build_loop(folder, settings, device)
    with stop_on_interrupt() as stop_requested:
        for event in loop.run(validate_every=args.save_every, should_stop=stop_requested):
            folder.log(contender="peakgpt", **event.row())
            _print(event, loop.trainer.steps)
            if isinstance(event, ValidationMetrics) and not loop.finished:
                loop.save(folder.path, tokenizer)
    loop.save(folder.path, tokenizer)
    if not loop.finished:
        print(f"\nstopped after {loop.trainer.steps_done} steps; continue with: peakgpt train --resume {folder.path}")
        return 130
    print(f"checkpoint: {folder.checkpoint}")
    return 0


def _settings(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    settings = {name: getattr(args, name) for name in SETTINGS}
    return {**settings, "dtype": settings["dtype"] or str(best_dtype(device)).removeprefix("torch.")}


def read_settings(path: Path) -> dict[str, Any]:
    """Read the settings of a run folder.

    Raises:
        ValueError: settings.json is missing, is not JSON, or has other keys than SETTINGS.
    """
    try:
        settings = json.loads((path / "settings.json").read_text())
    except (OSError, ValueError):
        raise ValueError(f"run folder {path}: got no readable settings.json, expected one of `peakgpt train`") from None
    if sorted(settings) != sorted(SETTINGS):
        raise ValueError(f"{path / 'settings.json'}: got {', '.join(settings)}, expected {', '.join(SETTINGS)}")
    return settings


def _prepare(text: list[str] | None, settings: dict[str, Any], folder: RunFolder) -> None:
    """Write the tokens, the tokenizer and the settings of a new run."""
    corpus = load_corpus(text)
    report = partial(print, flush=True)
    tokenizer = train_tokenizer((document.text for document in corpus.train), settings["vocab"], report=report)
    tokenize_corpus(corpus, tokenizer, folder.tokens)
    tokenizer.save(folder.tokens)
    (folder.path / "settings.json").write_text(json.dumps(settings, indent=1) + "\n")
    print(f"corpus: {corpus}")


def build_loop(folder: RunFolder, settings: dict[str, Any], device: torch.device) -> tuple[Tokenizer, TrainingLoop]:
    """Build the training loop of a run from its settings and the tokens in its folder."""
    tokenizer = Tokenizer.load(folder.tokens)
    shards, validation = (TokenShards.open(folder.tokens, name) for name in ("train", "validation"))
    config = TrainConfig(
        batch=settings["batch"], tokens=settings["tokens"], lr=settings["lr"], seed=settings["seed"],
        dtype=getattr(torch, settings["dtype"]), recompute=settings["recompute"], micro_batch=settings["micro_batch"],
    )  # fmt: skip
    batches = Batches(shards, config.batch, config.tokens, config.seed)
    torch.manual_seed(config.seed)
    model = GPT.from_preset(settings["model"], vocab_size=tokenizer.vocab_size).to(device)
    trainer = Trainer(model, config, steps=settings["steps"])
    return tokenizer, TrainingLoop(trainer, batches, validation, report_mfu=True)


def _print(event: StepMetrics | ValidationMetrics, steps: int) -> None:
    if isinstance(event, ValidationMetrics):
        print(f"step {event.step}  held-out loss {event.loss:.4f}, {event.bits_per_byte:.4f} bits per byte")
    elif event.step % 10 == 0 or event.step == steps:
        print(f"step {event.step}/{steps}  loss {event.loss:.4f}  {event.tokens_per_s:,.0f} tok/s  "
              f"MFU {100 * event.mfu:.1f} %")  # fmt: skip
