"""The fields of a request: a table of names with the check of each value. Other fields are rejected.

OpenAI, "API reference", /v1/completions and /v1/chat/completions. Fields that this server does not know
are errors, never ignored. null means that a field is absent, as in the server of OpenAI.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from peakgpt.engine.inference.sampling_params import MIN_TEMPERATURE, MIN_TOP_P, SamplingParams
from peakgpt.serve.limits import Limits

_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*(?:"|$)|([\[{])|[\]}]', re.DOTALL)  # linear: an open string ends the text


class BadRequest(Exception):
    """An error response; `body` has the format of OpenAI."""

    def __init__(self, message: str, *, param: str | None = None, status: int = 400, code: str | None = None):
        super().__init__(message)
        self.status = status
        kind = "server_error" if status >= 500 else "invalid_request_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def parse(body: bytes, limits: Limits) -> dict[str, Any]:
    """Read a JSON object without NaN, infinities, repeated keys, lone surrogates or deep nesting.

    Raises:
        BadRequest: anything else.
    """
    try:
        text = body.decode()
        depth = 0
        for match in _BRACKETS.finditer(text):
            depth += 1 if match[1] else -1 if match[0] in "]}" else 0
            if depth > limits.json_depth:
                raise ValueError(f"more than {limits.json_depth} levels")
        data = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique)
        json.dumps(data, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:  # UnicodeError is a ValueError
        said = "a lone surrogate" if isinstance(error, UnicodeEncodeError) else str(error)
        raise BadRequest(f"body: got {said}, expected JSON in UTF-8") from None
    if not isinstance(data, dict):
        raise BadRequest(f"body: got {type(data).__name__}, expected a JSON object")
    return data


def _refuse_constant(name: str) -> None:
    raise ValueError(name)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a key twice in one object")
    return found


# ---- checks: (value, limits) -> parsed value, or ValueError with the expected value

Check = Callable[[Any, Limits], Any]


def number(low: float, high: float) -> Check:
    def check(value, limits):
        good = type(value) in (int, float) and low <= value <= high
        return float(value) if good else _expected(f"a number from {low} to {high}")

    return check


def temperature(value: Any, limits: Limits) -> float:
    """Check a temperature. 0 is greedy; much less than 0.001 overflows the logits."""
    found = number(0, 2)(value, limits)
    expected = f"0, or a number from {MIN_TEMPERATURE} to 2"
    return found if found == 0 or found >= MIN_TEMPERATURE else _expected(expected)


def integer(low: int, high: int | str) -> Check:
    def check(value, limits):
        most = getattr(limits, high) if isinstance(high, str) else high
        return value if type(value) is int and low <= value <= most else _expected(f"an integer from {low} to {most}")

    return check


def boolean(value: Any, limits: Limits) -> bool:
    return value if type(value) is bool else _expected("true or false")


def text(value: Any, limits: Limits) -> str:
    return value if isinstance(value, str) else _expected("a string")


def texts(count: str, chars: str) -> Check:
    def check(value, limits):
        found = [value] if isinstance(value, str) else value
        most, long = getattr(limits, count), getattr(limits, chars)
        good = isinstance(found, list) and len(found) <= most
        if not good or not all(isinstance(s, str) and 0 < len(s) <= long for s in found):
            _expected(f"up to {most} strings of 1 to {long} characters")
        return tuple(found)

    return check


def bias(value: Any, limits: Limits) -> dict[int, float]:
    if not isinstance(value, dict) or len(value) > limits.bias:
        _expected(f"an object of up to {limits.bias} token ids")
    if not all(re.fullmatch(r"[0-9]{1,9}", key) for key in value):
        _expected("token ids as keys")
    found = {int(key): number(-100, 100)(number_, limits) for key, number_ in value.items()}
    return found if len(found) == len(value) else _expected("each token id once")


def prompts(value: Any, limits: Limits) -> list[str | list[int]]:
    """Check one or many prompts, each a string or a list of ids."""
    many = value if isinstance(value, list) and value and not isinstance(value[0], int) else [value]
    if not 0 < len(many) <= limits.prompts:
        _expected(f"up to {limits.prompts} prompts")
    for one in many:
        ids = isinstance(one, list) and 0 < len(one) <= limits.prompt_tokens and all(type(i) is int for i in one)
        if not ids and not isinstance(one, str):
            _expected(f"strings, or lists of 1 to {limits.prompt_tokens} token ids")
    return many


def messages(value: Any, limits: Limits) -> list[dict[str, str]]:
    if not isinstance(value, list) or not 0 < len(value) <= limits.messages:
        _expected(f"1 to {limits.messages} messages")
    for message in value:
        good = isinstance(message, dict) and {"role", "content"} == message.keys()
        if not good or not all(isinstance(part, str) for part in message.values()):
            _expected("objects of role and content, both strings")
    return value


def stream_options(value: Any, limits: Limits) -> bool:
    good = isinstance(value, dict) and value.keys() <= {"include_usage"}
    return boolean(value.get("include_usage", False), limits) if good else _expected("an object of include_usage")


def refused(why: str) -> Check:
    def check(value, limits):
        _expected(f"nothing: {why}")

    return check


def _expected(what: str) -> Any:
    raise ValueError(what)


COMMON: dict[str, Check] = {
    "model": text,
    "max_tokens": integer(0, "max_tokens"),
    "temperature": temperature,
    "top_p": number(MIN_TOP_P, 1),
    "top_k": integer(1, 1 << 31),
    "min_p": number(0, 1),
    "repetition_penalty": number(0.01, 10),
    "presence_penalty": number(-2, 2),
    "frequency_penalty": number(-2, 2),
    "n": integer(1, "n"),
    "stop": texts("stop", "stop_chars"),
    "seed": integer(-(1 << 63), (1 << 63) - 1),
    "logit_bias": bias,
    "choices": texts("allowed_texts", "allowed_chars"),
    "stream": boolean,
    "stream_options": stream_options,
    "user": text,  # identifies the end user; has no effect, as in OpenAI
}
COMPLETION: dict[str, Check] = {
    **COMMON,
    "prompt": prompts,
    "echo": boolean,
    "logprobs": integer(0, "logprobs"),
    "best_of": integer(1, "n"),
    "suffix": refused("these models do not insert text; put all of it into the prompt"),
}
CHAT: dict[str, Check] = {
    **COMMON,
    "messages": messages,
    "logprobs": boolean,
    "top_logprobs": integer(0, "logprobs"),
    "max_completion_tokens": integer(0, "max_tokens"),
}
TOKENIZE: dict[str, Check] = {"model": text, "prompt": text}
DETOKENIZE: dict[str, Check] = {"model": text, "tokens": prompts}


def check(data: Mapping[str, Any], fields: Mapping[str, Check], limits: Limits) -> dict[str, Any]:
    """Check all fields.

    Raises:
        BadRequest: an unknown field, or a value out of its range.
    """
    found = {}
    for name, value in data.items():
        if name not in fields:
            raise BadRequest(f"{name[:64]}: got an unknown field, expected one of {', '.join(fields)}",
                             param=name[:64], code="unknown_parameter")  # fmt: skip
        if value is None:
            continue
        try:
            found[name] = fields[name](value, limits)
        except ValueError as error:
            raise BadRequest(f"{name}: got {value!r:.80}, expected {error}", param=name) from None
    return found


@dataclass(frozen=True)
class CompletionRequest:
    """A checked completion request."""

    fields: dict[str, Any]
    chat: bool

    @property
    def stream(self) -> bool:
        return self.fields.get("stream", False)

    @property
    def include_usage(self) -> bool:
        return self.fields.get("stream_options", False)

    @property
    def echo(self) -> bool:
        return self.fields.get("echo", False)

    @property
    def n(self) -> int:
        return self.fields.get("n", 1)

    def params(self, end_id: int, room: int) -> SamplingParams:
        """How to continue a prompt that leaves room for so many tokens."""
        f = self.fields
        logprobs = f.get("logprobs")
        if self.chat:
            logprobs = f.get("top_logprobs", 0) if logprobs else None
        same = ("top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "n", "seed",
                "logit_bias", "choices")  # fmt: skip
        count = f.get("max_tokens", f.get("max_completion_tokens", room if self.chat else min(16, room)))
        return SamplingParams(
            max_tokens=count, temperature=f.get("temperature", 1.0), stop_token_ids=(end_id,),
            stop=f.get("stop", ()), logprobs=logprobs,
            prompt_logprobs=logprobs if self.echo else None,
            **{name: f[name] for name in same if name in f},
        )  # fmt: skip


def check_request(data: Mapping[str, Any], *, chat: bool, limits: Limits) -> CompletionRequest:
    """Check a request for text, and what its fields say together.

    Raises:
        BadRequest: see the message.
    """
    found = check(data, CHAT if chat else COMPLETION, limits)
    if (name := "messages" if chat else "prompt") not in found:
        raise BadRequest(f"{name}: got none, expected one", param=name)
    n = found.get("n", 1)
    if n * len(found.get("prompt", [0])) > limits.choices:
        raise BadRequest(f"n: got {n} for each prompt, expected up to {limits.choices} choices in all", param="n")
    if found.get("best_of", n) != n:
        raise BadRequest(f"best_of: got {found['best_of']}, expected n, which is {n}", param="best_of")
    if "top_logprobs" in found and not found.get("logprobs"):
        raise BadRequest("top_logprobs: got it without logprobs, expected logprobs true", param="top_logprobs")
    if "stream_options" in found and not found.get("stream"):
        raise BadRequest("stream_options: got them without stream, expected stream true", param="stream_options")
    if "max_tokens" in found and "max_completion_tokens" in found:
        raise BadRequest("max_tokens: got max_completion_tokens too, expected one of them", param="max_tokens")
    if found.get("stream") and found.get("echo") and "logprobs" in found and n > 1:
        raise BadRequest("stream: got it with echo, logprobs and n above 1, expected not all of them", param="stream")
    return CompletionRequest(found, chat)
