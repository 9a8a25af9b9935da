"""The fields of a request: tables of their names and the check of each value.

OpenAI, "API reference", /v1/completions and /v1/chat/completions. Unknown fields are errors, never ignored. null
means that a field is absent, as in the server of OpenAI. More than 300 lines: it is one table of fields and checks.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peakgpt.engine.inference.sampling_params import MIN_TEMPERATURE, MIN_TOP_P, SamplingParams
from peakgpt.serve.errors import BadRequest
from peakgpt.serve.limits import Limits

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 60


def parse(body: bytes, limits: Limits) -> dict[str, Any]:
    """Read a JSON object without NaN, infinities, repeated keys, lone surrogates or deep nesting.

    Raises:
        BadRequest: the body is something else.
    """
    try:
        text = body.decode()
        _check_nesting(text, limits)
        data = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique)
        if _SURROGATE.search(text):
            json.dumps(data, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:  # UnicodeError is a ValueError
        reason = "a lone surrogate" if isinstance(error, UnicodeEncodeError) else str(error)
        raise BadRequest(f"body: got {reason}, expected JSON in UTF-8", code="invalid_json") from None
    if not isinstance(data, dict):
        raise BadRequest(f"body: got {type(data).__name__}, expected a JSON object", code="invalid_json")
    return data


def _check_nesting(text: str, limits: Limits) -> None:
    """Count the brackets and keys outside of strings. json.loads needs half a second for a megabyte of them."""
    plain = "".join(text.replace("\\\\", "").replace('\\"', "").split('"')[::2])
    if (keys := plain.count(":")) > limits.json_keys:
        raise ValueError(f"{keys} keys, expected up to {limits.json_keys}")
    if max(map(plain.count, "[]{}")) > limits.json_containers:
        raise ValueError(f"more than {limits.json_containers} objects and lists or {limits.json_depth} levels")
    depth = 0
    for bracket in re.findall(r"[\[\]{}]", plain):
        depth += 1 if bracket in "[{" else -1
        if depth > limits.json_depth:
            raise ValueError(f"more than {limits.json_depth} levels")


def _refuse_constant(name: str) -> None:
    raise ValueError(name)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(unique := dict(pairs)) < len(pairs):
        raise ValueError("a key twice in one object")
    return unique


# ---- checks: (value, limits) -> parsed value, or ValueError with the expected value

Check = Callable[[Any, Limits], Any]


def number(low: float, high: float) -> Check:
    def check(value, limits):
        good = type(value) in (int, float) and low <= value <= high
        return float(value) if good else _expected(f"a number from {low} to {high}")

    return check


def temperature(value: Any, limits: Limits) -> float:
    """Check a temperature. 0 is greedy; much less than 0.001 overflows the logits."""
    parsed = number(0, 2)(value, limits)
    expected = f"0, or a number from {MIN_TEMPERATURE} to 2"
    return parsed if parsed == 0 or parsed >= MIN_TEMPERATURE else _expected(expected)


def integer(low: int, high: int | str) -> Check:
    def check(value, limits):
        most = getattr(limits, high) if isinstance(high, str) else high
        return value if type(value) is int and low <= value <= most else _expected(f"an integer from {low} to {most}")

    return check


def boolean(value: Any, limits: Limits) -> bool:
    return value if type(value) is bool else _expected("true or false")


def text(value: Any, limits: Limits) -> str:
    return value if isinstance(value, str) else _expected("a string")


def strings(count: str, chars: str) -> Check:
    def check(value, limits):
        values = [value] if isinstance(value, str) else value
        most, longest = getattr(limits, count), getattr(limits, chars)
        good = isinstance(values, list) and len(values) <= most
        if not good or not all(isinstance(s, str) and 0 < len(s) <= longest for s in values):
            _expected(f"up to {most} strings of 1 to {longest} characters")
        return tuple(values)

    return check


def bias(value: Any, limits: Limits) -> dict[int, float]:
    if not isinstance(value, dict) or len(value) > limits.bias:
        _expected(f"an object of up to {limits.bias} token ids")
    if not all(re.fullmatch(r"[0-9]{1,9}", key) for key in value):
        _expected("token ids as keys")
    biases = {int(key): number(-100, 100)(bias, limits) for key, bias in value.items()}
    return biases if len(biases) == len(value) else _expected("each token id once")


def prompts(value: Any, limits: Limits) -> list[str | list[int]]:
    """Check one or many prompts, each a string or a list of ids."""
    many = value if isinstance(value, list) and value and not isinstance(value[0], int) else [value]
    if not 0 < len(many) <= limits.prompts:
        _expected(f"up to {limits.prompts} prompts")
    for prompt in many:
        in_limit = isinstance(prompt, list) and 0 < len(prompt) <= limits.prompt_tokens
        if not isinstance(prompt, str) and not (in_limit and all(type(i) is int for i in prompt)):
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


class Unsupported(ValueError):
    """OpenAI knows the field, this server does not support it."""


def unsupported(reason: str) -> Check:
    def check(value, limits):
        raise Unsupported(f"nothing: {reason}")

    return check


def _expected(description: str) -> Any:
    raise ValueError(description)


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
    "stop": strings("stop", "stop_chars"),
    "seed": integer(-(1 << 63), (1 << 63) - 1),
    "logit_bias": bias,
    "choices": strings("allowed_texts", "allowed_chars"),
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
    "suffix": unsupported("these models do not insert text; put all of it into the prompt"),
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
    """Check all fields and return their parsed values.

    Raises:
        BadRequest: an unknown field, or a value out of its range.
    """
    parsed = {}
    for name, value in data.items():
        if name not in fields:
            raise BadRequest(f"{name[:64]}: got an unknown field, expected one of {', '.join(fields)}",
                             param=name[:64], code="unknown_parameter")  # fmt: skip
        if value is None:
            continue
        try:
            parsed[name] = fields[name](value, limits)
        except ValueError as error:
            code = "unsupported_parameter" if isinstance(error, Unsupported) else "invalid_value"
            raise BadRequest(f"{name}: got {_repr.repr(value)}, expected {error}", param=name, code=code) from None
    return parsed


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

    @property
    def continuations(self) -> int:
        return self.n * len(self.fields.get("prompt", [0]))

    def params(self, stop_token_ids: Sequence[int], max_new_tokens: int) -> SamplingParams:
        """Return the sampling parameters of a prompt. At most max_new_tokens fit after it.

        Raises:
            InvalidParam: a value that the engine does not support.
        """
        f = self.fields
        logprobs = f.get("logprobs")
        if self.chat:
            logprobs = f.get("top_logprobs", 0) if logprobs else None
        same = ("top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "n", "seed",
                "logit_bias", "choices")  # fmt: skip
        default = max_new_tokens if self.chat else min(16, max_new_tokens)
        count = f.get("max_tokens", f.get("max_completion_tokens", default))
        return SamplingParams(
            max_tokens=count, temperature=f.get("temperature", 1.0), stop_token_ids=tuple(stop_token_ids),
            stop=f.get("stop", ()), logprobs=logprobs,
            prompt_logprobs=logprobs if self.echo else None,
            **{name: f[name] for name in same if name in f},
        )  # fmt: skip


def missing(name: str) -> BadRequest:
    return BadRequest(f"{name}: got none, expected one", param=name, code="missing_required_parameter")


def check_request(data: Mapping[str, Any], *, chat: bool, limits: Limits) -> CompletionRequest:
    """Check the fields of a completion request, one by one and in combination.

    Raises:
        BadRequest: a field is unknown, missing or out of range, or contradicts another field.
    """
    fields = check(data, CHAT if chat else COMPLETION, limits)
    if (name := "messages" if chat else "prompt") not in fields:
        raise missing(name)
    n = fields.get("n", 1)
    if n * len(fields.get("prompt", [0])) > limits.choices:
        raise BadRequest(f"n: got {n} for each prompt, expected up to {limits.choices} choices per request", param="n")
    if fields.get("best_of", n) != n:
        raise BadRequest(f"best_of: got {fields['best_of']}, expected n, which is {n}", param="best_of")
    if "top_logprobs" in fields and not fields.get("logprobs"):
        raise BadRequest("top_logprobs: got it without logprobs, expected logprobs true", param="top_logprobs")
    if "stream_options" in fields and not fields.get("stream"):
        raise BadRequest("stream_options: got it without stream, expected stream true", param="stream_options")
    if "max_tokens" in fields and "max_completion_tokens" in fields:
        raise BadRequest("max_tokens: got max_completion_tokens too, expected one of them", param="max_tokens")
    if fields.get("stream") and fields.get("echo") and "logprobs" in fields and n > 1:
        raise BadRequest("stream: got it with echo, logprobs and n above 1, expected not all of them", param="stream")
    return CompletionRequest(fields, chat)
