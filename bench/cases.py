"""The cases of the suite, by kind. Plain tables: a new op of the catalogue is a case of "ops" without an entry here."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
from collections.abc import Sequence
from fnmatch import fnmatchcase
from types import ModuleType

import torch

from peakgpt.bench.case import Case

# Each key is a module of peakgpt.bench with a subclass of Case, add_arguments(parser) and cases(args, device).
KINDS = {
    "train": "a training step versus PyTorch",
    "decode": "greedy decoding with a KV cache versus PyTorch and other engines",
    "prefill": "prefill on a CPU versus PyTorch and other engines",
    "neighbours": "decoding and training on a CPU that other processes use too: the share of the quiet speed",
    "load": "from a model folder to the first token on a CPU versus transformers",
    "patch": "patched versus unpatched transformers models",
    "serve": "the server under many streams versus the engine alone",
    "gemm": "GPT-2 124M's linear layers with 16-, 8- and 4-bit weights on a CPU",
    "memory_bound": "memory-bound CPU kernels without dispatch, versus streams of the same reads and writes",
    "ops": "every op, forward and backward, versus PyTorch",
    "finetune": "an update of supervised fine-tuning on a CPU versus TRL",
    "packing": "a training step on packed documents with masked attention versus whole rows",
    "fp8": "training with fp8 GEMMs versus bfloat16: loss and time",
}
CPU_KINDS = ("prefill", "neighbours", "load", "serve", "gemm", "memory_bound", "finetune")
GPU_KINDS = ("fp8",)

# The README's rows in the order of `make bench`: seconds on 2 cores, and the contenders that it leaves out. A case ends
# after the round in which its seconds are over, and has at least MIN_ROUNDS rounds.
README: dict[str, tuple[float, tuple[str, ...]]] = {
    "train/gpt2/4x256/bfloat16": (190, ("compile",)),
    "train/gpt2/4x256/float32": (150, ("compile",)),
    "decode/gpt2/1x16+32/bfloat16": (45, ("peakgpt by ops", "transformers, compile")),
    "decode/gpt2/1x16+32/int8": (30, ("ctranslate2",)),
    "decode/gpt2/1x16+32/int4": (15, ("llama.cpp Q4_K_M",)),
    "decode/gpt2/8x16+32/bfloat16": (60, ("peakgpt by ops", "transformers, compile")),
    "decode/gpt2/8x16+32/int8": (35, ("ctranslate2",)),
    "decode/gpt2/8x16+32/int4": (20, ("llama.cpp Q4_K_M",)),
    "prefill/gpt2/512/bfloat16": (45, ("peakgpt, tuned malloc", "eager, tuned malloc", "compile, tuned malloc",
                                       "transformers, compile")),
    "prefill/gpt2/512/int8": (15, ()),
    "patch/gpt2/train/4x256/bfloat16": (150, ()),
}  # fmt: skip

# Further cases of the suite on a CPU, of models with about a billion weights: flags of their kind, and the contenders
# that are left out, because all together need more than 24 GiB, or because others are always faster.
_EAGER_OF_GPT_OSS = ("peakgpt by ops", "transformers", "transformers, compile")
LARGE: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "decode": (
        ("--model llama-3.2-1b --dtype bfloat16 --dtype int8 --dtype int4", ("peakgpt by ops",)),
        ("--model qwen3-0.6b --streams 1 --dtype bfloat16 --dtype int8 --dtype int4", ("peakgpt by ops",)),
        ("--model gpt-oss-20b --layers 4 --streams 1 --dtype bfloat16 --dtype int8 --dtype int4", _EAGER_OF_GPT_OSS),
    ),
    "prefill": (
        ("--model llama-3.2-1b --dtype bfloat16 --dtype int8", ()),
    ),
    "train": (
        ("--model llama-3.2-1b --layers 4 --vocab-size 32000 --batch 2 --tokens 512 --dtype bfloat16",
         ("eager", "compile")),
    ),
}  # fmt: skip


def module_of(kind: str) -> ModuleType:
    """Return the module of a kind of case."""
    return importlib.import_module(f"peakgpt.bench.{kind}")


def suite_cases(device: torch.device) -> list[Case]:
    """Return all cases of the suite on a device."""
    others = CPU_KINDS if device.type != "cpu" else GPU_KINDS
    return [case for kind in KINDS if kind not in others for case in _cases_of(kind, device)]


def readme_cases(device: torch.device) -> list[Case]:
    """Return the cases of README with its seconds and contenders, in its order."""
    by_name = {case.name: case for case in suite_cases(device)}
    return [_shortened(by_name[name], device) for name in README if name in by_name]


def _shortened(case: Case, device: torch.device) -> Case:
    seconds, left_out = README[case.name]
    return dataclasses.replace(_without(case, left_out, device), seconds=seconds)


def tags(case: Case) -> tuple[str, ...]:
    """Return the words by which pytest selects a case: its kind, and "readme" if the README shows it."""
    return (case.kind, "readme") if case.name in README else (case.kind,)


def select(cases: Sequence[Case], patterns: Sequence[str]) -> list[Case]:
    """Return the cases whose names match one of the patterns, such as "ops/*/float32".

    Raises:
        ValueError: a pattern matches no case.
    """
    for pattern in patterns:
        if not any(fnmatchcase(case.name, pattern) for case in cases):
            raise ValueError(f"--case: got {pattern!r}, which matches no case; --list prints their names")
    return [case for case in cases if any(fnmatchcase(case.name, pattern) for pattern in patterns)]


def _cases_of(kind: str, device: torch.device) -> list[Case]:
    """Return the default cases of a kind, then its LARGE ones."""
    cases = _parsed(kind, "", device)
    for flags, left_out in LARGE.get(kind, ()) if device.type == "cpu" else ():
        cases += [_without(case, left_out, device) for case in _parsed(kind, flags, device)]
    return cases


def _without(case: Case, left_out: Sequence[str], device: torch.device) -> Case:
    names = case.all_contenders(device)
    return dataclasses.replace(case, only=tuple(name for name in names if name not in left_out))


def _parsed(kind: str, flags: str, device: torch.device) -> list[Case]:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    module = module_of(kind)
    module.add_arguments(parser)
    return module.cases(parser.parse_args(flags.split()), device)
