"""transformers' models patched by peakgpt beside the same models as they are: `peakgpt bench patch`.

Random weights of the published sizes, train() with the dropout of each config, AdamW and clipping included; or greedy
text. Each contender has a process of its own, and must have the loss of the others before anything is timed.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

from peakgpt.bench.contenders import SEED, TUNED_MALLOC
from peakgpt.bench.findings import Failure, Findings
from peakgpt.bench.ops import OnFailure, raise_it
from peakgpt.bench.steppers import measure
from peakgpt.bench.worker import Worker
from peakgpt.kernels.hardware.clock import Result

PROMPT, NEW = 32, 64  # tokens of a greedy text
LABELLED, IGNORED = 0.15, -100  # of a masked language model's positions (Devlin et al. 2018, arXiv:1810.04805)
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-3}  # relative, of the loss in eval()


@dataclass(frozen=True)
class Model:
    """Args:
    config: class and arguments in transformers.
    model: class there.
    masked: whether it learns masked tokens, instead of the next ones.
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


@dataclass(frozen=True)
class Contender:
    """Whether it is patched, and the environment that its process starts with."""

    patched: bool
    environment: dict[str, str] = field(default_factory=dict)


CONTENDERS = {
    "peakgpt": Contender(True),
    "transformers": Contender(False),
    "transformers, tuned malloc": Contender(False, {"GLIBC_TUNABLES": TUNED_MALLOC}),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=tuple(MODELS), action="append", help="repeatable; default all")
    parser.add_argument("--work", choices=tuple(WORK), action="append", help="repeatable; default all")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256, help="context length (default 256)")
    parser.add_argument("--dtype", choices=tuple(TOLERANCE), action="append", help="repeatable; default both")
    parser.add_argument("--contenders", nargs="+", choices=tuple(CONTENDERS), help="default: all that the device has")
    parser.add_argument("--rounds", type=int, default=9)


def run(args: argparse.Namespace, device: torch.device) -> Findings:
    found = Findings()
    names = args.contenders or [n for n, c in CONTENDERS.items() if device.type == "cpu" or not c.environment]
    for model in args.model or MODELS:
        for work in args.work or WORK:
            if work == "generate" and model != "gpt2":
                continue
            for dtype in args.dtype or TOLERANCE:
                case = {"model": model, "work": work, "batch": args.batch, "tokens": args.tokens}
                if work == "generate":
                    case |= {"batch": 1, "tokens": PROMPT + NEW}
                tell = lambda name, error: found.add(Failure.of(error, name))  # noqa: E731
                found.results += compare(case, dtype, device, names, rounds=args.rounds, on_failure=tell)
    return found


def compare(
    case: dict[str, Any], dtype: str, device: torch.device, names: Sequence[str], *, rounds: int = 9,
    on_failure: OnFailure = raise_it,
) -> list[Result]:  # fmt: skip
    """Time one kind of work on one model.

    Args:
        case: model, work, batch, tokens.
        dtype: "float32", or "bfloat16": autocast from float32 weights to train, weights of that dtype for text.
        device: where.
        names: of CONTENDERS.
        rounds: see clock.interleave.
        on_failure: told of a contender that raises or has another loss than transformers; the others are timed.
    Returns:
        A result a contender.
    """
    request = {"make": f"{__name__}:work", "threads": torch.get_num_threads(), "dtype": dtype, "device": str(device)}
    measured = measure(
        ((n, partial(Worker, n, {**request, **case, "contender": n}, CONTENDERS[n].environment)) for n in names),
        lambda name, worker: worker.step(), lambda name, losses: _computes_alike(name, losses, dtype),
        rounds=rounds, warmup=2, on_failure=on_failure,
    )  # fmt: skip
    note = f"transformers {metadata.version('transformers')}"
    return [
        Result.of(
            found.timing.noted(found.note, note), bench="patch", case=case, contender=n,
            backend="auto" if CONTENDERS[n].patched else "torch", device=str(device), dtype=dtype,
            memory_bytes=found.memory_bytes, base_bytes=found.base_bytes,
        )
        for n, found in measured.items()
    ]  # fmt: skip


def _computes_alike(name: str, losses: Mapping[str, float], dtype: str) -> None:
    """
    Raises:
        ValueError: the loss in eval() is not transformers', or the first one's where that does not run.
    """
    loss, right = losses[name], losses.get("transformers", next(iter(losses.values())))
    if not abs(loss - right) <= TOLERANCE[dtype] * abs(right):
        raise ValueError(f"{name}: loss {loss:.5f}, expected {right:.5f} within {TOLERANCE[dtype]:.2%}")


# ---- the worker's side


def work(request: Mapping[str, Any]) -> Callable[[], float]:
    """A contender, for a worker.

    Args:
        request: contender, model, work, batch, tokens, dtype, device.
    Returns:
        A function that does the work once and returns a number of it; at its first call it returns the loss in eval().
    """
    import transformers

    import peakgpt

    transformers.logging.set_verbosity_error()
    torch.manual_seed(SEED)
    which, device = MODELS[request["model"]], torch.device(request["device"])
    kind, fields = which.config
    model = getattr(transformers, which.model)(getattr(transformers, kind)(**fields)).to(device)
    ids = torch.randint(5, model.config.vocab_size, (request["batch"], request["tokens"]))
    labels = torch.where(torch.rand(ids.shape) < LABELLED, ids, IGNORED) if which.masked else ids
    if CONTENDERS[request["contender"]].patched:
        peakgpt.patch(model)
    make = WORK[request["work"]]
    return _loss_first(make, model, ids.to(device), labels.to(device), getattr(torch, request["dtype"]))


def _loss_first(make, model: nn.Module, ids: Tensor, labels: Tensor, dtype: torch.dtype) -> Callable[[], float]:
    steps = []

    def step() -> float:
        if steps:
            return steps[0]()
        with torch.no_grad(), _lower(ids.device, dtype):
            loss = float(model.eval()(ids, labels=labels).loss)
        steps.append(make(model, ids, labels, dtype))
        return loss

    return step


def _lower(device: torch.device, dtype: torch.dtype):
    return torch.autocast(device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext()


def _train(model: nn.Module, ids: Tensor, labels: Tensor, dtype: torch.dtype) -> Callable[[], float]:
    """Forward, backward, clipping and AdamW, as transformers' Trainer does them."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    model.train()

    def step() -> float:
        with _lower(ids.device, dtype):
            loss = model(ids, labels=labels).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def _generate(model: nn.Module, ids: Tensor, labels: Tensor, dtype: torch.dtype) -> Callable[[], float]:
    """NEW tokens, greedy, after PROMPT."""
    model.to(dtype)
    prompt = ids[:, :PROMPT]

    def step() -> float:
        text = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False,
            pad_token_id=0,
        )  # fmt: skip
        return float(text[:, PROMPT:].sum())

    return step


WORK = {"train": _train, "generate": _generate}
