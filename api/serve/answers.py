"""Build OpenAI responses from outputs of the engine."""

from __future__ import annotations

import json
import time
import uuid
from typing import Any

from peakgpt.engine.data.tokenizer import Tokenizer
from peakgpt.engine.inference.engine import Output, TokenLogprob
from peakgpt.serve.schema import CompletionRequest


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """Return a token as text. Bytes that are not UTF-8 become "bytes:\\xNN", so that all tokens differ."""
    data = tokenizer.token_bytes(token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class Answer:
    """One response: the fields that are common to its parts, and the token counts of `usage`."""

    def __init__(self, completion: CompletionRequest, model: str, tokenizer: Tokenizer, prompts: list[list[int]],
                 texts: list[str]):  # fmt: skip
        self.completion, self.tokenizer, self.prompts, self.texts = completion, tokenizer, prompts, texts
        prefix = "chatcmpl" if completion.chat else "cmpl"
        self.head = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self.completion_tokens, self.begin = 0, ""
        self.offsets: dict[int, int] = {}
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
        return f'data: {self.begin}, "choices": [{json.dumps(choice)}]}}\n\n'.encode()

    def frame(self, choices: list[dict], *, chunk: bool, usage: bool) -> dict[str, Any]:
        counts = {"usage": self.usage} if usage else {}
        return {**self.head, "object": self.kind(chunk=chunk), "choices": choices, **counts}

    def part(self, number: int, output: Output) -> dict[str, Any]:
        """Convert one output of the engine into a part of a choice: index, text, logprobs, finish_reason."""
        index = number * self.completion.n + output.index
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
            text = self.texts[number] + text
        reason = output.finish_reason and _reason(output)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, index: int, number: int, logprobs: tuple[TokenLogprob, ...], first: bool) -> dict[str, list]:
        columns = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        if first and self.completion.echo:
            self._add(columns, index, self.prompts[number][0], None, None)
            logprobs = (*self.prompt_logprobs.get(number, ()), *logprobs)
        for entry in logprobs:
            top = {token_text(self.tokenizer, token): logprob for token, logprob in entry.top}
            top |= {token_text(self.tokenizer, entry.token): entry.logprob}
            self._add(columns, index, entry.token, entry.logprob, top)
        return columns

    def _add(self, columns: dict[str, list], index: int, token: int, logprob: float | None, top: dict | None) -> None:
        text = token_text(self.tokenizer, token)
        offset = self.offsets.get(index, 0)
        self.offsets[index] = offset + len(text)
        for name, value in zip(columns, (text, logprob, top, offset), strict=True):
            columns[name].append(value)

    def _chat_logprobs(self, logprobs: tuple[TokenLogprob, ...]) -> dict[str, list]:
        def entry(token: int, logprob: float) -> dict[str, Any]:
            return {"token": token_text(self.tokenizer, token), "logprob": logprob,
                    "bytes": list(self.tokenizer.token_bytes(token))}  # fmt: skip

        return {"content": [{**entry(one.token, one.logprob), "top_logprobs": [entry(*pair) for pair in one.top]}
                            for one in logprobs], "refusal": None}  # fmt: skip


def _reason(output: Output) -> str:
    return "length" if output.finish_reason == "length" else "stop"


def merge(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Merge the parts of one choice, in order."""
    merged = {**parts[-1], "text": "".join(part["text"] for part in parts)}
    parts_with_logprobs = [part["logprobs"] for part in parts if part["logprobs"] is not None]
    if parts_with_logprobs:
        first = parts_with_logprobs[0]
        merged["logprobs"] = {
            name: [value for part in parts_with_logprobs for value in part[name]] if isinstance(values, list) else None
            for name, values in first.items()
        }
    return merged


def as_message(choice: dict[str, Any], *, chunk: bool, first: bool = True) -> dict[str, Any]:
    """Convert an entry of `choices` from the completion format to the chat completion format."""
    text = choice.pop("text")
    message = {**({"role": "assistant"} if first else {}), "content": text}
    return {**choice, "delta" if chunk else "message": message}
