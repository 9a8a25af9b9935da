"""A contender of a benchmark, and the workload of the inference benchmarks."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from peakgpt.engine.model.config import GPTConfig

SEED = 0
# glibc keeps freed blocks and backs them with huge pages: eager's bf16 step is 29 % shorter (bench/results, 2026-11).
TUNED_MALLOC = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=40000000000:glibc.malloc.hugetlb=1"
TUNED_ENVIRONMENT = {"GLIBC_TUNABLES": TUNED_MALLOC}
WEIGHT_FORMATS = ("float32", "bfloat16", "int8", "int4")
# Bits per weight of the blocks, with the scales. int8: a 16-bit scale for 128 weights.
OUR_BITS = {"int8": 8.125, "int4": 4.25}
PEER_BITS = {"int8": 8.0}
OUR_BITS_BY_32 = {"int4": 4.5}

REFERENCE = "float32"  # name of the contender that the others are checked against

State = Mapping[str, Tensor]
Prefill = Callable[[], Tensor]  # -> (1, V) logits at the last position


@dataclass(frozen=True)
class Contender:
    """One implementation that a benchmark times.

    Args:
        build: makes the function or the trainer that is timed; each benchmark documents its arguments.
        environment: environment variables of its worker process.
        package: import name of the package that it needs.
        distribution: name to install the package by, if it differs from `package`.
        formats: weight formats to time, from WEIGHT_FORMATS.
        bits: bits per weight of the quantized formats, with the scales.
        runs: whether it has this model.
        files: weight format -> type of its .gguf file, which has the bits per weight if `bits` does not.
    """

    build: Callable[..., Any]
    environment: Mapping[str, str] = field(default_factory=dict)
    package: str = "torch"
    distribution: str = ""
    formats: tuple[str, ...] = ("float32", "bfloat16")
    bits: Mapping[str, float] = field(default_factory=dict)
    runs: Callable[[GPTConfig], bool] = lambda config: True
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def backend(self) -> str:
        """Value of `Result.backend` for this contender."""
        return "auto" if self.package == "peakgpt" else self.package

    @property
    def version(self) -> str:
        """Name and version of the package. Empty for peakgpt and torch, because `environment` has their versions."""
        name = self.distribution or self.package
        return "" if name in ("peakgpt", "torch") else f"{name} {metadata.version(name)}"

    def expect_installed(self) -> None:
        """
        Raises:
            ModuleNotFoundError: the package is missing; the message says how to install it.
        """
        if importlib.util.find_spec(self.package) is None:
            name = self.distribution or self.package
            raise ModuleNotFoundError(f"not measured, {name} is not installed: pip install {name}")


def contenders_of(contenders: Mapping[str, Contender], config: GPTConfig, weights: str) -> list[str]:
    """Return the names of the contenders that have a model and a weight format."""
    return [name for name, c in contenders.items() if weights in c.formats and c.runs(config)]


def contenders_on(contenders: Mapping[str, Contender], device: torch.device) -> list[str]:
    """Return the names of the contenders that can run on a device.

    On a GPU all contenders share one process, so contenders with environment variables are left out.
    """
    return [name for name, c in contenders.items() if device.type == "cpu" or not c.environment]


@dataclass(frozen=True)
class GreedyDecoder:
    """What a contender of `bench decode` can do with its prompts.

    Args:
        run: decodes greedily; returns the new tokens (streams, tokens) int64.
        logits: takes texts (streams, n) int64 that follow the prompts, with n up to the number of new tokens. Returns
            the logits of each of their tokens, (streams, n, V) float32, by the steps that `run` makes.
    """

    run: Callable[[], Tensor]
    logits: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Workload:
    """Requests of an inference benchmark.

    Args:
        streams: sequences decoded at once.
        prompt: prompt tokens per sequence.
        tokens: new tokens per sequence.
    """

    streams: int
    prompt: int
    tokens: int

    def __str__(self) -> str:
        """The part of a case's name: "8x32+64" is 8 streams with 32 prompt and 64 new tokens each."""
        return f"{self.streams}x{self.prompt}+{self.tokens}"
