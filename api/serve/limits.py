"""Every cap on what a client controls, in one table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Caps; the prompt and the text together never exceed the model's block_size."""

    header_bytes: int = 16 << 10
    headers: int = 100  # lines
    body_bytes: int = 1 << 20
    json_depth: int = 8  # a request needs 4
    prompts: int = 64  # in one request
    prompt_tokens: int = 1 << 17
    max_tokens: int = 1 << 17
    n: int = 16
    choices: int = 128  # prompts x n
    stop: int = 16  # strings
    stop_chars: int = 256
    logprobs: int = 20
    bias: int = 1024  # ids
    allowed_texts: int = 256  # of choice-constrained decoding
    allowed_chars: int = 1024
    messages: int = 256
    queue: int = 512  # continuations running and waiting
    connections: int = 256
    header_s: float = 10.0  # until a request's head is complete
    body_s: float = 20.0
    write_s: float = 30.0  # until a client that does not read is given up
    keep_alive_s: int = 5
    drain_s: int = 30  # after SIGTERM


LIMITS = Limits()
