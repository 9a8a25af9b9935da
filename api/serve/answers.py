"""Build OpenAI responses from outputs of the engine."""

from __future__ import annotations

import json
import math
import time
import uuid
from collections.abc import Iterator
from typing import Any, NamedTuple

from peakgpt.engine.data.tokenizer import Tokenizer, TokenOffsets
from peakgpt.engine.inference.engine import Output, TokenLogprob
from peakgpt.engine.inference.text_stream import MAX_TAIL_BYTES
from peakgpt.serve.schema import CompletionRequest

SLICE = 256  # elements of a list that are encoded in one call, during which no other thread runs
LOWEST = -9999.0  # stands for a log-probability of -inf, which JSON cannot express, as in OpenAI


class TokenTexts:
    """Token ids as texts, all different: bytes that are not UTF-8 are "bytes:\\xNN", ids without a token are "<id>"."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.texts = tokenizer, dict[int, str]()

    def __getitem__(self, token: int) -> str:
        text = self.texts.get(token)
        if text is None:
            data = self.tokenizer.token_bytes(token)
            try:
                text = data.decode() or f"<{token}>"
            except UnicodeDecodeError:
                text = "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
            self.texts[token] = text
        return text


class Echo(NamedTuple):
    """The text of a prompt as it is returned, and where the text of its tokens begins in it."""

    text: str
    start: int = 0  # negative if the tokenizer puts characters before the text


class Answer:
    """One response: the fields that are common to its parts, and the token counts of `usage`."""

    def __init__(self, completion: CompletionRequest, model: str, texts: TokenTexts, prompts: list[list[int]],
                 echoes: list[Echo]):  # fmt: skip
        """
        Args:
            completion: the request.
            model: its name.
            texts: the tokens as texts.
            prompts: token ids of the prompts.
            echoes: of the prompts, if the request has echo.
        """
        self.completion, self.texts, self.prompts, self.echoes = completion, texts, prompts, echoes
        prefix = "chatcmpl" if completion.chat else "cmpl"
        self.head = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self.completion_tokens, self.begin = 0, ""
        self.offsets: dict[int, TokenOffsets] = {}
        self.prompt_logprobs: dict[int, tuple[TokenLogprob, ...]] = {}
        self.begun: set[int] = set()

    @property
    def usage(self) -> dict[str, int]:
        prompt = sum(map(len, self.prompts))
        return {"prompt_tokens": prompt, "completion_tokens": self.completion_tokens,
                "total_tokens": prompt + self.completion_tokens}  # fmt: skip

    def kind(self, *, chunk: bool) -> str:
        return ("chat.completion.chunk" if chunk else "chat.completion") if self.completion.chat else "text_completion"

    def event(self, choice: dict[str, Any]) -> bytes:
        """Return a streamed choice as a server-sent event: `sse(frame(...))` with the common part encoded once."""
        self.begin = self.begin or json.dumps({**self.head, "object": self.kind(chunk=True)})[:-1]
        is_large = self.completion.echo and choice["logprobs"] is not None
        text = encode(choice) if is_large else json.dumps(choice)
        return f'data: {self.begin}, "choices": [{text}]}}\n\n'.encode()

    def frame(self, choices: list[dict], *, chunk: bool, usage: bool) -> dict[str, Any]:
        counts = {"usage": self.usage} if usage else {}
        return {**self.head, "object": self.kind(chunk=chunk), "choices": choices, **counts}

    def whole(self, choices: list[WholeChoice]) -> bytes:
        """Return the body of a response that is not streamed."""
        end = json.dumps({**self.head, "object": self.kind(chunk=False), "usage": self.usage})[:-1]
        return f'{end}, "choices": [{", ".join(choice.encode() for choice in choices)}]}}'.encode()

    def index(self, number: int, output: Output) -> int:
        """Return the index of an output's choice."""
        return number * self.completion.n + output.index

    def is_large(self, number: int, output: Output) -> bool:
        """Return whether a part has the log-probabilities of its prompt, thousands of tokens."""
        return self.completion.echo and output.logprobs is not None and self.index(number, output) not in self.begun

    def part(self, number: int, output: Output) -> dict[str, Any]:
        """Convert one output of the engine into a part of a choice: index, text, logprobs, finish_reason."""
        index = self.index(number, output)
        self.completion_tokens += len(output.token_ids)
        if output.prompt_logprobs is not None:
            self.prompt_logprobs[number] = output.prompt_logprobs
        first, text = index not in self.begun, output.text
        self.begun.add(index)
        logprobs = None
        if output.logprobs is not None:
            entries = output.logprobs
            # Completions list the stop token too, as OpenAI does: lm-eval counts the last entry as a new token.
            if self.completion.chat and isinstance(output.stop_reason, int):
                entries = entries[:-1]
            chat = self.completion.chat
            logprobs = self._chat_logprobs(entries) if chat else self._logprobs(index, number, entries, first)
        if first and self.completion.echo:
            text = self.echoes[number].text + text
        reason = output.finish_reason and _reason(output)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, index: int, number: int, logprobs: tuple[TokenLogprob, ...], first: bool) -> dict[str, list]:
        columns = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        offsets = self.offsets.get(index) or self._new_offsets(index, number)
        if first and self.completion.echo:
            token = self.prompts[number][0]
            _add(columns, self.texts[token], None, None, max(offsets.locate(token), 0))
            logprobs = (*self.prompt_logprobs.get(number, ()), *logprobs)
        for entry in logprobs:
            top = {self.texts[token]: _number(logprob) for token, logprob in entry.top}
            logprob = top[self.texts[entry.token]] = _number(entry.logprob)
            _add(columns, self.texts[entry.token], logprob, top, max(offsets.locate(entry.token), 0))
        return columns

    def _new_offsets(self, index: int, number: int) -> TokenOffsets:
        """Return the offsets of a choice. Without echo its text may begin inside a character of the prompt."""
        start = self.echoes[number].start if self.completion.echo else 0
        offsets = self.offsets[index] = TokenOffsets(self.texts.tokenizer, start)
        if not self.completion.echo:
            for token in self.prompts[number][-MAX_TAIL_BYTES:]:
                offsets.feed(token)
        return offsets

    def _chat_logprobs(self, logprobs: tuple[TokenLogprob, ...]) -> dict[str, list]:
        def entry(token: int, logprob: float) -> dict[str, Any]:
            return {"token": self.texts[token], "logprob": _number(logprob),
                    "bytes": list(self.texts.tokenizer.token_bytes(token))}  # fmt: skip

        return {"content": [{**entry(one.token, one.logprob), "top_logprobs": [entry(*pair) for pair in one.top]}
                            for one in logprobs], "refusal": None}  # fmt: skip


def _add(columns: dict[str, list], *values: Any) -> None:
    for column, value in zip(columns.values(), values, strict=True):
        column.append(value)


def _number(logprob: float) -> float | None:
    return None if math.isnan(logprob) else max(logprob, LOWEST)


def _reason(output: Output) -> str:
    return "length" if output.finish_reason == "length" else "stop"


class WholeChoice:
    """The parts of one choice. Their log-probabilities are kept as JSON, in a fifth of the memory of the objects."""

    def __init__(self, chat: bool):
        self.chat, self.texts = chat, list[str]()
        self.part: dict[str, Any] = {}
        self.columns: dict[str, list[str]] | None = None  # name -> parts of a JSON list

    def add(self, part: dict[str, Any]) -> None:
        """Append a part, in order."""
        self.texts.append(part["text"])
        logprobs, self.part = part.pop("logprobs"), part
        if logprobs is not None:
            self.columns = {name: [] for name in logprobs} if self.columns is None else self.columns
            for name, values in logprobs.items():
                self.columns[name] += _slices(values or [])

    def encode(self) -> str:
        """Return the choice as JSON."""
        choice = {**self.part, "text": "".join(self.texts)}
        choice = as_message(choice, chunk=False) if self.chat else choice
        return f'{json.dumps(choice)[:-1]}, "logprobs": {self._encode_columns()}}}'

    def _encode_columns(self) -> str:
        if self.columns is None:
            return "null"
        lists = (f'"{name}": ' + ("null" if name == "refusal" else f"[{', '.join(parts)}]")
                 for name, parts in self.columns.items())  # fmt: skip
        return "{" + ", ".join(lists) + "}"


def encode(value: Any) -> str:
    """Return `json.dumps(value)`. Long lists in objects are encoded in slices, so that other threads can run."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(name)}: {encode(inner)}" for name, inner in value.items()) + "}"
    if isinstance(value, list) and len(value) > SLICE:
        return f"[{', '.join(_slices(value))}]"
    return json.dumps(value)


def _slices(values: list) -> Iterator[str]:
    """Encode SLICE elements at a time, without the brackets."""
    for begin in range(0, len(values), SLICE):
        yield json.dumps(values[begin : begin + SLICE])[1:-1]


def as_message(choice: dict[str, Any], *, chunk: bool, first: bool = True) -> dict[str, Any]:
    """Convert an entry of `choices` from the completion format to the chat completion format."""
    text = choice.pop("text")
    message = {**({"role": "assistant"} if first else {}), "content": text}
    return {**choice, "delta" if chunk else "message": message}
