"""peakgpt quickstart: train a small GPT on text of this machine, compare with PyTorch eager, write a report."""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from peakgpt.bench.contenders.eager_gpt import EagerGPT, EagerTrainer
from peakgpt.bench.decode import compare_decoding
from peakgpt.bench.environment import environment
from peakgpt.bench.interleave import interleave
from peakgpt.bench.op_cases import OpCase
from peakgpt.bench.ops import compare_ops
from peakgpt.bench.report import notes, tables, write_report
from peakgpt.bench.schema import Result, write_results
from peakgpt.bench.shared_batches import STRETCH, SharedBatches
from peakgpt.bench.timing import Timing, ratio
from peakgpt.engine.data.batches import Batches, validation_batches
from peakgpt.engine.data.corpus import load_corpus
from peakgpt.engine.data.shards import TokenShards, tokenize_corpus
from peakgpt.engine.data.tokenizer import Tokenizer, train_tokenizer
from peakgpt.engine.gpt import GPT
from peakgpt.engine.model.flops import mfu, parameter_count
from peakgpt.engine.training.loop import StepMetrics, TrainingLoop
from peakgpt.engine.training.run_folder import RunFolder, default_run_folder
from peakgpt.engine.training.train_config import TrainConfig, best_dtype
from peakgpt.engine.training.trainer import Trainer
from peakgpt.kernels.doctor import doctor
from peakgpt.kernels.hardware.device import choose_device
from peakgpt.kernels.hardware.peaks import peak_for

PRESET, VOCAB = "gpt2-tiny", 4096
CONFIG = TrainConfig(batch=8, tokens=256, lr=2e-3)
COMPARISON_SHARE = 0.2  # share of the training time in which peakgpt and eager train in turns
FIXED_S = 40  # time of tokenizer, validation, decoding, op table and report with the default --minutes
VALIDATION_BATCHES = 16
PROMPT = '"""Read a file and return'
CONTENDERS = ("peakgpt", "eager")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=5.0, help="approximate wall time of the command (default 5)")
    parser.add_argument("--text", nargs="+", metavar="FILE", help="UTF-8 files or folders (default: Python's library)")
    parser.add_argument("--device", help='"cpu" or "cuda" (default: the CUDA device if there is one)')
    parser.add_argument("--out", help="folder of the run (default runs/quickstart-DATE-TIME)")
    parser.add_argument("--seed", type=int, default=CONFIG.seed, help="seed of initial weights and data order")


def run(args: argparse.Namespace) -> int:
    if not args.minutes > 0:
        raise ValueError(f"--minutes is {args.minutes}, expected more than 0")
    start = time.perf_counter()
    console = Console()
    device = choose_device(args.device)
    console.print(str(doctor(device)), highlight=False, soft_wrap=True)
    corpus = load_corpus(args.text)
    console.print(f"\ncorpus: {corpus}")
    folder = RunFolder(args.out or default_run_folder("quickstart"))
    with folder.discarded_on_bad_input():
        tokenizer = train_tokenizer((d.text for d in corpus.train), VOCAB)
        shards = tokenize_corpus(corpus, tokenizer, folder.tokens)
        console.print(
            f"tokens: {len(shards[0]):,} to train on, {len(shards[1]):,} to validate, "
            f"vocabulary {tokenizer.vocab_size}, {shards[0].bytes_per_token:.2f} bytes per token"
        )
        config = replace(CONFIG, dtype=best_dtype(device), seed=args.seed)
        session = Session.build(device, config, tokenizer, *shards, folder)
    budget_s = max(5.0, args.minutes * 60 - FIXED_S * min(1.0, args.minutes / 5) - (time.perf_counter() - start))
    try:
        results = session.train(console, budget_s)
    except KeyboardInterrupt:
        session.save()
        steps = session.loop.trainer.steps_done if session.loop else 0
        console.print(f"\nstopped after {steps} steps; checkpoint in {folder.checkpoint}")
        return 130
    session.save()
    text, decoding = session.sample(console)
    cases = [OpCase(op, sizes) for op, sizes in session.op_sizes().items()]
    results += [*decoding, *compare_ops(cases, device, session.config.dtype, budget_s=min(10.0, 2 * args.minutes))]
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
    """One quickstart: peakgpt and eager train from the same weights on the same batches, in turns."""

    device: torch.device
    config: TrainConfig
    tokenizer: Tokenizer
    train_shards: TokenShards
    validation_shards: TokenShards
    folder: RunFolder
    model: GPT
    loop: TrainingLoop | None = None  # None until training starts

    @classmethod
    def build(
        cls, device: torch.device, config: TrainConfig, tokenizer: Tokenizer, train_shards: TokenShards,
        validation_shards: TokenShards, folder: RunFolder,
    ) -> Session:  # fmt: skip
        """Build the model.

        Raises:
            ValueError: the text has too few tokens for a batch.
        """
        Batches(train_shards, config.batch, config.tokens, config.seed)
        validation_batches(validation_shards, config.batch, config.tokens)
        torch.manual_seed(config.seed)
        model = GPT.from_preset(PRESET, vocab_size=tokenizer.vocab_size).to(device)
        return cls(device, config, tokenizer, train_shards, validation_shards, folder, model)

    def train(self, console: Console, budget_s: float) -> list[Result]:
        """Train for about budget_s seconds, at first in turns with eager; return the timings of both."""
        steps, rounds = self._plan(budget_s)
        shared = SharedBatches(self._batches(), self.device, CONTENDERS)
        eager = EagerGPT(self.model.config).to(self.device)
        eager.load_state_dict(self.model.state_dict())  # before the trainer casts the model
        trainer = Trainer(self.model, self.config, steps=steps)
        batches = _batches_of("peakgpt", shared)
        self.loop = TrainingLoop(trainer, batches, self.validation_shards, report_mfu=True)
        console.print(
            f"model: {PRESET}, {parameter_count(self.model.config) / 1e6:.2f} M parameters, "
            f"{str(self.config.dtype).removeprefix('torch.')}; {steps} steps of "
            f"{self.config.batch} x {self.config.tokens} tokens, in turns with eager for the first {rounds * STRETCH}\n"
        )
        self._validate()
        with _progress(console) as progress:
            task = progress.add_task("", total=steps, loss=0.0, rate=0.0, mfu=0.0)

            def train_steps() -> None:
                for event in self.loop.run(STRETCH, synchronous=True):  # eager is synchronous too
                    self.folder.log(contender="peakgpt", **event.row())
                    progress.update(task, completed=event.step, loss=event.loss, rate=event.tokens_per_s,
                                    mfu=100 * event.mfu)  # fmt: skip

            contenders = {"peakgpt": train_steps, "eager": self._eager_steps(eager, shared)}
            timings = interleave(contenders, rounds=rounds - 1, warmup=0, device=self.device)
            shared.remove("eager")
            del contenders, eager  # frees eager's memory
            self._validate()
            while not self.loop.finished:
                before = trainer.steps_done
                train_steps()
                if any(before < steps * quarter // 4 <= trainer.steps_done for quarter in (2, 3)):
                    self._validate()
        self._validate(4 * VALIDATION_BATCHES)
        console.print(f"peakgpt trains {ratio(timings['eager'], timings['peakgpt']).median:.2f} x as fast as eager")
        return [self._result(name, timing) for name, timing in timings.items()]

    def save(self) -> None:
        """Write the checkpoint in the GPT-2 layout of transformers."""
        if self.loop is None:
            self.model.save_pretrained(self.folder.checkpoint, self.tokenizer)
        else:
            self.loop.save_model(self.folder.checkpoint, self.tokenizer)

    def sample(self, console: Console) -> tuple[str, list[Result]]:
        """Print a continuation of PROMPT, then time decoding by peakgpt and eager."""
        from peakgpt.commands.generate import stream_text

        console.print("\na sample (temperature 0.8, top-k 50):\n")
        self.model.eval()
        text = stream_text(self.model, self.tokenizer, PROMPT, max_tokens=200, temperature=0.8, top_k=50,
                           seed=self.config.seed)  # fmt: skip
        ids = torch.tensor([self.tokenizer.encode(PROMPT)], device=self.device)
        return text, compare_decoding(self.model, ids, count=128)

    def op_sizes(self) -> dict[str, dict[str, int]]:
        """Return the sizes of the ops in the training step of this model."""
        c, batch, tokens = self.model.config, self.config.batch, self.config.tokens
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
        return Batches(self.train_shards, self.config.batch, self.config.tokens, self.config.seed)

    def _plan(self, budget_s: float) -> tuple[int, int]:
        """Time copies of both trainers; return the steps and the rounds with eager that fill the budget."""
        config = self.model.config
        trial = {"peakgpt": Trainer(copy.deepcopy(self.model), self.config, steps=100),
                 "eager": EagerTrainer(EagerGPT(config).to(self.device), self.config, steps=100)}  # fmt: skip
        pair = tuple(t.to(self.device) for t in next(self._batches()))
        timings = interleave(
            {n: lambda t=t: t.step(*pair) for n, t in trial.items()}, rounds=3, warmup=2, device=self.device
        )
        ours, both = timings["peakgpt"].median_s, sum(t.median_s for t in timings.values())
        rounds = max(4, round(COMPARISON_SHARE * budget_s / (both * STRETCH)))
        return rounds * STRETCH + max(0, round((1 - COMPARISON_SHARE) * budget_s / ours)), rounds

    def _eager_steps(self, model: EagerGPT, shared: SharedBatches) -> Callable[[], None]:
        """Return a function that trains eager for STRETCH steps and logs them."""
        trainer, loop = EagerTrainer(model, self.config, steps=self.loop.trainer.steps), self.loop

        def train_steps() -> None:
            last_step_s = time.perf_counter()
            for _ in range(STRETCH):
                loss = float(trainer.step(*shared.take("eager")))
                previous_s, last_step_s = last_step_s, time.perf_counter()
                speed = self.config.batch * self.config.tokens / (last_step_s - previous_s)
                event = StepMetrics(trainer.done, loss, speed, mfu(speed, loop.flops_per_token, loop.peak_flops_s))
                self.folder.log(contender="eager", **event.row())

        return train_steps

    def _validate(self, batches: int = VALIDATION_BATCHES) -> None:
        self.folder.log(contender="peakgpt", **self.loop.validate(batches).row(), batches=batches)

    def _result(self, name: str, timing: Timing) -> Result:
        tokens, peak = STRETCH * self.config.batch * self.config.tokens, peak_for(self.device, self.config.dtype)
        return Result.of(
            timing, bench="train", contender=name, backend="auto" if name == "peakgpt" else "torch",
            device=str(self.device),
            case={"model": PRESET, "batch": self.config.batch, "tokens": self.config.tokens, "steps": STRETCH},
            dtype=str(self.config.dtype).removeprefix("torch."), flops=self.loop.flops_per_token * tokens,
            flops_kind="model",
            peak_flops_s=peak.flops_s, peak_source=peak.source,
        )  # fmt: skip


def _batches_of(contender: str, shared: SharedBatches) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield shared.take(contender)


def _progress(console: Console) -> Progress:
    return Progress(
        BarColumn(bar_width=30), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.3f}"),
        TextColumn("{task.fields[rate]:,.0f} tok/s"), TextColumn("MFU {task.fields[mfu]:.1f} %"), TimeRemainingColumn(),
        console=console,
    )  # fmt: skip
