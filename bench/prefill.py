"""Prefill on a CPU versus plain torch and other engines: `peakgpt bench prefill`.

Every contender runs the same random weights in a process of its own, stores the keys and values of the prompt, and
computes logits at the last position only:

    work FLOPs = T (2 N + 4 L H D (T + 1) / 2) - (T - 1) 2 (C V + H D C + 2 C F)

The last block computes keys and values for the whole prompt, and everything after its attention for one position; a
gated MLP has 3 C F there, and of experts those of one token count. Windows limit the keys of a layer.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from peakgpt.bench.agreement import expect_close
from peakgpt.bench.case import Case, expect_cpu, joined
from peakgpt.bench.contenders.contender import REFERENCE, contenders_of
from peakgpt.bench.contenders.llama_cpp_model import weight_bits
from peakgpt.bench.contenders.models import expect_family, random_prompts, write_random_model
from peakgpt.bench.contenders.prompts import ALL_PREFILLS, FORMATS, PREFILL_CONTENDERS
from peakgpt.bench.contenders.time_contenders import time_contenders
from peakgpt.bench.contenders.worker_process import WorkerProcess, saving_first
from peakgpt.bench.interleave import OnFailure
from peakgpt.bench.model_choice import add_model_arguments, chosen_model
from peakgpt.bench.peak_meter import PeakMeter
from peakgpt.bench.schema import Result
from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.model.flops import forward_flops
from peakgpt.kernels.command_line import integer


@dataclass(frozen=True)
class PrefillCase(Case):
    """The prefill of one sequence. Each contender's logits are checked against those of eager in float32.

    Args:
        model: name of the model, for the name of the case.
        config: the model.
        tokens: prompt tokens.
        dtype: of the computation; "int8" means int8 weights, quantized by each engine's own method.
    """

    kind: ClassVar[str] = "prefill"
    model: str
    config: GPTConfig
    tokens: int
    dtype: str

    @property
    def name(self) -> str:
        return joined(self.kind, self.model, str(self.tokens), self.dtype)

    def all_contenders(self, device: torch.device) -> list[str]:
        return contenders_of(PREFILL_CONTENDERS, self.config, self.dtype)

    def _measure(self, device: torch.device, on_failure: OnFailure) -> list[Result]:
        config, tokens, dtype = self.config, self.tokens, getattr(torch, self.dtype)
        limit = dtype if dtype.is_floating_point else torch.bfloat16  # int8 must meet bfloat16's tolerance
        with tempfile.TemporaryDirectory() as files:
            folder = Path(files)
            write_random_model(folder, config)
            reference = self._reference(folder)
            measured = time_contenders(
                ((name, partial(self._start, name, folder)) for name in self.contenders(device)),
                lambda name, worker: (worker.step(), torch.load(_logits_file(folder, name)))[1],
                lambda name, logits: expect_close(f"prefill: {name}", [logits[name]], [reference], limit),
                rounds=self.rounds, warmup=0, budget_s=self.seconds, peaks=PeakMeter(device, [dtype]),
                on_failure=on_failure,
            )  # fmt: skip
            bits = {name: weight_bits(PREFILL_CONTENDERS[name], folder, self.dtype) for name in measured}
        return [
            Result.of(
                m.timing.noted(m.note, contender.version), bench="prefill", contender=name, backend=contender.backend,
                case={"tokens": tokens, "n_layer": config.n_layer, "n_embd": config.n_embd},
                device="cpu", dtype=self.dtype, flops=work_flops(config, tokens), flops_kind="work",
                memory_bytes=m.memory_bytes, base_bytes=m.base_bytes, weight_bits=bits[name],
            )
            for name, m in measured.items() for contender in [PREFILL_CONTENDERS[name]]
        ]  # fmt: skip

    def _reference(self, folder: Path) -> Tensor:
        """Return the logits in float32, from a process that ends before the contenders fill the memory."""
        replace(self, dtype="float32")._start(REFERENCE, folder).step_once()
        return torch.load(_logits_file(folder, REFERENCE))

    def _start(self, name: str, folder: Path) -> WorkerProcess:
        contender = ALL_PREFILLS[name]
        contender.expect_installed()
        request = {"make": f"{__name__}:prefill_step", "threads": torch.get_num_threads(), "folder": str(folder),
                   "config": dataclasses.asdict(self.config), "tokens": self.tokens, "dtype": self.dtype,
                   "contender": name, "logits": str(_logits_file(folder, name))}  # fmt: skip
        return WorkerProcess(name, request, contender.environment)


def _logits_file(folder: Path, name: str) -> Path:
    return folder / f"{name}.pt"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--tokens", type=integer(), default=512, help="prompt tokens (default 512)")
    parser.add_argument("--dtype", choices=FORMATS, action="append", help="weight format; repeatable; default: all")


def cases(args: argparse.Namespace, device: torch.device) -> list[Case]:
    expect_cpu("prefill", device)
    model, config = chosen_model(args)
    expect_family(config)
    return [PrefillCase(model, config, args.tokens, dtype, rounds=15) for dtype in args.dtype or FORMATS]


def work_flops(config: GPTConfig, tokens: int) -> float:
    """Return the work FLOPs of a prompt: half of attention (causal), and one position after the last attention."""
    c = config
    has_experts = c.has_experts(c.n_layer - 1)
    inner = c.expert_inner * c.experts_per_token if has_experts else c.n_inner
    matrices = 2 + (c.gated_experts if has_experts else c.gated_mlp)
    once = 2.0 * c.n_embd * (c.vocab_size + c.n_head * c.head_dim + matrices * inner)
    return tokens * forward_flops(c, tokens, causal=True) - (tokens - 1) * once


def prefill_step(request: Mapping[str, Any]) -> Callable[[], float]:
    """Return the step of a contender: `make` of a worker process.

    Args:
        request: contender, folder of `write_random_model`, config, tokens, dtype, logits (file for the logits of the
            first run).
    Returns:
        A function that runs the prompt and returns one logit.
    """
    config = GPTConfig(**request["config"])
    ids, build = random_prompts(config, 1, request["tokens"]), ALL_PREFILLS[request["contender"]].build
    prefill = build(Path(request["folder"]), config, ids, request["dtype"])
    return saving_first(prefill, request["logits"], lambda logits: float(logits[0, 0]))
