"""Check requests and make their sequences: the work before the first step, none of which needs the engine's thread.

Everything that the continuations of a request have in common is made once: checks, choices, prefix hashes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import count

from peakgpt.engine.data.tokenizer import Tokenizer
from peakgpt.engine.inference.block_pool import BLOCK_TOKENS, prefix_hashes
from peakgpt.engine.inference.constrained_decoding import ChoiceConstraint, Choices
from peakgpt.engine.inference.embedding import NO_TOKENS, POOLINGS, EmbeddingSequence
from peakgpt.engine.inference.generation_config import GenerationConfig
from peakgpt.engine.inference.sampling import Uniforms, draw_seed
from peakgpt.engine.inference.sampling_params import ContextExceeded, InvalidParam, SamplingParams
from peakgpt.engine.inference.sequence import Request, RunningSequence, hash_seed
from peakgpt.engine.inference.text_stream import TextStream
from peakgpt.engine.model.config import GPTConfig


class Preparation:
    """Makes the sequences of requests. It reads constants of the engine only, so any thread may use it."""

    def __init__(
        self, config: GPTConfig, tokenizer: Tokenizer | None, cache_tokens: int, defaults: GenerationConfig
    ):  # fmt: skip
        """
        Args:
            config: of the model.
            tokenizer: for output text, stop strings and choices given as strings.
            cache_tokens: tokens that fit into the KV cache.
            defaults: of the checkpoint.
        """
        self.config, self.tokenizer, self.cache_tokens, self.defaults = config, tokenizer, cache_tokens, defaults
        ends = (*defaults.eos_token_id, *(tokenizer.stop_token_ids if tokenizer else ()))
        self.eos_token_ids = frozenset(token for token in ends if token < config.vocab_size)
        self._ids = count()

    def prepare(
        self, prompts: Sequence[tuple[Sequence[int], SamplingParams | None]]
    ) -> list[list[RunningSequence]]:
        """Return the sequences of each prompt, one for each continuation.

        Args:
            prompts: token ids, at least one, and how to continue them; None: as the checkpoint says. Prompts with the
                same object as `choices` share their tokens.
        Raises:
            InvalidParam: tokens or parameters that the model, the tokenizer or the cache does not support.
        """
        choices_of: dict[int, Choices | None] = {}
        return [self._sequences(prompt, params, choices_of) for prompt, params in prompts]

    def prepare_embeddings(
        self, inputs: Sequence[str | Sequence[int]], pooling: str, normalize: bool
    ) -> list[list[EmbeddingSequence]]:
        """Return the sequence of each text whose vector is wanted, in a list of its own.

        Args:
            inputs, pooling, normalize: see `Engine.embed`.
        Raises:
            InvalidParam: tokens that the model or the cache does not support, or an unknown pooling.
        """
        if pooling not in POOLINGS:
            raise InvalidParam("pooling", f"pooling is {pooling!r}, expected one of {', '.join(POOLINGS)}")
        prompts = [self._encode(text) if isinstance(text, str) else text for text in inputs]
        requests = [Request(next(self._ids), tuple(map(int, prompt)), NO_TOKENS) for prompt in prompts]
        return [
            [EmbeddingSequence(
                request, 0, self._max_length(request), Uniforms(0, 0), None, None, pooling=pooling,
                normalize=normalize, switch_length=self.config.switch_length,
                block_hashes=self._hashes(request.prompt_token_ids),
            )]
            for request in requests
        ]  # fmt: skip

    def _sequences(
        self, prompt: Sequence[int], params: SamplingParams | None, choices_of: dict[int, Choices | None]
    ) -> list[RunningSequence]:
        params = self.default_params(len(prompt)) if params is None else params
        request = Request(next(self._ids), tuple(map(int, prompt)), params)
        max_length = self._max_length(request)
        if id(params.choices) not in choices_of:
            choices_of[id(params.choices)] = self._choices(params)
        choices, stops = choices_of[id(params.choices)], self.stop_token_ids(params)
        hashes = self._hashes(request.prompt_token_ids)
        seed = draw_seed() if params.seed is None else params.seed
        return [
            RunningSequence(
                request, index, max_length, Uniforms(seed, index),
                TextStream(self.tokenizer, params.stop, request.prompt_token_ids) if self.tokenizer else None,
                ChoiceConstraint(choices) if choices else None, stops, switch_length=self.config.switch_length,
                block_hashes=list(hashes),
            )
            for index in range(params.n)
        ]  # fmt: skip

    def _hashes(self, prompt: Sequence[int]) -> list[bytes]:
        return prefix_hashes(prompt, BLOCK_TOKENS, seed=hash_seed(self.config.switch_length, len(prompt)))

    def stop_token_ids(self, params: SamplingParams) -> frozenset[int]:
        """Return all ids that end an output."""
        return frozenset((*params.stop_token_ids, *(() if params.ignore_eos else self.eos_token_ids)))

    def default_params(self, num_prompt: int) -> SamplingParams:
        """Return the parameters of a request that names none: those of the checkpoint, as far as there is room.

        Raises:
            InvalidParam: the prompt is not shorter than the checkpoint's max_length.
        """
        params = self.defaults.sampling_params(num_prompt)
        room, count = max(self.max_length - num_prompt, 0), params.max_tokens
        return replace(
            params, max_tokens=None if count is None else min(count, room), stop=params.stop if self.tokenizer else ()
        )

    @property
    def max_length(self) -> int:
        """Most tokens of a prompt and its output."""
        return min(self.config.block_size, self.cache_tokens)

    def _max_length(self, request: Request) -> int:
        """Maximum length of a continuation, prompt included."""
        p, prompt, limit = request.params, request.prompt_token_ids, self.max_length
        length = max(limit, len(prompt)) if p.max_tokens is None else len(prompt) + p.max_tokens
        too_long = "prompt" if len(prompt) > limit else "max_tokens"
        if length > self.config.block_size:
            raise ContextExceeded(too_long, f"{len(prompt)} prompt tokens and max_tokens {p.max_tokens}, expected at "
                                  f"most block_size {self.config.block_size} in all")  # fmt: skip
        if length > limit:
            raise ContextExceeded(too_long, f"up to {length} tokens, expected at most {limit}, the cache's size")
        if not prompt:
            raise InvalidParam("prompt", "0 prompt tokens, expected at least one")
        for name, ids in (("prompt", prompt), ("stop_token_ids", p.stop_token_ids), ("logit_bias", p.logit_bias)):
            self._check_ids(name, ids)
        if p.stop and not self.tokenizer:
            raise InvalidParam("stop", f"stop is {list(p.stop)}, expected none without a tokenizer")
        return length

    def _choices(self, params: SamplingParams) -> Choices | None:
        if not params.choices:
            return None
        # The output never gets longer than block_size, so the tokens after it cannot matter.
        try:
            ids = [self._encode_choice(choice)[: self.config.block_size + 1] for choice in params.choices]
            return Choices(ids, sorted(self.stop_token_ids(params)))
        except ValueError as error:
            raise InvalidParam("choices", str(error)) from None

    def _encode_choice(self, choice: str | Sequence[int]) -> Sequence[int]:
        if isinstance(choice, str):
            if not self.tokenizer:
                raise InvalidParam("choices", f"choice {choice!r}, expected token ids without a tokenizer")
            choice = self.tokenizer.encode(choice, add_special_tokens=False)
        self._check_ids("choices", choice)
        return choice

    def _encode(self, text: str) -> Sequence[int]:
        if not self.tokenizer:
            raise InvalidParam("prompt", f"got the text {text[:60]!r}, expected token ids without a tokenizer")
        return self.tokenizer.encode(text)

    def _check_ids(self, name: str, ids: Sequence[int]) -> None:
        size = self.config.vocab_size
        if wrong := [token for token in ids if not 0 <= token < size]:
            raise InvalidParam(name, f"{name} has id {wrong[0]}, expected 0 to vocab_size {size} - 1")
