"""transformers' models patched by peakgpt versus the unpatched models: `peakgpt bench patch`.

Random weights of the published sizes. Work is a training step in train() with the dropout of each config, clipping and
AdamW, or greedy generation. Each contender has a process of its own, and is timed only if its loss is the reference's.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peakgpt.bench.case import Case, joined
from peakgpt.bench.contenders.contender import SEED, TUNED_ENVIRONMENT, Contender, contenders_on
from peakgpt.bench.contenders.time_contenders import time_contenders
from peakgpt.bench.contenders.worker_process import WorkerProcess
from peakgpt.bench.interleave import OnFailure
from peakgpt.bench.schema import Result
from peakgpt.kernels.command_line import integer

PROMPT, NEW = 32, 64  # prompt tokens and new tokens of greedy generation
# LABELED is the share of labeled positions in a masked language model (Devlin et al. 2018, arXiv:1810.04805)
LABELED, IGNORED = 0.15, -100
DTYPES = ("bfloat16", "float32")
EVAL_LOSS_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-3}  # relative, of the loss in eval()


@dataclass(frozen=True)
class Model:
    """A model of transformers.

    Args:
        config: name and arguments of its config class.
        model: name of its model class.
        masked: whether it is a masked language model; otherwise it predicts the next token.
    """

    config: tuple[str, dict[str, Any]]
    model: str
    masked: bool = False


MODELS = {
    "gpt2": Model(("GPT2Config", {}), "GPT2LMHeadModel"),
    "bert-base": Model(("BertConfig", {}), "BertForMaskedLM", masked=True),
    "pythia-160m": Model(
        ("GPTNeoXConfig", {
            "vocab_size": 50304, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
            "num_attention_heads": 12, "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000, "partial_rotary_factor": 0.25},
        }),
        "GPTNeoXForCausalLM",
    ),
}  # fmt: skip


def _unchanged(model: nn.Module) -> None:
    """Leave the model as transformers makes it."""


def _patched(model: nn.Module) -> None:
    from peakgpt.dropin.patching import patch

    patch(model)


# build(model) changes the model in place
PATCH_CONTENDERS = {
    "peakgpt": Contender(_patched, package="peakgpt"),
    "transformers": Contender(_unchanged),
    "transformers, tuned malloc": Contender(_unchanged, TUNED_ENVIRONMENT),
}


@dataclass(frozen=True)
class PatchCase(Case):
    """One kind of work on one model.

    Args:
        model: key of MODELS.
        work: key of WORK.
        batch, tokens: sequences and their tokens; in generation prompt and new tokens together.
        dtype: "float32" or "bfloat16". bfloat16 means autocast of float32 weights in training, and bfloat16 weights in
            generation.
    """

    kind: ClassVar[str] = "patch"
    model: str
    work: str
    batch: int
    tokens: int
    dtype: str

    @property
    def name(self) -> str:
        return joined(self.kind, self.model, self.work, f"{self.batch}x{self.tokens}", self.dtype)

    def all_contenders(self, device: torch.device) -> list[str]:
        return contenders_on(PATCH_CONTENDERS, device)

    def _measure(self, device: torch.device, on_failure: OnFailure) -> list[Result]:
        case = {"model": self.model, "work": self.work, "batch": self.batch, "tokens": self.tokens}
        request = {"make": f"{__name__}:work", "threads": torch.get_num_threads(), "dtype": self.dtype,
                   "device": str(device), **case}  # fmt: skip
        names = self.contenders(device)
        measured = time_contenders(
            ((n, partial(WorkerProcess, n, {**request, "contender": n}, PATCH_CONTENDERS[n].environment))
             for n in names),
            lambda name, worker: worker.step(), lambda name, losses: _expect_same_loss(name, losses, self.dtype),
            rounds=self.rounds, warmup=1, budget_s=self.seconds, on_failure=on_failure,
        )  # fmt: skip
        note = f"transformers {metadata.version('transformers')}"
        return [
            Result.of(
                m.timing.noted(m.note, note), bench="patch", case=case, contender=n,
                backend=PATCH_CONTENDERS[n].backend, device=str(device), dtype=self.dtype,
                memory_bytes=m.memory_bytes, base_bytes=m.base_bytes,
            )
            for n, m in measured.items()
        ]  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=tuple(MODELS), action="append", help="repeatable; default all")
    parser.add_argument("--work", choices=tuple(WORK), action="append", help="repeatable; default all")
    parser.add_argument("--batch", type=integer(), default=4)
    parser.add_argument("--tokens", type=integer(), default=256, help="context length (default 256)")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="repeatable; default both")


def cases(args: argparse.Namespace, device: torch.device) -> list[Case]:
    shapes = {"train": (args.batch, args.tokens), "generate": (1, PROMPT + NEW)}
    return [
        PatchCase(model, work, *shapes[work], dtype)
        for model in args.model or MODELS
        for work in args.work or WORK
        if work != "generate" or model == "gpt2"
        for dtype in args.dtype or DTYPES
    ]


def _expect_same_loss(name: str, losses: Mapping[str, float], dtype: str) -> None:
    """
    Raises:
        ValueError: the loss in eval() differs from transformers', or from the first contender's if that does not run.
    """
    loss, reference = losses[name], losses.get("transformers", next(iter(losses.values())))
    if not abs(loss - reference) <= EVAL_LOSS_TOLERANCE[dtype] * abs(reference):
        raise ValueError(f"{name}: loss {loss:.5f}, expected {reference:.5f} within {EVAL_LOSS_TOLERANCE[dtype]:.2%}")


# ---- in the worker process


def work(request: Mapping[str, Any]) -> Callable[[], float]:
    """Return the step of a contender: `make` of a worker process.

    Args:
        request: contender, model, work, batch, tokens, dtype, device.
    Returns:
        A function that does the work once and returns a number. Its first call returns the loss in eval().
    """
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(SEED)
    description, device = MODELS[request["model"]], torch.device(request["device"])
    kind, fields = description.config
    model = getattr(transformers, description.model)(getattr(transformers, kind)(**fields)).to(device)
    ids = torch.randint(5, model.config.vocab_size, (request["batch"], request["tokens"]))
    labels = torch.where(torch.rand(ids.shape) < LABELED, ids, IGNORED) if description.masked else ids
    PATCH_CONTENDERS[request["contender"]].build(model)
    make = WORK[request["work"]]
    return _loss_first(make, model, ids.to(device), labels.to(device), getattr(torch, request["dtype"]))


def _loss_first(make, model: nn.Module, ids: Tensor, labels: Tensor, dtype: torch.dtype) -> Callable[[], float]:
    steps = []

    def step() -> float:
        if steps:
            return steps[0]()
        with torch.no_grad(), _autocast(ids.device, dtype):
            loss = float(model.eval()(ids, labels=labels).loss)
        steps.append(make(model, ids, labels, dtype))
        return loss

    return step


def _autocast(device: torch.device, dtype: torch.dtype):
    return torch.autocast(device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext()


def _train(model: nn.Module, ids: Tensor, labels: Tensor, dtype: torch.dtype) -> Callable[[], float]:
    """Return a training step as in the Trainer of transformers: forward, backward, clipping, AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    model.train()

    def step() -> float:
        with _autocast(ids.device, dtype):
            loss = model(ids, labels=labels).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def _generate(model: nn.Module, ids: Tensor, labels: Tensor, dtype: torch.dtype) -> Callable[[], float]:
    """Return a function that generates NEW tokens greedily after a prompt of PROMPT tokens."""
    model.to(dtype)
    prompt = ids[:, :PROMPT]

    def step() -> float:
        tokens = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False,
            pad_token_id=0,
        )  # fmt: skip
        return float(tokens[:, PROMPT:].sum())

    return step


WORK = {"train": _train, "generate": _generate}
