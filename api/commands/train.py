"""peakgpt train: train a GPT on text files; stop it any time and go on where it stopped, bit for bit."""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

from peakgpt.engine.checkpoint.checkpoint import load_training_state, save_training_state
from peakgpt.engine.data.corpus import load_corpus
from peakgpt.engine.data.shards import Batches, TokenShards, prepare, validation_windows
from peakgpt.engine.data.tokenizer import Tokenizer, train_tokenizer
from peakgpt.engine.gpt import GPT
from peakgpt.engine.model.flops import mfu, recomputed_flops, training_flops
from peakgpt.engine.model.presets import PRESETS
from peakgpt.engine.training.delayed_metrics import DelayedMetrics
from peakgpt.engine.training.evaluate import validation_loss
from peakgpt.engine.training.run_folder import RunFolder, default_folder, stop_on_interrupt
from peakgpt.engine.training.trainer import Recipe, Trainer, best_dtype
from peakgpt.kernels.hardware.device import choose_device, peak_for

VALIDATION_BATCHES = 32
SETTINGS = ("model", "steps", "batch", "tokens", "lr", "vocab", "seed", "dtype", "recompute",
            "micro_batch")  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text", nargs="+", metavar="FILE", help="UTF-8 files or folders (default: Python's library)")
    parser.add_argument("--model", default="gpt2-tiny", choices=sorted(PRESETS), metavar="PRESET",
                        help="sizes, as gpt2 or pythia-70m: docs/families.md has all (default gpt2-tiny)")  # fmt: skip
    parser.add_argument("--steps", type=int, default=1000, help="updates (default 1000)")
    parser.add_argument("--batch", type=int, default=8, help="sequences an update (default 8)")
    parser.add_argument("--micro-batch", type=int, help="sequences at a time, gradients are added (default: all)")
    parser.add_argument("--tokens", type=int, default=256, help="length of each (default 256)")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate (default 1e-3)")
    parser.add_argument("--vocab", type=int, default=4096, help="tokenizer's vocabulary (default 4096)")
    parser.add_argument("--seed", type=int, default=1337, help="of initialisation and data order")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 where the device has it")
    parser.add_argument("--recompute", default="none", metavar="PLAN",
                        help="none, norm, mlp, block or block/N: what backward computes again")  # fmt: skip
    parser.add_argument("--device", help='"cpu" or "cuda"; the CUDA device where there is one by default')
    parser.add_argument("--save-every", type=int, default=250, metavar="STEPS", help="default 250; and at the end")
    parser.add_argument("--out", help="folder of the run (default runs/train-DATE-TIME)")
    parser.add_argument("--resume", metavar="FOLDER", help="go on with that run; only --device and --save-every count")


def run(args: argparse.Namespace) -> int:
    if args.save_every < 1 or args.steps < 1:
        raise ValueError(f"--steps is {args.steps} and --save-every is {args.save_every}, expected at least 1")
    device = choose_device(args.device)
    if args.resume:
        folder, settings = RunFolder.reopen(args.resume), _read_settings(Path(args.resume))
    else:
        settings = {name: getattr(args, name) for name in SETTINGS}
        settings["dtype"] = settings["dtype"] or str(best_dtype(device)).removeprefix("torch.")
        folder = RunFolder(args.out or default_folder("train"))
    with contextlib.nullcontext() if args.resume else folder.discarded_on_bad_input():
        if not args.resume:
            _start(args, settings, folder)
        training = Training(folder, settings, device)
    if args.resume:
        training.load()
    with stop_on_interrupt() as asked_to_stop:
        training.go_on(args.save_every, asked_to_stop)
    training.save()
    if training.trainer.done < training.trainer.steps:
        print(f"\nstopped after {training.trainer.done} steps; go on with: peakgpt train --resume {folder.path}")
        return 130
    print(f"checkpoint: {folder.checkpoint}")
    return 0


def _start(args: argparse.Namespace, settings: dict, folder: RunFolder) -> None:
    """Fill the folder with what a run, also a resumed one, reads: tokens, tokenizer, settings."""
    corpus = load_corpus(args.text)
    tokenizer = train_tokenizer((d.text for d in corpus.train), settings["vocab"])
    prepare(corpus, tokenizer, folder.path / "tokens")
    tokenizer.save(folder.path / "tokens")
    (folder.path / "settings.json").write_text(json.dumps(settings, indent=1) + "\n")
    print(f"corpus: {corpus}")


def _read_settings(path: Path) -> dict:
    try:
        settings = json.loads((path / "settings.json").read_text())
    except (OSError, ValueError):
        raise ValueError(f"run folder {path}: got no readable settings.json, expected one of `peakgpt train`") from None
    if sorted(settings) != sorted(SETTINGS):
        raise ValueError(f"{path / 'settings.json'}: got {', '.join(settings)}, expected {', '.join(SETTINGS)}")
    return settings


class Training:
    """A run of `peakgpt train`: what its settings say, over the tokens in its folder."""

    def __init__(self, folder: RunFolder, settings: dict, device: torch.device):
        self.folder, self.device = folder, device
        self.tokenizer = Tokenizer.load(folder.path / "tokens")
        self.shards, self.held_out = (TokenShards.open(folder.path / "tokens", n) for n in ("train", "validation"))
        self.recipe = Recipe(
            batch=settings["batch"], tokens=settings["tokens"], lr=settings["lr"], seed=settings["seed"],
            dtype=getattr(torch, settings["dtype"]), recompute=settings["recompute"],
            micro_batch=settings["micro_batch"],
        )  # fmt: skip
        self.batches = Batches(self.shards, self.recipe.batch, self.recipe.tokens, self.recipe.seed)
        validation_windows(self.held_out, self.recipe.batch, self.recipe.tokens)  # too little text is told now
        torch.manual_seed(self.recipe.seed)
        model = GPT.from_preset(settings["model"], vocab_size=self.tokenizer.vocab_size)
        if self.recipe.tokens > model.config.block_size:
            longest = model.config.block_size
            raise ValueError(f"--tokens is {self.recipe.tokens}, expected at most the model's {longest}")
        self.trainer = Trainer(model.to(device), self.recipe, steps=settings["steps"])
        config, tokens = model.config, self.recipe.tokens
        self.flops = training_flops(config, tokens)
        self.flops_again = recomputed_flops(config, tokens, self.recipe.recompute)
        self.peak_flops_s = peak_for(self.device, self.recipe.dtype).flops_s

    def go_on(self, save_every: int, asked_to_stop: Callable[[], bool]) -> None:
        """Train to the last step or until asked to stop, saving and validating every so many steps."""
        trainer, late = self.trainer, DelayedMetrics(self.device)
        self.clock = time.perf_counter()
        while trainer.done < trainer.steps and not asked_to_stop():
            batch = next(self.batches)
            if self.device.type == "cuda":
                batch = (t.pin_memory() for t in batch)  # else the copy waits for the step in flight
            loss = trainer.step(*(t.to(self.device, non_blocking=True) for t in batch))
            step, last = trainer.done, trainer.done == trainer.steps
            self._report(late.put(step, loss))
            if step % save_every == 0 or last:
                self._report(late.take())
                self._validate()
            if step % save_every == 0:
                self.save()
            if step % save_every == 0 or last:
                self.clock = time.perf_counter()
        self._report(late.take())

    def _report(self, arrived: list[tuple[int, float]]) -> None:
        """Log steps, (number, loss) each, that have ended since the clock was last set."""
        for step, loss in arrived:
            before, self.clock = self.clock, time.perf_counter()
            rate = self.recipe.batch * self.recipe.tokens / (self.clock - before)
            used = {"mfu": round(mfu(rate, self.flops, self.peak_flops_s), 4)}
            if self.flops_again:
                used["hfu"] = round(mfu(rate, self.flops + self.flops_again, self.peak_flops_s), 4)
            self.folder.log(contender="peakgpt", step=step, loss=loss, tokens_per_s=round(rate, 1), **used)
            if step % 10 == 0 or step == self.trainer.steps:
                steps, percent = self.trainer.steps, 100 * used["mfu"]
                print(f"step {step}/{steps}  loss {loss:.4f}  {rate:,.0f} tok/s  MFU {percent:.1f} %")

    def save(self) -> None:
        """Write the checkpoint for others, and beside it what this run needs to go on."""
        model, optimizer = self.trainer.model, self.trainer.optimizer
        model.save_pretrained(self.folder.checkpoint, self.tokenizer, weights=optimizer.master_weights(model))
        values = {"done": self.trainer.done, "data": self.batches.state_dict()}
        save_training_state(self.folder.path / "state", model, optimizer, values)

    def load(self) -> None:
        """Go back to the last save."""
        values = load_training_state(self.folder.path / "state", self.trainer.model, self.trainer.optimizer)
        self.batches.load_state_dict(values["data"])
        self.trainer.done = values["done"]

    def _validate(self) -> None:
        loss = validation_loss(self.trainer.model, self.held_out, self.recipe.batch, self.recipe.tokens,
                               batches=VALIDATION_BATCHES)  # fmt: skip
        bits = self.held_out.bits_per_byte(loss)
        self.folder.log(contender="peakgpt", step=self.trainer.done, validation_loss=loss, bits_per_byte=bits)
        print(f"step {self.trainer.done}  held-out loss {loss:.4f}, {bits:.4f} bits per byte")
