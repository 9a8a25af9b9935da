"""How one request is to be continued, as data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

GREEDY = 0.0  # temperature
LEAST_TEMPERATURE, LEAST_TOP_P = 1e-3, 1e-6  # float32 tells no smaller ones from 0
OF_A_BATCH = ("max_new_tokens", "temperature", "top_k", "top_p", "stop", "seed")  # the others are the Engine's


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How a prompt is continued; the defaults draw from the model's own distribution.

    Args:
        max_new_tokens: at most this many; None means as many as model and cache have room for. 0 only scores the
            prompt.
        temperature: 0 is greedy, and top_k, top_p and min_p do not matter.
        top_k: choose among the k largest logits.
        top_p: then among the fewest tokens whose probabilities reach p.
        min_p: and among those at least this likely as the likeliest (Nguyen et al. 2024, arXiv:2407.01082).
        repetition_penalty: divides positive logits of tokens in the prompt or the text, multiplies negative ones
            (Keskar et al. 2019, arXiv:1909.05858, section 4.1).
        presence_penalty: subtracted from the logits of tokens in the text.
        frequency_penalty: subtracted from them as often as they are there.
        stop: ids that end the text; the one that did is among its tokens, and not in its text.
        stop_strings: end the text before them, wherever tokens begin; they need a tokenizer.
        logit_bias: added to logits, by id.
        seed: of the choice, 64 bits; None draws one from torch's generator.
        n: how many continuations.
        logprobs: how many likeliest tokens are told beside the chosen one, with log-probabilities; None tells nothing.
            All log-probabilities are the model's own, before temperature, penalties, bias and choices.
        prompt_logprobs: log-probabilities of the prompt's tokens from this position on; None tells nothing.
        choices: the text is one of these strings (they need a tokenizer) or sequences of ids; where one begins another,
            an id of `stop` ends the shorter.
    Raises:
        ValueError: a value out of range.
    """

    max_new_tokens: int | None = None
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: Sequence[int] = ()
    stop_strings: Sequence[str] = ()
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    choices: Sequence[str | Sequence[int]] = ()

    def __post_init__(self):
        count = self.max_new_tokens
        if count is not None and (not isinstance(count, Integral) or count < 0):
            raise ValueError(f"sampling: max_new_tokens is {count!r}, expected at least 0, or None")
        if self.temperature and not LEAST_TEMPERATURE <= self.temperature < math.inf:
            raise ValueError(
                f"sampling: temperature is {self.temperature}, expected 0 (greedy) or at least {LEAST_TEMPERATURE}"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"sampling: top_k is {self.top_k}, expected at least 1, or None")
        if self.top_p is not None and not LEAST_TOP_P <= self.top_p <= 1:
            raise ValueError(f"sampling: top_p is {self.top_p}, expected {LEAST_TOP_P} <= top_p <= 1, or None")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"sampling: min_p is {self.min_p}, expected 0 to 1, or None")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"sampling: repetition_penalty is {self.repetition_penalty}, expected more than 0")
        for name in ("presence_penalty", "frequency_penalty"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"sampling: {name} is {getattr(self, name)}, expected a number")
        if not all(math.isfinite(bias) or bias == -math.inf for bias in self.logit_bias.values()):
            raise ValueError(f"sampling: logit_bias is {dict(self.logit_bias)}, expected numbers, or -inf")
        if self.n < 1:
            raise ValueError(f"sampling: n is {self.n}, expected at least 1")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"sampling: {name} is {value}, expected at least 0, or None")
        if not all(self.stop_strings):
            raise ValueError(f"sampling: stop_strings are {list(self.stop_strings)}, expected none that is empty")
        if not all(len(choice) for choice in self.choices):
            raise ValueError(f"sampling: choices are {list(self.choices)}, expected none that is empty")

    @classmethod
    def of_a_batch(cls, caller: str, options: Mapping[str, Any], own: Sequence[str] = ()) -> SamplingParams:
        """From the options of GPT.generate and GPT.stream, whose own keywords a refusal names too.

        Raises:
            TypeError: another name than those of OF_A_BATCH.
            ValueError: a value out of range.
        """
        if unknown := [name for name in options if name not in OF_A_BATCH]:
            raise TypeError(f"{caller}: got option {unknown[0]!r}, expected {', '.join((*OF_A_BATCH, *own))}")
        return cls(**options)

    @property
    def adjusts(self) -> bool:
        """Whether logits are changed before a token is chosen."""
        return bool(self.logit_bias) or self.penalises

    @property
    def penalises(self) -> bool:
        """Whether what is there already matters."""
        return self.repetition_penalty != 1.0 or bool(self.presence_penalty or self.frequency_penalty)
