"""From the body of a request to sequences of the engine: all work before the first step, in threads of its own.

Neither the event loop nor the engine's thread waits for it. The work is bounded by the size of the body, and by the
limits on products (api/serve/limits.py). Few threads do it, so that many large requests leave the interpreter to the
streams; the library of the tokenizer works without the interpreter's lock.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from peakgpt.engine.data.tokenizer import StreamDecoder, Tokenizer
from peakgpt.engine.inference.embedding import LAST, EmbeddingSequence
from peakgpt.engine.inference.preparation import Preparation
from peakgpt.engine.inference.sampling_params import ContextExceeded, InvalidParam, SamplingParams
from peakgpt.engine.inference.sequence import RunningSequence
from peakgpt.serve.answers import Answer, Echo, TokenTexts
from peakgpt.serve.chat import Chat
from peakgpt.serve.embeddings import EMBEDDING, EmbeddingAnswer
from peakgpt.serve.errors import BadRequest
from peakgpt.serve.guard import internal_error
from peakgpt.serve.json_body import parse
from peakgpt.serve.limits import Limits
from peakgpt.serve.schema import (
    DETOKENIZE,
    TOKENIZE,
    CompletionRequest,
    check,
    check_request,
    missing,
)

T = TypeVar("T")
THREADS = 2


class RequestPreparation:
    """Checks requests and encodes their prompts."""

    def __init__(self, preparation: Preparation, tokenizer: Tokenizer, name: str, chat: Chat | None,
                 limits: Limits):  # fmt: skip
        """
        Args:
            preparation: of the engine.
            tokenizer: of the engine.
            name: the only model that requests may name.
            chat: the chat templates, if the model has one.
            limits: of requests.
        """
        self.engine, self.tokenizer, self.name, self.chat, self.limits = preparation, tokenizer, name, chat, limits
        self.texts = TokenTexts(tokenizer)
        self.threads = ThreadPoolExecutor(THREADS, thread_name_prefix="prepare")
        vocabulary = tokenizer.library.get_vocab()
        self.num_ids = min(preparation.config.vocab_size, 1 + max(vocabulary.values()))
        # Upper bound of the prompt in characters: as if every token were the longest of the vocabulary.
        self.max_chars = preparation.config.block_size * max(map(len, vocabulary))

    async def run(self, function: Callable[..., T], *args: Any) -> T:
        """Call a function in one of the threads.

        Raises:
            BadRequest: raised by the function, or in place of any other exception of it.
        """
        return await asyncio.get_running_loop().run_in_executor(self.threads, _guarded, function, *args)

    # ---- in a thread

    def completion(self, body: bytes, chat: bool) -> CompletionRequest:
        """Check a completion request."""
        data = parse(body, self.limits)
        if chat and self.chat is None:
            raise BadRequest("messages: got a model without chat template, expected a prompt to /v1/completions",
                             param="messages", code="unsupported_parameter")  # fmt: skip
        completion = check_request(data, chat=chat, limits=self.limits)
        self._check_model(completion.fields)
        return completion

    def sequences(
        self, completion: CompletionRequest, texts: list[str | list[int]]
    ) -> tuple[list[list[RunningSequence]], Answer]:
        """Encode the prompts of a request and make their sequences."""
        name = "messages" if completion.chat else "prompt"
        prompts = [self._known(text if isinstance(text, list) else self._encode(text, name), name) for text in texts]
        params_of: dict[int, SamplingParams] = {}
        self._check_prompt_logprobs(completion, prompts)
        try:
            requests = []
            for prompt in prompts:
                rest = max(0, self.engine.max_length - len(prompt))
                if rest not in params_of:
                    params_of[rest] = completion.params(self.engine.defaults, len(prompt), rest)
                requests.append((prompt, params_of[rest]))
            sequences = self.engine.prepare(requests)
        except InvalidParam as error:
            raise self._refusal(error, completion) from None
        ends = all(params.max_tokens == 0 for params in params_of.values())
        echoes = [self._echo(*pair, ends) for pair in zip(texts, prompts, strict=True)] if completion.echo else []
        return sequences, Answer(completion, self.name, self.texts, prompts, echoes)

    def embedding(self, body: bytes) -> dict[str, Any]:
        """Check an embedding request; return its fields."""
        fields = check(parse(body, self.limits), EMBEDDING, self.limits)
        self._check_model(fields)
        _required(fields, "input")
        return fields

    def embedded_texts(self, fields: dict[str, Any]) -> tuple[list[list[EmbeddingSequence]], EmbeddingAnswer]:
        """Encode the texts of an embedding request and make their sequences."""
        prompts = []
        for text in fields["input"]:
            if not (ids := text if isinstance(text, list) else self._encode(text, "input")):
                raise BadRequest("input: got a text without tokens, expected at least one", param="input")
            prompts.append(self._known(ids, "input"))
        try:
            sequences = self.engine.prepare_embeddings(
                prompts, fields.get("pooling", LAST), fields.get("normalize", True)
            )
        except ContextExceeded as error:
            raise _too_long(str(error), self.engine, "input") from None
        return sequences, EmbeddingAnswer(self.name, prompts, fields.get("encoding_format", "float"))

    def tokenize(self, body: bytes) -> dict[str, Any]:
        """Answer a request to /tokenize."""
        fields = check(parse(body, self.limits), TOKENIZE, self.limits)
        self._check_model(fields)
        ids = self._encode(_required(fields, "prompt"), "prompt")
        return {"tokens": ids, "count": len(ids), "max_model_len": self.engine.config.block_size}

    def detokenize(self, body: bytes) -> dict[str, Any]:
        """Answer a request to /detokenize."""
        fields = check(parse(body, self.limits), DETOKENIZE, self.limits)
        self._check_model(fields)
        tokens = _required(fields, "tokens")
        if len(tokens) != 1 or isinstance(tokens[0], str):
            raise BadRequest(f"tokens: got {len(tokens)} lists or texts, expected a list of token ids", param="tokens")
        return {"prompt": self.tokenizer.decode(self._known(tokens[0], "tokens"))}

    # ---- checks

    def _check_model(self, fields: dict[str, Any]) -> None:
        if (model := fields.get("model", self.name)) != self.name:
            raise unknown_model(model, self.name)

    def _encode(self, text: str, param: str) -> list[int]:
        """Encode a text, unless it is too long to fit whatever its tokens are."""
        if len(text) > self.max_chars:
            raise _too_long(f"got {len(text)} characters, expected up to {self.max_chars}", self.engine, param)
        # A chat template has written the special tokens already.
        try:
            return self.tokenizer.encode(text, add_special_tokens=param != "messages")
        except ValueError as error:  # such as a regular expression of the tokenizer that takes too long
            raise BadRequest(f"{param}: {error}", param=param) from None

    def _known(self, ids: list[int], param: str) -> list[int]:
        ids = ids or self._context(param)
        if not 0 <= min(ids) <= max(ids) < self.num_ids:
            raise BadRequest(f"{param}: got ids from {min(ids)} to {max(ids)}, expected 0 to {self.num_ids - 1}",
                             param=param)  # fmt: skip
        if len(ids) > self.limits.prompt_tokens:
            raise _too_long(f"got {len(ids)} tokens, expected up to {self.limits.prompt_tokens}", self.engine, param)
        return ids

    def _context(self, param: str) -> list[int]:
        try:
            return self.tokenizer.context_ids
        except ValueError as error:
            raise BadRequest(f"{param}: got no tokens, expected at least 1; {error}", param=param) from None

    def _check_prompt_logprobs(self, completion: CompletionRequest, prompts: list[list[int]]) -> None:
        count, most = completion.fields.get("logprobs"), self.limits.prompt_logprobs
        if completion.echo and count is not None:
            total = sum(map(len, prompts)) * completion.n * (1 + count)
            if total > most:
                raise BadRequest(f"logprobs: got {total} log-probabilities of prompts (tokens x n x (1 + logprobs)), "
                                 f"expected up to {most} in all", param="logprobs")  # fmt: skip

    def _refusal(self, error: InvalidParam, completion: CompletionRequest) -> BadRequest:
        """Return an error of the engine with the client's name of the field."""
        name = error.name
        if completion.chat:
            name = {"prompt": "messages", "logprobs": "top_logprobs"}.get(name, name)
        if name == "max_tokens" and "max_completion_tokens" in completion.fields:
            name = "max_completion_tokens"
        if isinstance(error, ContextExceeded):
            return _too_long(str(error), self.engine, name)
        return BadRequest(f"{name}: {error}", param=name)

    def _echo(self, given: str | list[int], ids: list[int], is_all: bool) -> Echo:
        """Return the text of a prompt. The character that ids end in belongs to the text of the continuation.

        Args:
            is_all: no token follows.
        """
        decoder = StreamDecoder(self.tokenizer)
        text = "".join(map(decoder.feed, ids)) + (decoder.finish() if is_all else "")
        if isinstance(given, str) and text.endswith(given):
            return Echo(given, len(given) - len(text))
        return Echo(text)


def unknown_model(got: str, expected: str) -> BadRequest:
    return BadRequest(f"model: got {got[:64]!r}, expected {expected!r}", param="model", code="model_not_found")


def _required(fields: dict[str, Any], name: str) -> Any:
    if name not in fields:
        raise missing(name)
    return fields[name]


def _too_long(reason: str, engine: Preparation, param: str) -> BadRequest:
    # Clients recognize OpenAI's first sentence as well as the code.
    return BadRequest(f"This model's maximum context length is {engine.max_length} tokens. {param}: {reason}",
                      param=param, code="context_length_exceeded")  # fmt: skip


def _guarded(function: Callable[..., T], *args: Any) -> T:
    try:
        return function(*args)
    except BadRequest:
        raise
    except BaseException as error:  # also a panic of a Rust library; no interrupt arrives in this thread
        raise internal_error(error) from error
