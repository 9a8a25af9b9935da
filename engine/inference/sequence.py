"""Requests, their outputs, and the state of one running sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from peakgpt.engine.inference.block_pool import prefix_hashes
from peakgpt.engine.inference.chunk import Chunk
from peakgpt.engine.inference.constrained_decoding import ChoiceConstraint
from peakgpt.engine.inference.sampling import TokenLogprob, Uniforms, adjust, log_probabilities
from peakgpt.engine.inference.sampling_params import SamplingParams
from peakgpt.engine.inference.text_stream import TextStream


@dataclass(frozen=True)
class Request:
    """A prompt and how to continue it."""

    request_id: int
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams


@dataclass(frozen=True)
class Output:
    """The tokens that one step adds to one continuation of a request.

    Args:
        request_id: returned by Engine.submit.
        index: which of the request's n continuations.
        token_ids: new tokens.
        text: new text that later tokens cannot change; empty without a tokenizer.
        logprobs: one for each new token, if requested.
        finish_reason: None while the sequence continues; then "stop", "length" or "error".
        stop_reason: the stop token or stop string that ended the sequence.
        prompt_logprobs: if requested, with the first output of index 0.
        error: the exception that ended this sequence; other sequences continue.
        embedding: (C,) float32 on the CPU, of a text of `Engine.embed`.
    """

    request_id: int
    index: int = 0
    token_ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    error: BaseException | None = None
    embedding: Tensor | None = None


def hash_seed(switch_length: int | None, length: int) -> bytes:
    """Return the seed of the prefix hashes of a text: blocks of a longer one have keys with other angles."""
    return b"long" if switch_length is not None and length > switch_length else b""


@dataclass(eq=False)
class RunningSequence:
    """One continuation of a request, from `submit` to its last token."""

    request: Request
    index: int
    max_length: int  # tokens of the prompt and the output
    uniforms: Uniforms
    text_stream: TextStream | None
    choices: ChoiceConstraint | None
    stop_token_ids: frozenset[int] = frozenset()  # all ids that end the output
    switch_length: int | None = None  # of the model: longer texts have other angles, see rotary_tables.py
    num_computed: int = 0  # tokens whose keys and values are in the cache
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)  # prefix hashes of the full blocks
    num_published: int = 0  # full blocks that the pool knows
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    draft: list[int] = field(default_factory=list)  # tokens proposed for this step
    is_outdated: bool = False  # whether its keys in the cache have the angles of shorter texts

    def __post_init__(self):
        self.params, prompt = self.request.params, self.request.prompt_token_ids
        self.token_ids, self.num_prompt = list(prompt), len(prompt)
        returns_logprobs = self.params.prompt_logprobs is not None and self.index == 0
        first = max(1, self.params.prompt_logprobs_start) if returns_logprobs else self.num_prompt
        self.first_scored = min(first, self.num_prompt)  # first prompt token that gets a log-probability

    # ---- before a step

    @property
    def is_decoding(self) -> bool:
        """Whether only the last token is still to be computed."""
        return self.num_computed == len(self.token_ids) - 1

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to compute."""
        scored = self.first_scored + len(self.prompt_logprobs)
        return len(self.token_ids) == self.max_length and scored >= self.num_prompt

    @property
    def first_logit_position(self) -> int:
        """First position whose logits are still needed."""
        return min(self.first_scored + len(self.prompt_logprobs), len(self.token_ids)) - 1

    @property
    def num_new(self) -> int:
        """Tokens that are not computed."""
        return len(self.token_ids) - self.num_computed

    @property
    def max_draft(self) -> int:
        """Most tokens of a draft: one more token has room after it, and no token has other angles than without it."""
        known, limit, switch = len(self.token_ids), self.max_length - 1, self.switch_length
        return (limit if switch is None or known > switch else min(limit, switch)) - known

    def next_chunk(self, num_tokens: int) -> Chunk:
        """The next `num_tokens` tokens, and the draft."""
        ids = [*self.token_ids[self.num_computed : self.num_computed + num_tokens], *self.draft]
        num_logits = num_tokens - max(self.first_logit_position - self.num_computed, 0)
        return Chunk(
            ids, self.num_computed, self.block_table, max(num_logits, 0) + len(self.draft), len(self.token_ids)
        )

    def update_hashes(self, num_tokens: int, block_tokens: int) -> None:
        """Hash the full blocks of the first `num_tokens` tokens."""
        seed = hash_seed(self.switch_length, len(self.token_ids))
        self.block_hashes = prefix_hashes(self.token_ids[:num_tokens], block_tokens, self.block_hashes, seed=seed)

    # ---- after a step

    def add_prompt_logprobs(self, chunk: Chunk, logits: Tensor) -> None:
        """Score the prompt tokens that follow the tokens of a chunk."""
        first = chunk.end - chunk.num_logits  # position of the first row
        targets = self.request.prompt_token_ids[first + 1 : first + 1 + chunk.num_logits]
        if first + 1 >= self.first_scored and targets:
            top = [self.params.prompt_logprobs or 0] * len(targets)
            self.prompt_logprobs += log_probabilities(logits[: len(targets)], targets, top)

    @property
    def changes_logits(self) -> bool:
        return bool(self.params.changes_logits or self.choices)

    def change_logits(self, logits: Tensor) -> bool:
        """Apply penalties, bias and choices, in place, to the rows of the last token and its draft; return True."""
        for row, z in enumerate(logits):
            if self.params.changes_logits:
                output = [*self.token_ids[self.num_prompt :], *self.draft[:row]]
                adjust(z, self.params, self.request.prompt_token_ids, output)
            if self.choices:
                allowed = torch.tensor(self.choices.allowed(), device=z.device)
                values = z[allowed]
                z.fill_(float("-inf"))
                z[allowed] = values
        return True

    def uniform(self, row: int) -> float:
        """Random number for the output token of row `row`; greedy decoding needs none."""
        if self.params.temperature == 0:
            return 0.0
        return self.uniforms[len(self.token_ids) - self.num_prompt + row]

    def append(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprob | None], vocab_size: int) -> Output:
        """Append sampled tokens, up to the first one that ends the sequence or differs from the draft.

        Raises:
            ArithmeticError: the logits have a NaN or an infinity, which `choose` reports as the token vocab_size.
        """
        count, text, finish_reason, stop_reason = 0, "", None if tokens else "length", None
        switch, known = self.switch_length, len(self.token_ids)
        for token, drafted in zip(tokens, [*self.draft, None], strict=False):
            if token >= vocab_size:
                raise ArithmeticError(f"generate: the logits after {len(self.token_ids)} tokens are not finite")
            self.token_ids.append(token)
            count += 1
            if token in self.stop_token_ids:
                finish_reason, stop_reason = "stop", token
            else:
                text += self.text_stream.feed(token) if self.text_stream else ""
                stop_reason = self.text_stream and self.text_stream.stopped_by
                if stop_reason or (self.choices and self.choices.feed(token)):
                    finish_reason = "stop"
                elif len(self.token_ids) == self.max_length:
                    finish_reason = "length"
            if finish_reason or token != drafted:
                break
        self.is_outdated = switch is not None and known <= switch < len(self.token_ids)
        if self.draft:
            self.num_computed, self.draft = len(self.token_ids) - 1, []
        if finish_reason and count and self.text_stream and not self.text_stream.stopped_by:
            text += self.text_stream.finish()
        return self.output(tokens[:count], logprobs[:count], text, finish_reason, stop_reason)

    def output(self, tokens=(), logprobs=(), text="", finish_reason=None, stop_reason=None) -> Output:
        """New tokens as an Output."""
        is_first = len(self.token_ids) == self.num_prompt + len(tokens)
        return Output(
            self.request.request_id, self.index, tuple(tokens), text,
            None if self.params.logprobs is None else tuple(logprobs), finish_reason, stop_reason,
            tuple(self.prompt_logprobs) if is_first and self.first_scored < self.num_prompt else None,
        )  # fmt: skip

    def failed(self, error: BaseException) -> Output:
        """The output of a sequence that an exception ends."""
        return Output(self.request.request_id, self.index, finish_reason="error", error=error)
