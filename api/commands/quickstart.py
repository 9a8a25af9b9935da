"""peakgpt quickstart: train a small GPT on this machine's own text beside PyTorch eager, sample from it, report."""

from __future__ import annotations

import argparse
import copy
import time
from dataclasses import dataclass, replace

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from peakgpt.bench.contenders.eager_gpt import EagerGPT, EagerTrainer
from peakgpt.bench.decode import compare_decoding
from peakgpt.bench.environment import environment
from peakgpt.bench.interleave import interleave
from peakgpt.bench.op_cases import OpCase
from peakgpt.bench.ops import compare_ops
from peakgpt.bench.report import notes, tables, write_report
from peakgpt.bench.schema import Result, write_results
from peakgpt.bench.shared_batches import STRETCH, SharedBatches, stretch
from peakgpt.bench.timing import Timing, ratio
from peakgpt.engine.data.corpus import load_corpus
from peakgpt.engine.data.shards import Batches, TokenShards, prepare, validation_windows
from peakgpt.engine.data.tokenizer import Tokenizer, train_tokenizer
from peakgpt.engine.gpt import GPT
from peakgpt.engine.model.flops import mfu, parameter_count, training_flops
from peakgpt.engine.training.evaluate import validation_loss
from peakgpt.engine.training.run_folder import RunFolder, default_folder
from peakgpt.engine.training.trainer import Recipe, Trainer, best_dtype
from peakgpt.kernels.doctor import doctor
from peakgpt.kernels.hardware.device import choose_device
from peakgpt.kernels.hardware.peaks import peak_for

PRESET, VOCAB = "gpt2-tiny", 4096
RECIPE = Recipe(batch=8, tokens=256, lr=2e-3)
BESIDE = 0.2  # part of the training time that eager trains beside us
FIXED_S = 40  # tokenizer, validation, decoding, op table and report, at the default size
VALIDATION_BATCHES = 16
PROMPT = '"""Read a file and return'
CONTENDERS = ("peakgpt", "eager")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=5.0, help="wall time of the whole, about (default 5)")
    parser.add_argument(
        "--text", nargs="+", metavar="FILE", help="UTF-8 files or folders; default: Python's own library"
    )
    parser.add_argument("--device", help='"cpu" or "cuda"; the CUDA device where there is one by default')
    parser.add_argument("--out", help="folder of the run (default runs/quickstart-DATE-TIME)")
    parser.add_argument("--seed", type=int, default=RECIPE.seed, help="of initialisation and data order")


def run(args: argparse.Namespace) -> int:
    if not args.minutes > 0:
        raise ValueError(f"--minutes is {args.minutes}, expected more than 0")
    start = time.perf_counter()
    console = Console()
    device = choose_device(args.device)
    console.print(str(doctor(device)), highlight=False, soft_wrap=True)
    corpus = load_corpus(args.text)
    console.print(f"\ncorpus: {corpus}")
    folder = RunFolder(args.out or default_folder("quickstart"))
    with folder.discarded_on_bad_input():
        tokenizer = train_tokenizer((d.text for d in corpus.train), VOCAB)
        shards = prepare(corpus, tokenizer, folder.path / "tokens")
        console.print(
            f"tokens: {len(shards[0]):,} to train on, {len(shards[1]):,} to validate, "
            f"vocabulary {tokenizer.vocab_size}, {shards[0].bytes_per_token:.2f} bytes per token"
        )
        session = Session.prepare(
            device, replace(RECIPE, dtype=best_dtype(device), seed=args.seed), tokenizer, shards, folder
        )
    budget_s = max(5.0, args.minutes * 60 - FIXED_S * min(1.0, args.minutes / 5) - (time.perf_counter() - start))
    try:
        results = session.train(console, budget_s)
    except KeyboardInterrupt:
        session.save()
        done = session.ours.done if session.ours else 0
        console.print(f"\nstopped after {done} steps; checkpoint in {folder.checkpoint}")
        return 130
    session.save()
    text, decoding = session.sample(console)
    cases = [OpCase(op, sizes) for op, sizes in session.op_sizes().items()]
    results += decoding + compare_ops(cases, device, session.recipe.dtype, budget_s=min(10.0, 2 * args.minutes))
    env = environment(device)
    write_results(folder.path / "results.json", results, env)
    write_report(folder.path / "report.html", rows=folder.rows(), results=results, environment=env, corpus=str(corpus),
                 sample=text)  # fmt: skip
    print(*tables(results), *notes(results), sep="\n")
    console.print(
        f"\ncheckpoint: {folder.checkpoint}   report: {folder.path / 'report.html'}\n"
        f"next: peakgpt generate {folder.checkpoint} --prompt 'def '\n"
        "      peakgpt quickstart --text FILE... --minutes 30\n"
        "      peakgpt bench train"
    )
    return 0


@dataclass
class Session:
    """One quickstart: our trainer and eager's, from the same weights, over the same batches."""

    device: torch.device
    recipe: Recipe
    tokenizer: Tokenizer
    train_shards: TokenShards
    validation_shards: TokenShards
    folder: RunFolder
    model: GPT
    ours: Trainer | None = None

    @classmethod
    def prepare(cls, device, recipe, tokenizer, shards, folder) -> Session:
        Batches(shards[0], recipe.batch, recipe.tokens, recipe.seed)  # too little text is told before anything starts
        validation_windows(shards[1], recipe.batch, recipe.tokens)
        torch.manual_seed(recipe.seed)
        model = GPT.from_preset(PRESET, vocab_size=tokenizer.vocab_size).to(device)
        return cls(device, recipe, tokenizer, *shards, folder, model)

    def train(self, console: Console, budget_s: float) -> list[Result]:
        """Train for about budget_s seconds, eager beside us at first; returns both contenders' timings."""
        steps, rounds = self._plan(budget_s)
        initial = self.model.state_dict()
        eager = EagerGPT(self.model.config).to(self.device)
        eager.load_state_dict(initial)
        batches = SharedBatches(self._batches(), self.device, CONTENDERS)
        trainers = {"peakgpt": Trainer(self.model, self.recipe, steps=steps),
                    "eager": EagerTrainer(eager, self.recipe, steps=steps)}  # fmt: skip
        self.ours = trainers["peakgpt"]
        self._flops, self._peak = (
            training_flops(self.model.config, self.recipe.tokens),
            peak_for(self.device, self.recipe.dtype),
        )
        console.print(
            f"model: {PRESET}, {parameter_count(self.model.config) / 1e6:.2f} M parameters, "
            f"{str(self.recipe.dtype).removeprefix('torch.')}; {steps} steps of "
            f"{self.recipe.batch} x {self.recipe.tokens} tokens, eager beside us for the first {rounds * STRETCH}\n"
        )
        self._validate()
        with _progress(console) as progress:
            self._bar, self._progress = progress.add_task("", total=steps, loss=0.0, rate=0.0, mfu=0.0), progress
            self._clock = {name: time.perf_counter() for name in CONTENDERS}
            timings = interleave(
                {name: self._stretch(name, trainer, batches) for name, trainer in trainers.items()},
                rounds=rounds - 1, warmup=0, device=self.device,
            )  # fmt: skip
            batches.forget("eager")
            del trainers["eager"], eager
            self._validate()
            checks = {steps * quarter // 4 for quarter in (2, 3)}
            while self.ours.done < steps:
                self._stretch("peakgpt", self.ours, batches, min(STRETCH, steps - self.ours.done))()
                if any(self.ours.done - STRETCH < check <= self.ours.done for check in checks):
                    self._validate()
        self._validate(4 * VALIDATION_BATCHES)
        console.print(f"peakgpt trains {ratio(timings['eager'], timings['peakgpt']).median:.2f} x as fast as eager")
        return [self._result(name, timing) for name, timing in timings.items()]

    def save(self) -> None:
        """Write the checkpoint in transformers' GPT-2 layout, from the optimizer's float32 masters."""
        masters = None if self.ours is None else self.ours.optimizer.master_weights(self.model)
        self.model.save_pretrained(self.folder.checkpoint, self.tokenizer, weights=masters)

    def sample(self, console: Console) -> tuple[str, list[Result]]:
        """Stream a continuation of PROMPT, then time decoding beside eager."""
        from peakgpt.commands.generate import stream_text

        console.print("\na sample (temperature 0.8, top-k 50):\n")
        self.model.eval()
        text = stream_text(self.model, self.tokenizer, PROMPT, max_tokens=200, temperature=0.8, top_k=50,
                           seed=self.recipe.seed)  # fmt: skip
        ids = torch.tensor([self.tokenizer.encode(PROMPT)], device=self.device)
        return text, compare_decoding(self.model, ids, count=128)

    def op_sizes(self) -> dict[str, dict[str, int]]:
        """The sizes of this training step's ops."""
        c, batch, tokens = self.model.config, self.recipe.batch, self.recipe.tokens
        rows = {"rows": batch * tokens, "width": c.n_embd}
        return {
            "layernorm": rows,
            "add_layernorm": rows,
            "mlp": {**rows, "hidden": c.n_inner},
            "attention_qkv": {"batch": batch, "tokens": tokens, "heads": c.n_head, "head_dim": c.head_dim},
            "linear_cross_entropy": {**rows, "vocab": c.vocab_size},
            "embedding": {"batch": batch, "tokens": tokens, "vocab": c.vocab_size, "width": c.n_embd},
            "adamw": {"count": parameter_count(c)},
        }

    def _batches(self) -> Batches:
        return Batches(self.train_shards, self.recipe.batch, self.recipe.tokens, self.recipe.seed)

    def _plan(self, budget_s: float) -> tuple[int, int]:
        """(steps, rounds with eager) that fill the budget, from the speed of throw-away copies of both."""
        config = self.model.config
        trial = {"peakgpt": Trainer(copy.deepcopy(self.model), self.recipe, steps=100),
                 "eager": EagerTrainer(EagerGPT(config).to(self.device), self.recipe, steps=100)}  # fmt: skip
        pair = tuple(t.to(self.device) for t in next(self._batches()))
        timings = interleave(
            {n: lambda t=t: t.step(*pair) for n, t in trial.items()}, rounds=3, warmup=2, device=self.device
        )
        ours, both = timings["peakgpt"].median_s, sum(t.median_s for t in timings.values())
        rounds = max(4, round(BESIDE * budget_s / (both * STRETCH)))
        return rounds * STRETCH + max(0, round((1 - BESIDE) * budget_s / ours)), rounds

    def _stretch(self, name, trainer, batches, steps=STRETCH):
        return stretch(name, trainer, batches, self._on_step, steps)

    def _on_step(self, name: str, step: int, loss: float) -> None:
        now = time.perf_counter()
        # A stretch of the other contender lies between two of ours: its time is not ours.
        seconds, self._clock = now - max(self._clock.values()), {**self._clock, name: now}
        rate = self.recipe.batch * self.recipe.tokens / seconds
        used = mfu(rate, self._flops, self._peak.flops_s)
        self.folder.log(contender=name, step=step, loss=loss, tokens_per_s=round(rate, 1), mfu=round(used, 4))
        if name == "peakgpt":
            self._progress.update(self._bar, completed=step, loss=loss, rate=rate, mfu=100 * used)

    def _validate(self, batches: int = VALIDATION_BATCHES) -> None:
        loss = validation_loss(
            self.model, self.validation_shards, self.recipe.batch, self.recipe.tokens, batches=batches
        )
        self.folder.log(
            contender="peakgpt", step=self.ours.done, validation_loss=loss,
            bits_per_byte=self.validation_shards.bits_per_byte(loss), batches=batches,
        )  # fmt: skip
        self._clock = {name: time.perf_counter() for name in CONTENDERS}

    def _result(self, name: str, timing: Timing) -> Result:
        tokens = STRETCH * self.recipe.batch * self.recipe.tokens
        return Result.of(
            timing, bench="train", contender=name, backend="auto" if name == "peakgpt" else "torch",
            device=str(self.device),
            case={"model": PRESET, "batch": self.recipe.batch, "tokens": self.recipe.tokens, "steps": STRETCH},
            dtype=str(self.recipe.dtype).removeprefix("torch."), flops=self._flops * tokens, flops_kind="model",
            peak_flops_s=self._peak.flops_s, peak_source=self._peak.source,
        )  # fmt: skip


def _progress(console: Console) -> Progress:
    return Progress(
        BarColumn(bar_width=30), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.3f}"),
        TextColumn("{task.fields[rate]:,.0f} tok/s"), TextColumn("MFU {task.fields[mfu]:.1f} %"), TimeRemainingColumn(),
        console=console,
    )  # fmt: skip
