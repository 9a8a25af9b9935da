"""The limits on everything that a client controls, in one table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of requests and connections. In addition, prompt plus new tokens must fit into block_size of the model."""

    header_bytes: int = 16 << 10
    headers: int = 100  # lines
    body_bytes: int = 1 << 20
    json_depth: int = 32  # the schema of a tool has 6, and 3 for each level of its arguments
    json_containers: int = 4096  # objects, and as many lists; a tool with 10 arguments has 14
    json_keys: int = 16384  # in all objects; a request with all biases and messages has about 1600
    prompts: int = 64  # in one request
    inputs: int = 256  # texts to embed in one request
    prompt_tokens: int = 1 << 17
    max_tokens: int = 1 << 17
    n: int = 16
    choices: int = 128  # prompts x n
    stop: int = 16  # strings
    stop_chars: int = 256
    logprobs: int = 20
    prompt_logprobs: int = 1 << 19  # that echo returns: prompt tokens x n x (1 + logprobs), of all prompts
    bias: int = 1024  # ids
    allowed_texts: int = 256  # choices of constrained decoding
    allowed_chars: int = 1024
    messages: int = 256
    tools: int = 128  # and calls in one message
    queue: int = 512  # running and waiting sequences
    connections: int = 256
    header_s: float = 10.0  # time for the header of a request
    body_s: float = 20.0
    write_s: float = 30.0  # time until a client that does not read is disconnected
    keep_alive_s: int = 5
    drain_s: int = 30  # time for running requests after SIGTERM


LIMITS = Limits()
