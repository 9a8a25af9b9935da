"""OpenAI's answers made of the engine's outputs."""

from __future__ import annotations

import json
import time
import uuid
from typing import Any

from peakgpt.engine.data.tokenizer import Tokenizer
from peakgpt.engine.inference.engine import Output, TokenLogprob
from peakgpt.serve.schema import Asked


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token as text; bytes that are no text in a spelling of their own, so that no two look the same."""
    data = tokenizer.token_bytes(token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class Answer:
    """The frame that all parts of one answer share, and the counts of its usage."""

    def __init__(self, asked: Asked, model: str, tokenizer: Tokenizer, prompts: list[list[int]], texts: list[str]):
        self.asked, self.tokenizer, self.prompts, self.texts = asked, tokenizer, prompts, texts
        self.head = {"id": f"{'chatcmpl' if asked.chat else 'cmpl'}-{uuid.uuid4().hex}", "created": int(time.time()),
                     "model": model}  # fmt: skip
        self.completion_tokens, self.begin = 0, ""
        self.offsets: dict[int, int] = {}
        self.told_prompt: dict[int, tuple[TokenLogprob, ...]] = {}
        self.begun: set[int] = set()

    @property
    def usage(self) -> dict[str, int]:
        prompt = sum(map(len, self.prompts))
        return {"prompt_tokens": prompt, "completion_tokens": self.completion_tokens,
                "total_tokens": prompt + self.completion_tokens}  # fmt: skip

    def kind(self, *, chunk: bool) -> str:
        return ("chat.completion.chunk" if chunk else "chat.completion") if self.asked.chat else "text_completion"

    def event(self, choice: dict[str, Any]) -> bytes:
        """A streamed choice as a server-sent event: `sse` of its frame, whose beginning is made once."""
        self.begin = self.begin or json.dumps({**self.head, "object": self.kind(chunk=True)})[:-1]
        return f'data: {self.begin}, "choices": [{json.dumps(choice)}]}}\n\n'.encode()

    def frame(self, choices: list[dict], *, chunk: bool, usage: bool) -> dict[str, Any]:
        told = {"usage": self.usage} if usage else {}
        return {**self.head, "object": self.kind(chunk=chunk), "choices": choices, **told}

    def part(self, number: int, output: Output) -> dict[str, Any]:
        """What one output adds to a choice: index, text, logprobs, finish_reason."""
        index = number * self.asked.n + output.index
        self.completion_tokens += len(output.token_ids)
        if output.prompt_logprobs is not None:
            self.told_prompt[number] = output.prompt_logprobs
        first, text = index not in self.begun, output.text
        self.begun.add(index)
        logprobs = None
        if output.logprobs is not None:
            shown = output.logprobs
            # The id that ended the text is told of completions, as OpenAI does: lm-eval takes the last one as new.
            if self.asked.chat and isinstance(output.stop_reason, int):
                shown = shown[:-1]
            logprobs = self._chat_logprobs(shown) if self.asked.chat else self._logprobs(index, number, shown, first)
        if first and self.asked.echo:
            text = self.texts[number] + text
        reason = output.finish_reason and _reason(output)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, index: int, number: int, found: tuple[TokenLogprob, ...], first: bool) -> dict[str, list]:
        made = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        if first and self.asked.echo:
            self._add(made, index, self.prompts[number][0], None, None)
            found = (*self.told_prompt.get(number, ()), *found)
        for one in found:
            top = {token_text(self.tokenizer, token): logprob for token, logprob in one.top}
            self._add(made, index, one.token, one.logprob, top | {token_text(self.tokenizer, one.token): one.logprob})
        return made

    def _add(self, made: dict[str, list], index: int, token: int, logprob: float | None, top: dict | None) -> None:
        text = token_text(self.tokenizer, token)
        at = self.offsets.get(index, 0)
        self.offsets[index] = at + len(text)
        for name, value in zip(made, (text, logprob, top, at), strict=True):
            made[name].append(value)

    def _chat_logprobs(self, found: tuple[TokenLogprob, ...]) -> dict[str, list]:
        def entry(token: int, logprob: float) -> dict[str, Any]:
            return {"token": token_text(self.tokenizer, token), "logprob": logprob,
                    "bytes": list(self.tokenizer.token_bytes(token))}  # fmt: skip

        return {"content": [{**entry(one.token, one.logprob), "top_logprobs": [entry(*pair) for pair in one.top]}
                            for one in found], "refusal": None}  # fmt: skip


def _reason(output: Output) -> str:
    return "length" if output.finish_reason == "length" else "stop"


def merge(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """One choice of all its parts, in order."""
    whole = {**parts[-1], "text": "".join(part["text"] for part in parts)}
    told = [part["logprobs"] for part in parts if part["logprobs"] is not None]
    if told:
        whole["logprobs"] = {name: [value for one in told for value in one[name]] if isinstance(told[0][name], list)
                             else None for name in told[0]}  # fmt: skip
    return whole


def as_message(choice: dict[str, Any], *, chunk: bool, first: bool = True) -> dict[str, Any]:
    """A choice in the shape of a chat."""
    text = choice.pop("text")
    said = {**({"role": "assistant"} if first else {}), "content": text}
    return {**choice, "delta" if chunk else "message": said}
