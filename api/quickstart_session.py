"""The session of `peakgpt quickstart`: training in turns with PyTorch eager, a sample, and timings of the ops."""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from peakgpt.bench.case import run_case
from peakgpt.bench.contenders.eager_gpt import EagerGPT, EagerTrainer
from peakgpt.bench.decode import compare_decoding
from peakgpt.bench.interleave import interleave
from peakgpt.bench.ops import op_cases
from peakgpt.bench.run_results import Failure, RunResults
from peakgpt.bench.schema import Result
from peakgpt.bench.shared_batches import STRETCH, SharedBatches
from peakgpt.bench.timing import Timing, ratio
from peakgpt.engine.data.batches import Batches, validation_batches
from peakgpt.engine.data.shards import TokenShards
from peakgpt.engine.data.tokenizer import Tokenizer
from peakgpt.engine.gpt import GPT
from peakgpt.engine.model.flops import parameter_count
from peakgpt.engine.training.loop import TrainingLoop
from peakgpt.engine.training.run_folder import RunFolder
from peakgpt.engine.training.train_config import TrainConfig
from peakgpt.engine.training.trainer import Trainer
from peakgpt.kernels.hardware.peaks import peak_for
from peakgpt.time_budget import TimeBudget

PRESET = "gpt2-tiny"
COMPARISON_SHARE = 0.2  # share of the training time in which peakgpt and eager train in turns
TRAINING_S = 5.0  # at least, however short --minutes is: less gives no useful model
LINE_S = 5.0  # between two lines of training where the output is no terminal
VALIDATION_BATCHES = 16
SAMPLE_TOKENS = 200
DECODINGS = 20  # a comparison of decoding takes about as long as so many runs of peakgpt
PROMPT = '"""Read a file and return'
CONTENDERS = ("peakgpt", "eager")
OP_CONTENDERS = (*CONTENDERS, "torch fused")  # compiling an op takes longer than timing all of them
OP_S = 0.75  # for one pass of one op


class Stopped(Exception):
    """The training was asked to stop, and has stopped between two steps."""


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

    def train(self, console: Console, budget: TimeBudget, should_stop: Callable[[], bool]) -> list[Result]:
        """Train until the phase should end, at first in turns with eager; return the timings of both.

        The number of steps is planned from a few trials. It is cut while the training runs if the machine gets slower,
        and the learning rate follows.

        Raises:
            Stopped: `should_stop` returned True before a step.
        """
        training_s = budget.left_s("training", at_least=TRAINING_S)
        end_s = budget.clock() + training_s
        steps, rounds = self._plan(training_s)
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
        start_s = budget.clock()
        self._validate()
        end_s -= 4 * (budget.clock() - start_s)  # the last validation has four times as many batches
        with _progress(console) as progress:
            task = progress.add_task("", total=steps, loss=0.0, rate=0.0, mfu=0.0)
            line_s = -math.inf

            def train_steps() -> None:
                nonlocal line_s
                for event in self.loop.run(STRETCH, should_stop=should_stop, synchronous=True):  # as eager is
                    self.folder.log(contender="peakgpt", **event.row())
                    progress.update(task, completed=event.step, total=trainer.steps, loss=event.loss,
                                    rate=event.tokens_per_s, mfu=100 * event.mfu)  # fmt: skip
                    if not console.is_terminal and budget.clock() - line_s >= LINE_S:
                        line_s = budget.clock()
                        console.print(f"step {event.step}/{trainer.steps}  loss {event.loss:.3f}  "
                                      f"{event.tokens_per_s:,.0f} tok/s  MFU {100 * event.mfu:.1f} %")  # fmt: skip
                if should_stop():
                    raise Stopped

            contenders = {"peakgpt": train_steps, "eager": self._eager_steps(eager, shared, should_stop)}
            comparison_s = COMPARISON_SHARE * (end_s - budget.clock())
            timings = interleave(contenders, rounds=rounds - 1, warmup=0, device=self.device, budget_s=comparison_s,
                                 one_call=True)  # fmt: skip
            shared.remove("eager")
            del contenders, eager  # frees eager's memory
            self._validate()
            halves = [0.5, 0.75]  # of the steps, after which the model is validated
            while not self.loop.finished:
                start_s = budget.clock()
                train_steps()
                now_s = budget.clock()
                cut_steps(trainer, (now_s - start_s) / STRETCH, end_s - now_s)
                if halves and not self.loop.finished and trainer.steps_done >= halves[0] * trainer.steps:
                    halves.pop(0)
                    self._validate()
        self._validate(4 * VALIDATION_BATCHES)
        console.print(f"peakgpt trains {ratio(timings['eager'], timings['peakgpt']).median:.2f} x as fast as eager")
        return [self._result(name, timing) for name, timing in timings.items()]

    def sample(self, console: Console, found: RunResults, budget: TimeBudget) -> str:
        """Print a continuation of PROMPT and return it; time decoding by peakgpt and eager."""
        from peakgpt.commands.generate import stream_text

        console.print("\na sample (temperature 0.8, top-k 50):\n")
        self.model.eval()
        start_s = budget.clock()
        text = stream_text(self.model, self.tokenizer, PROMPT, max_tokens=SAMPLE_TOKENS, temperature=0.8, top_k=50,
                           seed=self.config.seed)  # fmt: skip
        ids = torch.tensor([self.tokenizer.encode(PROMPT)], device=self.device)
        left_s, token_s = budget.left_s("decoding"), (budget.clock() - start_s) / SAMPLE_TOKENS
        count = int(min(128, max(8, left_s / (DECODINGS * token_s))))
        try:
            found.results += compare_decoding(self.model, ids, count=count, budget_s=left_s)
        except Exception as error:  # a failing row must not cost the report
            found.add(Failure.of(error, "peakgpt decoding"))
        return text

    def time_ops(self, found: RunResults, budget: TimeBudget) -> None:
        """Time the ops of this model's training step, as many as fit into the time."""
        dtype = str(self.config.dtype).removeprefix("torch.")
        cases = op_cases(self.op_sizes(), [dtype], only=OP_CONTENDERS)
        for done, case in enumerate(cases):
            left_s = budget.left_s("ops")
            if left_s == 0:
                print(f"no time left to time {', '.join(case.name for case in cases[done:])}")
                return
            seconds = min(OP_S, left_s / (len(cases) - done))
            run_case(dataclasses.replace(case, seconds=seconds), self.device, found.add)

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

    def _eager_steps(
        self, model: EagerGPT, shared: SharedBatches, should_stop: Callable[[], bool]
    ) -> Callable[[], None]:
        """Return a function that trains eager for STRETCH steps and logs them; it raises Stopped as `train` does."""
        trainer, loop = EagerTrainer(model, self.config, steps=self.loop.trainer.steps), self.loop

        def train_steps() -> None:
            last_step_s = time.perf_counter()
            for _ in range(STRETCH):
                if should_stop():
                    raise Stopped
                loss = float(trainer.step(*shared.take("eager")))
                previous_s, last_step_s = last_step_s, time.perf_counter()
                event = loop.step_metrics(trainer.done, loss, last_step_s - previous_s)
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


def cut_steps(trainer: Trainer, step_s: float, left_s: float) -> None:
    """Plan fewer updates if the planned ones do not fit into the time that is left."""
    fitting = max(0, int(left_s / step_s))
    trainer.steps = max(trainer.steps_done, min(trainer.steps, trainer.steps_done + fitting))


def _batches_of(contender: str, shared: SharedBatches) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield shared.take(contender)


def _progress(console: Console) -> Progress:
    return Progress(
        BarColumn(bar_width=30), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.3f}"),
        TextColumn("{task.fields[rate]:,.0f} tok/s"), TextColumn("MFU {task.fields[mfu]:.1f} %"), TimeRemainingColumn(),
        console=console,
    )  # fmt: skip
