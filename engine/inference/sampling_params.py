"""SamplingParams: how the engine continues one prompt. The fields have vLLM's names."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral

# float32 cannot distinguish anything smaller from 0.
MIN_TEMPERATURE, MIN_TOP_P = 1e-3, 1e-6


class InvalidParam(ValueError):
    """A parameter of a request has a wrong value; `name` is the parameter."""

    def __init__(self, name: str, message: str):
        super().__init__(message)
        self.name = name


class ContextExceeded(InvalidParam):
    """The prompt, or the prompt and max_tokens, are longer than the model's context or the cache."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to continue a prompt. The defaults sample from the model's own distribution.

    Args:
        max_tokens: largest number of new tokens; None means as many as the model and the cache can hold. 0 only
            computes the log-probabilities of the prompt.
        temperature: divides the logits. 0 is greedy decoding, which ignores top_k, top_p and min_p.
        top_k: sample among the k tokens with the largest logits.
        top_p: then among the smallest set of tokens whose probabilities sum to top_p.
        min_p: then among the tokens whose probability is at least min_p times the largest probability (Nguyen et al.
            2024, arXiv:2407.01082).
        repetition_penalty: divides positive logits, and multiplies negative logits, of tokens that occur in the prompt
            or the output (Keskar et al. 2019, arXiv:1909.05858, section 4.1).
        presence_penalty: subtracted once from the logits of tokens that occur in the output.
        frequency_penalty: subtracted from the logits of a token once per occurrence in the output.
        stop: strings that end the output. The output text ends before the string. A stop string may begin and end
            inside a token. Needs a tokenizer.
        stop_token_ids: token ids that end the output, besides those that end a text of the checkpoint (its
            generation_config.json and tokenizer). The id is part of the output tokens, not of the output text.
        ignore_eos: only stop_token_ids end the output.
        logit_bias: token id -> number added to its logit.
        seed: of the random numbers, 64 bits; None draws a seed from torch's generator.
        n: number of continuations.
        logprobs: number of most likely tokens to return per output token, in addition to the chosen token; None
            returns no log-probabilities. All log-probabilities come from the model's own distribution, before
            temperature, penalties, bias and constraints.
        prompt_logprobs: number of most likely tokens to return per prompt token, in addition to the prompt token
            itself; None returns no log-probabilities of the prompt. The first token of the prompt has none.
        prompt_logprobs_start: first position of the prompt for which prompt_logprobs are returned.
        choices: the output is one of these, each a string (needs a tokenizer) or a sequence of token ids. If one choice
            is a prefix of another, one of stop_token_ids ends the shorter.
    Raises:
        InvalidParam: a value out of range.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    prompt_logprobs_start: int = 0
    choices: Sequence[str | Sequence[int]] = ()

    def __post_init__(self):
        count = self.max_tokens
        is_count = isinstance(count, Integral) and count >= 0
        self._require("max_tokens", count is None or is_count, "at least 0, or None")
        self._require(
            "temperature", self.temperature == 0 or MIN_TEMPERATURE <= self.temperature < math.inf,
            f"0 (greedy) or at least {MIN_TEMPERATURE}",
        )  # fmt: skip
        self._require("top_k", self.top_k is None or self.top_k >= 1, "at least 1, or None")
        self._require(
            "top_p", self.top_p is None or MIN_TOP_P <= self.top_p <= 1, f"{MIN_TOP_P} <= top_p <= 1, or None"
        )
        self._require("min_p", self.min_p is None or 0 <= self.min_p <= 1, "0 to 1, or None")
        self._require("repetition_penalty", 0 < self.repetition_penalty < math.inf, "more than 0")
        for name in ("presence_penalty", "frequency_penalty"):
            self._require(name, math.isfinite(getattr(self, name)), "a finite number")
        finite = all(math.isfinite(bias) or bias == -math.inf for bias in self.logit_bias.values())
        self._require("logit_bias", finite, "finite numbers or -inf")
        self._require("n", self.n >= 1, "at least 1")
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            self._require(name, count is None or count >= 0, "at least 0, or None")
        first = self.prompt_logprobs_start
        self._require("prompt_logprobs_start", first >= 0, "at least 0")
        is_used = not first or self.prompt_logprobs is not None
        self._require("prompt_logprobs_start", is_used, "0 without prompt_logprobs")
        self._require("stop", not isinstance(self.stop, str), "a sequence of strings")
        for name in ("stop", "choices"):
            self._require(name, all(len(value) for value in getattr(self, name)), "no empty element")

    def _require(self, name: str, condition: bool, expected: str) -> None:
        if not condition:
            raise InvalidParam(name, f"sampling: {name} is {getattr(self, name)!r}, expected {expected}")

    @property
    def changes_logits(self) -> bool:
        """Whether penalties or a bias change the logits."""
        return bool(self.logit_bias) or self.has_penalties

    @property
    def has_penalties(self) -> bool:
        """Whether the logits depend on the tokens so far."""
        return self.repetition_penalty != 1.0 or bool(self.presence_penalty or self.frequency_penalty)
