"""Greedy decoding of one or several streams on the CPU, beside the engines of bench/decoders.py.

Every contender runs the same random weights in a process of its own, all forms of weights in one interleaved run. A
step continues all streams' prompts to the end, so that a short prompt is part of it. Bytes, for MBU, are the weights in
their form and the cache, read once for each new token of all streams together: what must be read.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peakgpt.bench.contenders import SEED
from peakgpt.bench.decoders import CONTENDERS, FORMS, Case, eager_decoder
from peakgpt.bench.ops import OnFailure, raise_it
from peakgpt.bench.steppers import measure
from peakgpt.bench.worker import Worker
from peakgpt.engine.gpt import GPT
from peakgpt.engine.model.config import GPTConfig
from peakgpt.kernels.hardware.clock import Result
from peakgpt.kernels.hardware.device import peak_for

ALIKE = 4  # tokens that must be eager's in float32: later ones may differ by a rounding, where two are as likely
BITS = {"float32": 32, "bfloat16": 16, "int8": 8, "int4": 4.5}  # of a weight; int4 by 32 with 16 bits a scale
HEAD_BITS = {**BITS, "int4": 8}


def compare_streams(
    config: GPTConfig,
    case: Case,
    forms: Sequence[str] = FORMS,
    names: Sequence[str] | None = None,
    *,
    rounds: int = 7,
    on_failure: OnFailure = raise_it,
) -> list[Result]:
    """Time decoding, once each contender's text begins as plain torch's in float32 does.

    Args:
        config: the model.
        case: of the streams.
        forms: of the weights, a contender each where it has it.
        names: of CONTENDERS; None means all.
        rounds: see clock.interleave.
        on_failure: told of a contender that is not installed, ends, or has another text; the others are timed.
    Returns:
        A result a contender and form, whose dtype is the form.
    """
    state, ids = start(config, case)
    expected, alike = eager_decoder(state, config, ids, case, "float32")(), {}
    request = {"make": f"{__name__}:decode_step", "threads": torch.get_num_threads(),
               "config": dataclasses.asdict(config), "case": dataclasses.asdict(case)}  # fmt: skip
    asked = {f"{name} {form}": (name, form) for form in forms for name in names or CONTENDERS
             if form in CONTENDERS[name].forms}  # fmt: skip

    def begin(key: str, text: Path) -> Worker:
        name, form = asked[key]
        CONTENDERS[name].expect_installed()
        return Worker(key, {**request, "contender": name, "form": form, "text": str(text)}, {})

    def judge(key: str, texts: Mapping[str, Tensor]) -> None:
        alike[key] = _alike(asked[key][0], texts[key], expected, asked[key][1])

    with tempfile.TemporaryDirectory() as folder:
        measured = measure(
            ((key, partial(begin, key, Path(folder, f"{key}.pt"))) for key in asked),
            lambda key, worker: (worker.step(), torch.load(Path(folder, f"{key}.pt")))[1],
            judge, rounds=rounds, on_failure=on_failure,
        )  # fmt: skip
    peak = peak_for("cpu", torch.float32)
    return [
        Result.of(
            found.timing.noted(alike[key], who.version), bench="decode", contender=name, backend=who.backend,
            device="cpu", dtype=form,
            case={"n_layer": config.n_layer, "n_embd": config.n_embd, "prompt": case.prompt,
                  "tokens": case.tokens, "batch": case.streams},
            bytes=read_bytes(config, case, form), peak_bytes_s=peak.bandwidth_bytes_s, peak_source=peak.source,
        )
        for key, found in measured.items() for name, form in [asked[key]] for who in [CONTENDERS[name]]
    ]  # fmt: skip


def read_bytes(config: GPTConfig, case: Case, form: str) -> float:
    """Weights and, for each stream, the keys and values before it, once for each new token."""
    with torch.device("meta"):
        model = GPT(config)
    bits = {"wpe": 0, "wte": HEAD_BITS[form]}  # of the positions, a row
    weights = sum(
        p.numel() * next((b for part, b in bits.items() if part in name), BITS[form]) / 8
        for name, p in model.named_parameters()
    )
    cached = 2 * config.n_layer * config.n_kv_head * config.head_dim * (case.prompt + case.tokens / 2) * case.streams
    return case.tokens * (weights + cached * (4 if form == "float32" else 2))


def start(config: GPTConfig, case: Case) -> tuple[dict[str, Tensor], Tensor]:
    """(weights, (streams, prompt) int64), the same in each process.

    Positions weigh more than GPT-2's initialisation has them: else the tied head repeats one token for ever.
    """
    torch.manual_seed(SEED)
    state = GPT(config).state_dict()
    state["transformer.wpe.weight"] *= 20
    return state, torch.randint(config.vocab_size, (case.streams, case.prompt))


def _alike(name: str, text: Tensor, expected: Tensor, form: str) -> str:
    """How far texts are alike, for a note.

    Raises:
        ValueError: in float32 not far enough, or not the asked number of tokens.
    """
    if text.shape != expected.shape:
        raise ValueError(f"decode: {name}: text has shape {tuple(text.shape)}, expected {tuple(expected.shape)}")
    same = int((text == expected).long().cumprod(1).sum(1).min())
    if form == "float32" and same < min(ALIKE, expected.shape[1]):
        raise ValueError(f"decode: {name}: only the first {same} tokens are eager's, expected at least {ALIKE}")
    return f"{name}, {form}: at least {same} of {expected.shape[1]} tokens are those of eager in float32"


def decode_step(request: Mapping[str, Any]) -> Callable[[], float]:
    """A contender's decoding, for a worker.

    Args:
        request: contender, config, case, form, text (the file into which the first one is written).
    Returns:
        A function that decodes and returns one token.
    """
    config, case = GPTConfig(**request["config"]), Case(**request["case"])
    state, ids = start(config, case)
    decode = CONTENDERS[request["contender"]].build(state, config, ids, case, request["form"])
    torch.save(decode(), request["text"])
    return lambda: float(decode()[0, -1])
