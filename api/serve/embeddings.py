"""Requests to /v1/embeddings: their fields, and the response. OpenAI, "API reference", /v1/embeddings.

A vector is a list of numbers, or base64 of little-endian float32, which the client of OpenAI asks for.
"""

from __future__ import annotations

import base64
import dataclasses
import json
from typing import Any

from torch import Tensor

from peakgpt.engine.inference.embedding import POOLINGS
from peakgpt.serve.answers import encode
from peakgpt.serve.checks import Check, boolean, prompts, text, unsupported
from peakgpt.serve.limits import Limits


def inputs(value: Any, limits: Limits) -> list[str | list[int]]:
    """Check one or many texts, each a string or a list of ids."""
    return prompts(value, dataclasses.replace(limits, prompts=limits.inputs))


def one_of(*values: str) -> Check:
    def check(value, limits):
        if value not in values:
            raise ValueError(f"one of {', '.join(values)}")
        return value

    return check


EMBEDDING: dict[str, Check] = {
    "model": text,
    "input": inputs,
    "encoding_format": one_of("float", "base64"),
    "pooling": one_of(*POOLINGS),
    "normalize": boolean,
    "dimensions": unsupported("the vectors of this model have one width"),
    "user": text,
}


class EmbeddingAnswer:
    """The vectors of one request."""

    def __init__(self, model: str, prompts: list[list[int]], encoding: str):
        """
        Args:
            model: its name.
            prompts: token ids of the texts.
            encoding: "float" or "base64".
        """
        self.model, self.encoding, self.prompt_tokens = model, encoding, sum(map(len, prompts))
        self.vectors: list[Tensor | None] = [None] * len(prompts)

    def whole(self) -> bytes:
        """Return the body of the response."""
        convert = _as_base64 if self.encoding == "base64" else Tensor.tolist
        data = [{"object": "embedding", "index": index, "embedding": convert(vector)}
                for index, vector in enumerate(self.vectors)]  # fmt: skip
        usage = {"prompt_tokens": self.prompt_tokens, "total_tokens": self.prompt_tokens}
        end = json.dumps({"object": "list", "model": self.model, "usage": usage})[:-1]
        return f'{end}, "data": [{", ".join(map(encode, data))}]}}'.encode()


def _as_base64(vector: Tensor) -> str:
    return base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode()
