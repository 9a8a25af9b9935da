"""Ask a model the questions of a task: score choices, or generate texts, greedily or by sampling and voting.

All prompts of a task run together. Their shots are equal, so a Scorer computes them once per tree (prefix_tree.py), and
an Engine once for all prompts, in whole blocks of its cache (block_pool.py).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from peakgpt.engine.data.tokenizer import Tokenizer
from peakgpt.engine.evaluation.metrics import CHOICES, TEXT, Answer, majority
from peakgpt.engine.evaluation.score import Scorer
from peakgpt.engine.evaluation.task import Example, Shots, Task
from peakgpt.engine.evaluation.zero_shot import encode_pairs
from peakgpt.engine.inference.engine import Engine
from peakgpt.engine.inference.sampling_params import SamplingParams
from peakgpt.engine.model.transformer import Transformer

SCORED_EXAMPLES = 256  # scored in one call, between two reports of progress


@dataclass(frozen=True, kw_only=True)
class AnswerOptions:
    """How a model is asked.

    Args:
        chat: write each prompt with the chat template of the tokenizer.
        votes: texts that are generated for each question; the most frequent answer counts.
        temperature: of the sampling; 0 is greedy.
        top_k: sample from this many most likely tokens; None: from all.
        max_tokens: most new tokens; None: as the task says.
        truncate: cut the beginning of prompts that are too long, as lm-evaluation-harness does.
        seed: of the sampling.
    """

    chat: bool = False
    votes: int = 1
    temperature: float = 0.0
    top_k: int | None = None
    max_tokens: int | None = None
    truncate: bool = False
    seed: int = 0


class Evaluator:
    """A model with its tokenizer that answers questions."""

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer, *, cache: str | None = None,
        report: Callable[[str], None] = lambda phase: None,
    ):  # fmt: skip
        """
        Args:
            model, tokenizer: of one checkpoint.
            cache: None or "int8", as for Engine.
            report: called with what the evaluator does now.
        """
        self.model, self.tokenizer, self._cache, self._report = model, tokenizer, cache, report

    @cached_property
    def scorer(self) -> Scorer:
        return Scorer(self.model, cache=self._cache)

    @cached_property
    def engine(self) -> Engine:
        return Engine(self.model, self.tokenizer, cache=self._cache)

    def answer(
        self, task: Task, examples: Sequence[Example], shots: Shots, reads: set[str], options: AnswerOptions
    ) -> list[Answer]:
        """Ask the questions of some examples of a task.

        Args:
            reads: CHOICES to score the choices, TEXT to generate texts, or both.
        Raises:
            ValueError: a prompt is too long, the tokenizer has no chat template, or there are too few shots.
        """
        prompts = self._prompts(task, examples, shots, options.chat)
        count = len(examples)
        logprobs = self._score(examples, prompts, options) if CHOICES in reads else [{}] * count
        outputs = self._generate(task, examples, prompts, options) if TEXT in reads else [()] * count
        found = [tuple(map(task.answer_of, texts)) for texts in outputs]
        parts = zip(examples, prompts, logprobs, outputs, found, strict=True)
        return [Answer(*part, majority(part[-1])) for part in parts]

    def _prompts(self, task: Task, examples: Sequence[Example], shots: Shots, chat: bool) -> list[str]:
        if not chat:
            return [task.prompt(example, shots.of(example)) for example in examples]
        chats = [task.messages(example, shots.of(example)) for example in examples]
        return [self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
                for messages in chats]  # fmt: skip

    def _score(
        self, examples: Sequence[Example], prompts: Sequence[str], options: AnswerOptions
    ) -> list[dict[str, float]]:
        """Return the log-probability of each choice of each example."""
        results = []
        for first in range(0, len(examples), SCORED_EXAMPLES):
            self._report(f"scored {first} of {len(examples)} examples")
            part = slice(first, first + SCORED_EXAMPLES)
            owners = [(example, choice) for example in examples[part] for choice in example.choices]
            texts = [(prompt, choice) for example, prompt in zip(examples[part], prompts[part], strict=True)
                     for choice in example.choices]  # fmt: skip
            pairs = encode_pairs(self.tokenizer, texts, add_special_tokens=not options.chat)
            pairs = [self._fitted(example, *pair, options) for (example, _), pair in zip(owners, pairs, strict=True)]
            scores = iter(self.scorer.score(pairs))
            results += [{choice: next(scores).total for choice in example.choices} for example in examples[part]]
        return results

    def _fitted(
        self, example: Example, context: list[int], continuation: list[int], options: AnswerOptions
    ) -> tuple[list[int], list[int]]:
        rest = f"a choice of {len(continuation)} tokens"
        total = self.model.config.block_size + 1  # the last token of a choice is not read
        return self._cut(example, context, total, len(continuation), rest, options), continuation

    def _generate(
        self, task: Task, examples: Sequence[Example], prompts: Sequence[str], options: AnswerOptions
    ) -> list[tuple[str, ...]]:
        """Return the generated texts of each example."""
        count = task.max_tokens if options.max_tokens is None else options.max_tokens
        texts = [prompt.rstrip(" ") for prompt in prompts]  # the space belongs to the first token of the answer
        start = [] if options.chat else self.tokenizer.start_ids
        encoded = [start + ids for ids in self.tokenizer.encode_batch(texts, add_special_tokens=False)]
        total, rest = self.engine.preparation.max_length, f"{count} new tokens"
        encoded = [self._cut(example, ids or self.tokenizer.context_ids, total, count, rest, options)
                   for example, ids in zip(examples, encoded, strict=True)]  # fmt: skip
        owners = {}
        for index, ids in enumerate(encoded):
            params = SamplingParams(
                max_tokens=count, temperature=options.temperature, top_k=options.top_k, n=options.votes,
                stop=task.stop_string, seed=random.Random(f"{options.seed}/{index}").getrandbits(64),
            )  # fmt: skip
            owners[self.engine.submit(ids, params)] = index
        return self._collect(owners, options.votes)

    def _collect(self, owners: dict[int, int], votes: int) -> list[tuple[str, ...]]:
        """Run the engine; return the texts of each prompt. `owners` maps ids of requests to prompts."""
        texts, ended = [[""] * votes for _ in owners], 0
        for output in self.engine.outputs():
            if output.error:
                raise output.error
            texts[owners[output.request_id]][output.index] += output.text
            ended += output.finish_reason is not None
            self._report(f"generated {ended} of {votes * len(owners)} texts")
        return [tuple(row) for row in texts]

    def _cut(
        self, example: Example, ids: list[int], total: int, reserved: int, rest: str, options: AnswerOptions
    ) -> list[int]:  # fmt: skip
        """Return a prompt that fits into `total` tokens with `reserved` more, which are `rest` in words.

        It loses its beginning if it may.
        """
        limit = total - reserved
        if len(ids) > limit and not (options.truncate and limit > 0):
            raise ValueError(f"{example.name}: got a prompt of {len(ids)} tokens and {rest}, expected at most {total} "
                             "in all; --truncate cuts the beginning of prompts")  # fmt: skip
        return ids[-limit:]
