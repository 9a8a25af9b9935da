"""A task: examples with their right answers, and the prompts that are written from them.

    prompt   = task_prefix  shot separator ... shot separator  question
    question = example_input_prefix  input  [choice_prefix choice ...]  example_output_prefix
    shot     = question answer

Fields and defaults are those of the JSON tasks of BIG-bench (Srivastava et al. 2022, "Beyond the Imitation Game",
arXiv:2206.04615). Zero, one and few shots: Brown et al. 2020, arXiv:2005.14165, section 2. A shot may show a chain of
thought in place of the answer: Wei et al. 2022, arXiv:2201.11903.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

FIRST_SENTENCE = r"[^\.\?\!\;\n]+"  # BIG-bench's output_regex of a task that names neither it nor a stop_string
MAX_TOKENS = 128


@dataclass(frozen=True)
class Example:
    """A question with its right answers.

    Args:
        name: its place, such as "qa.jsonl:7".
        input: the question.
        targets: accepted answers, at least one.
        target_scores: choice -> score, 1 of a right and 0 of a wrong one; {} if the answer is free text.
        rationale: a chain of thought that ends with the answer; shots show it in place of the first target.
    """

    name: str
    input: str
    targets: tuple[str, ...]
    target_scores: Mapping[str, float] = field(default_factory=dict)
    rationale: str = ""

    @property
    def choices(self) -> tuple[str, ...]:
        return tuple(self.target_scores)

    @property
    def shown_answer(self) -> str:
        """The answer that a shot shows."""
        return self.rationale or self.targets[0]

    @property
    def text(self) -> str:
        """Question and answer, to compare with a corpus."""
        return f"{self.input}\n{self.targets[0]}"


@dataclass(frozen=True, kw_only=True)
class Task:
    """Examples, and how to ask and score them. The fields without a comment here are BIG-bench's.

    Args:
        name: for tables and file names.
        shots: examples to show; (): other examples of the task.
        metrics: names of metrics.py.
        not_computed: metrics that the file lists and that peakgpt does not have.
        human_baseline: metric -> score of people.
        stop_string: strings that end a generated text.
        output_regex: its first match in a generated text is the answer, or its group if it has one; "" takes the whole
            text.
        max_tokens: most new tokens.
    """

    name: str
    examples: tuple[Example, ...]
    metrics: tuple[str, ...]
    preferred_score: str
    shots: tuple[Example, ...] = ()
    not_computed: tuple[str, ...] = ()
    human_baseline: Mapping[str, float] = field(default_factory=dict)
    task_prefix: str = ""
    example_input_prefix: str = "\nQ: "
    example_output_prefix: str = "\nA: "
    choice_prefix: str = "\n  choice: "
    append_choices_to_input: bool = True
    few_shot_example_separator: str = "\n"
    stop_string: tuple[str, ...] = ()
    output_regex: str = ""
    max_tokens: int = MAX_TOKENS

    def question(self, example: Example) -> str:
        """Return the text that ends where the answer begins."""
        choices = ""
        if example.choices and self.append_choices_to_input:
            # A fixed order for each question: authors tend to write the right choice first.
            shuffled = random.Random(example.input).sample(sorted(example.choices), len(example.choices))
            choices = "".join(f"{self.choice_prefix}{choice}" for choice in shuffled)
        return f"{self.example_input_prefix}{example.input}{choices}{self.example_output_prefix}"

    def prompt(self, example: Example, shots: Sequence[Example] = ()) -> str:
        """Return the shots with their answers, and the question."""
        shown = [self.question(shot) + shot.shown_answer for shot in shots]
        return self.task_prefix + self.few_shot_example_separator.join([*shown, self.question(example)])

    def messages(self, example: Example, shots: Sequence[Example] = ()) -> list[dict[str, str]]:
        """Return the same as a chat: each question is a message of the user, each answer one of the assistant.

        The task_prefix begins the first message, because many templates have no place for a system's message.
        """
        turns = []
        for shot in shots:
            turns += [("user", self.question(shot).strip()), ("assistant", shot.shown_answer)]
        (_, first), *others = [*turns, ("user", self.question(example).strip())]
        turns = [("user", f"{self.task_prefix.strip()}\n\n{first}".strip()), *others]
        return [{"role": role, "content": content} for role, content in turns]

    def answer_of(self, generated: str) -> str:
        """Return the answer in a generated text, without blanks around it; "" if there is none."""
        regex = self.output_regex or ("" if self.stop_string else FIRST_SENTENCE)
        if not regex:
            return generated.strip()
        found = re.search(regex, generated)
        return "" if found is None else (found[found.re.groups] or "").strip()


class Shots:
    """Draws examples to show: the same ones for every question, so that a model computes their common prefix once.

    A question that was drawn itself gets the next example of the order instead.
    """

    def __init__(self, pool: Sequence[Example], count: int, seed: int):
        """
        Args:
            pool: examples to draw from.
            count: how many a question gets.
            seed: of the order.
        """
        self.count = count
        self._order = random.Random(seed).sample(list(pool), len(pool)) if count else []

    def of(self, example: Example) -> list[Example]:
        """Return the examples that a question shows."""
        return list(islice((shot for shot in self._order if shot.input != example.input), self.count))

    def check(self, examples: Sequence[Example]) -> None:
        """Check that every question gets its shots.

        Raises:
            ValueError: the pool has too few other questions.
        """
        for example in examples:
            if (found := len(self.of(example))) < self.count:
                raise ValueError(f"{example.name}: got {found} examples of other questions, expected --shots "
                                 f"{self.count} of them")  # fmt: skip
