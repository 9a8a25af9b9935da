"""The session of `peakgpt quickstart`: training in turns with PyTorch eager, a sample, and timings of the ops."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from rich.console import Console
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
from peakgpt.engine.data.batches import Batches
from peakgpt.engine.data.shards import TokenShards
from peakgpt.engine.data.tokenizer import Tokenizer
from peakgpt.engine.gpt import GPT
from peakgpt.engine.model.flops import parameter_count
from peakgpt.engine.training.loop import TrainingLoop
from peakgpt.engine.training.run_folder import RunFolder
from peakgpt.engine.training.time_limit import TimeLimit
from peakgpt.engine.training.train_config import TrainConfig
from peakgpt.engine.training.trainer import Trainer
from peakgpt.engine.training.validation import Validator
from peakgpt.engine.training.validation_config import HELD_OUT, ValidationConfig
from peakgpt.kernels.hardware.peaks import peak_for
from peakgpt.kernels.hardware.stopwatch import stopwatch
from peakgpt.progress import TrainingProgress
from peakgpt.time_budget import TimeBudget

PRESET = "gpt2-tiny"
COMPARISON_SHARE = 0.2  # share of the training time in which peakgpt and eager train in turns
ROUNDS = 4  # of the comparison, if there is time
LEAST_ROUNDS = 3
FORWARD_SHARE = 1 / 3  # of a training step
VALIDATION = ValidationConfig(validation_batches=8)
LAST_SHARE = 4  # the last validation has so many times as many batches, if there is time for them
SAMPLE_TOKENS, SHORT_SAMPLE = 200, 40  # the latter without time for more
DECODINGS = 20  # a comparison of decoding takes about as long as so many runs of peakgpt
PROMPT = '"""Read a file and return'
CONTENDERS = ("peakgpt", "eager")
OP_CONTENDERS = (*CONTENDERS, "torch fused")  # compiling an op takes longer than timing all of them
OP_S = 0.75  # for one pass of one op


class Stopped(Exception):
    """The training was asked to stop, and has stopped between two steps."""


@dataclass(frozen=True)
class Plan:
    """The training of a quickstart.

    Args:
        steps: about, in all; the number follows the speed.
        rounds: of the comparison, in which each contender takes a turn.
        stretch: steps of a turn.
        least_s: seconds of the fewest rounds and of the validations before and after them.
    """

    steps: int
    rounds: int
    stretch: int
    least_s: float = 0.0

    @classmethod
    def of(cls, budget_s: float, ours_s: float, eager_s: float) -> Plan:
        """Return the plan that fills a budget, for contenders whose steps take so many seconds.

        Turns of STRETCH steps are shorter if the budget has no time for ROUNDS of them.
        """
        budget_s = max(budget_s, 0.0)
        fitting = int(COMPARISON_SHARE * budget_s / (ours_s + eager_s))  # steps of each contender
        stretch = min(max(fitting // ROUNDS, 1), STRETCH)
        rounds = max(fitting // stretch, ROUNDS)
        steps = rounds * stretch + int((1 - COMPARISON_SHARE) * budget_s / ours_s)
        validations_s = 2 * VALIDATION.validation_batches * FORWARD_SHARE * ours_s
        return cls(steps, rounds, stretch, LEAST_ROUNDS * (ours_s + eager_s) + validations_s)


@dataclass
class Session:
    """One quickstart: peakgpt and eager train from the same weights on the same batches, in turns."""

    device: torch.device
    config: TrainConfig
    tokenizer: Tokenizer
    train_shards: TokenShards
    folder: RunFolder
    model: GPT
    validator: Validator
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
        torch.manual_seed(config.seed)
        model = GPT.from_preset(PRESET, vocab_size=tokenizer.vocab_size).to(device)
        validator = Validator(model, {HELD_OUT: validation_shards}, VALIDATION, batch=config.batch,
                              tokens=config.tokens)  # fmt: skip
        return cls(device, config, tokenizer, train_shards, folder, model, validator)

    def train(
        self, console: Console, budget: TimeBudget, plan: Plan, should_stop: Callable[[], bool]
    ) -> list[Result]:  # fmt: skip
        """Train until the phase should end, at first in turns with eager; return the timings of both.

        The steps after the comparison are planned anew before each of them, and the learning rate follows.

        Raises:
            Stopped: `should_stop` returned True before a step.
        """
        shared = SharedBatches(self._batches(), self.device, CONTENDERS)
        eager = EagerGPT(self.model.config).to(self.device)
        eager.load_state_dict(self.model.state_dict())  # before the trainer casts the model
        trainer = Trainer(self.model, self.config, steps=plan.steps)
        self.loop = TrainingLoop(trainer, _batches_of("peakgpt", shared), self.validator, report_mfu=True)
        console.print(
            f"model: {PRESET}, {parameter_count(self.model.config) / 1e6:.2f} M parameters, "
            f"{str(self.config.dtype).removeprefix('torch.')}; about {plan.steps} steps of {self.config.batch} x "
            f"{self.config.tokens} tokens, in turns with eager for the first {plan.rounds * plan.stretch}\n"
        )
        seconds = self._validate()
        with TrainingProgress(console, clock=budget.clock) as progress:

            def train_steps(steps: int, before_step: Callable[[], None] = lambda: None) -> None:
                def stop() -> bool:
                    before_step()
                    return should_stop()

                for event in self.loop.run(steps, should_stop=stop, synchronous=True):  # as eager is
                    self.folder.log(contender="peakgpt", **event.row())
                    limit.observe(event.seconds)
                    progress.step(event, trainer.steps)
                if should_stop():
                    raise Stopped

            # The last validation has LAST_SHARE times as many batches; between them there are three.
            limit = TimeLimit(budget.left_s("training"), reserve_s=lambda: LAST_SHARE * seconds, clock=budget.clock)
            contenders = {
                "peakgpt": lambda: train_steps(plan.stretch),
                "eager": self._eager_steps(eager, shared, plan.stretch, should_stop),
            }
            comparison_s = COMPARISON_SHARE * (limit.left_s - LAST_SHARE * seconds)
            timings = interleave(contenders, rounds=plan.rounds, warmup=0, device=self.device, budget_s=comparison_s,
                                 least=LEAST_ROUNDS, one_call=True)  # fmt: skip
            shared.remove("eager")
            del contenders, eager  # frees eager's memory
            for share in (0.25, 0.5, 0.75):  # of the steps, after which the model is validated
                if limit.fitting_steps() == 0:
                    break
                seconds = self._validate()
                count = int(share * (limit.fitting_steps() + trainer.steps_done)) - trainer.steps_done
                train_steps(max(count, 0), lambda: limit.plan(trainer))
            train_steps(trainer.steps, lambda: limit.plan(trainer))
        batches = VALIDATION.validation_batches
        fitting = int(budget.left_s("training") / seconds * batches)
        self._validate(min(max(fitting, batches), LAST_SHARE * batches))
        console.print(f"peakgpt trains {ratio(timings['eager'], timings['peakgpt']).median:.2f} x as fast as eager")
        return [self._result(name, timing, plan.stretch) for name, timing in timings.items()]

    def sample(self, console: Console, found: RunResults, budget: TimeBudget) -> str:
        """Print a continuation of PROMPT and return it; time decoding by peakgpt and eager."""
        from peakgpt.commands.generate import stream_text

        console.print("\na sample (temperature 0.8, top-k 50):\n")
        self.model.eval()
        start_s, tokens = budget.clock(), SAMPLE_TOKENS if budget.left_s("decoding") else SHORT_SAMPLE
        text = stream_text(self.model, self.tokenizer, PROMPT, max_tokens=tokens, temperature=0.8, top_k=50,
                           seed=self.config.seed)  # fmt: skip
        ids = torch.tensor([self.tokenizer.encode(PROMPT)], device=self.device)
        left_s, token_s = budget.left_s("decoding"), (budget.clock() - start_s) / tokens
        if left_s == 0:  # a comparison has three rounds, however long they take
            console.print("no time left to compare decoding")
            return text
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

    def plan(self, budget: TimeBudget) -> Plan:
        """Time one step of copies of both trainers; return the plan that fills the time of the training."""
        config = self.model.config
        trial = (Trainer(copy.deepcopy(self.model), self.config, steps=100),
                 EagerTrainer(EagerGPT(config).to(self.device), self.config, steps=100))  # fmt: skip
        pair = tuple(t.to(self.device) for t in next(self._batches()))
        seconds = []
        for trainer in trial:
            trainer.step(*pair)  # warms up
            seconds.append(stopwatch(self.device)(lambda t=trainer: t.step(*pair)))
        return Plan.of(budget.left_s("training"), *seconds)

    def _eager_steps(
        self, model: EagerGPT, shared: SharedBatches, stretch: int, should_stop: Callable[[], bool]
    ) -> Callable[[], None]:
        """Return a function that trains eager for some steps and logs them; it raises Stopped as `train` does."""
        trainer, loop = EagerTrainer(model, self.config, steps=self.loop.trainer.steps), self.loop

        def train_steps() -> None:
            last_step_s = time.perf_counter()
            for _ in range(stretch):
                if should_stop():
                    raise Stopped
                loss = float(trainer.step(*shared.take("eager")))
                previous_s, last_step_s = last_step_s, time.perf_counter()
                event = loop.step_metrics(trainer.done, loss, last_step_s - previous_s)
                self.folder.log(contender="eager", **event.row())

        return train_steps

    def _validate(self, batches: int | None = None) -> float:
        """Validate and log; return the seconds that it took."""
        event = self.loop.validate(batches)
        self.folder.log(contender="peakgpt", **event.row())
        return event.seconds

    def _result(self, name: str, timing: Timing, stretch: int) -> Result:
        tokens, peak = stretch * self.config.batch * self.config.tokens, peak_for(self.device, self.config.dtype)
        return Result.of(
            timing, bench="train", contender=name, backend="auto" if name == "peakgpt" else "torch",
            device=str(self.device),
            case={"model": PRESET, "batch": self.config.batch, "tokens": self.config.tokens, "steps": stretch},
            dtype=str(self.config.dtype).removeprefix("torch."), flops=self.loop.flops_per_token * tokens,
            flops_kind="model",
            peak_flops_s=peak.flops_s, peak_source=peak.source,
        )  # fmt: skip


def _batches_of(contender: str, shared: SharedBatches) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield shared.take(contender)
