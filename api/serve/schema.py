"""The fields of a request: tables of their names and the check of each value.

OpenAI, "API reference", /v1/completions and /v1/chat/completions. Unknown fields are errors, never ignored. null
means that a field is absent, as in the server of OpenAI.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peakgpt.engine.inference.generation_config import GenerationConfig
from peakgpt.engine.inference.sampling_params import MIN_TOP_P, SamplingParams
from peakgpt.serve.chat_fields import CHAT_FIELDS
from peakgpt.serve.checks import (
    Check,
    Unsupported,
    bias,
    boolean,
    integer,
    number,
    prompts,
    stream_options,
    strings,
    temperature,
    text,
    unsupported,
)
from peakgpt.serve.errors import BadRequest
from peakgpt.serve.limits import Limits

COMPLETION_TOKENS = 16  # most new tokens of a completion that does not say it, as in OpenAI's server
_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 60

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
    **CHAT_FIELDS,
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

    def params(self, defaults: GenerationConfig, num_prompt: int, room: int) -> SamplingParams:
        """Return the sampling parameters of a prompt.

        Args:
            defaults: of the checkpoint; what the request says wins.
            num_prompt: tokens of the prompt.
            room: most new tokens that fit after it.
        Raises:
            InvalidParam: a value that the engine does not support, or the prompt is not shorter than the checkpoint's
                max_length.
        """
        f = self.fields
        logprobs = f.get("logprobs")
        if self.chat:
            logprobs = f.get("top_logprobs", 0) if logprobs else None
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
                 "frequency_penalty", "n", "seed", "choices")  # fmt: skip
        sampling = {**defaults.sampling(), **{name: f[name] for name in names if name in f}}
        sampling["logit_bias"] |= f.get("logit_bias", {})
        count = f.get("max_tokens", f.get("max_completion_tokens"))
        if count is None:
            limit = defaults.max_tokens(num_prompt)
            count = min(room, room if limit is None else limit, room if self.chat else COMPLETION_TOKENS)
        return SamplingParams(
            max_tokens=count, stop=f.get("stop", defaults.stop_strings), logprobs=logprobs,
            prompt_logprobs=logprobs if self.echo else None, **sampling,
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
    if "tool_choice" in fields and "tools" not in fields:
        raise BadRequest("tool_choice: got it without tools, expected both", param="tool_choice")
    if fields.get("continue_final_message") and fields.get("add_generation_prompt"):
        raise BadRequest("continue_final_message: got it with add_generation_prompt, expected one of them",
                         param="continue_final_message")  # fmt: skip
    if fields.get("stream") and fields.get("echo") and "logprobs" in fields and n > 1:
        raise BadRequest("stream: got it with echo, logprobs and n above 1, expected not all of them", param="stream")
    return CompletionRequest(fields, chat)
