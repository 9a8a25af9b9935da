"""Greedy decoding with a KV cache versus plain PyTorch and other engines: `peakgpt bench decode`.

On a CPU each contender has a process of its own, and all of them load the files of one random model. One step decodes
all streams from the prompt to the end, prefill included. `bytes`, for MBU, count the weights that are used and the KV
cache, read once for each new token of all streams together. Before the timing each contender computes the logits of the
same random text after each prompt, token by token. `fidelity` compares them with those of float32.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from peakgpt.bench.agreement import expect_close
from peakgpt.bench.case import Case, joined
from peakgpt.bench.contenders.contender import REFERENCE, SEED, WEIGHT_FORMATS, Workload, contenders_of
from peakgpt.bench.contenders.decoding import ALL_DECODERS, DECODING_CONTENDERS
from peakgpt.bench.contenders.eager_gpt import EagerGPT, is_gpt2
from peakgpt.bench.contenders.llama_cpp_model import weight_bits
from peakgpt.bench.contenders.models import expect_family, random_prompts, write_random_model
from peakgpt.bench.contenders.time_contenders import Work, time_contenders
from peakgpt.bench.contenders.worker_process import WorkerProcess, saving_first
from peakgpt.bench.fidelity import Fidelity, positions_of
from peakgpt.bench.interleave import OnFailure, interleave
from peakgpt.bench.model_choice import add_model_arguments, chosen_model
from peakgpt.bench.peak_meter import PeakMeter
from peakgpt.bench.schema import Result
from peakgpt.engine.gpt import GPT
from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.model.quantized_linear import EMBEDDING, HEAD
from peakgpt.kernels.command_line import integer

CHECKED_TOKENS = 8  # of the reference
MIN_EQUAL_TOKENS = 4  # first tokens, in float32; later, rounding may decide between two almost equally likely tokens
BITS = {"float32": 32, "bfloat16": 16, "int8": 8, "int4": 4.5}  # per weight; int4: a 16-bit scale for each 32 weights
GPU_FORMATS = ("float32", "bfloat16")
HEAD_BITS = {**BITS, "int4": 8}


@dataclass(frozen=True)
class DecodeCase(Case):
    """Decoding on the CPU with weights of one format; each contender has its own process.

    The first tokens of each contender are checked against those of eager in float32.

    Args:
        model: name of the model, for the name of the case.
        config: the model.
        workload: streams, prompt and new tokens.
        dtype: weight format.
    """

    kind: ClassVar[str] = "decode"
    model: str
    config: GPTConfig
    workload: Workload
    dtype: str

    @property
    def name(self) -> str:
        return joined(self.kind, self.model, str(self.workload), self.dtype)

    def all_contenders(self, device: torch.device) -> list[str]:
        return contenders_of(DECODING_CONTENDERS, self.config, self.dtype)

    @property
    def sizes(self) -> dict[str, int]:
        return _sizes(self.config, self.workload)

    def _measure(self, device: torch.device, on_failure: OnFailure) -> list[Result]:
        agreement: dict[str, str | None] = {}
        with self.work() as work:

            def expect_correct(name: str, outputs: Mapping[str, Tensor]) -> None:
                agreement[name] = work.expect_correct(name, outputs)

            measured = time_contenders(
                ((name, partial(work.start, name)) for name in self.contenders(device)), work.first_output,
                expect_correct, rounds=self.rounds, warmup=0, budget_s=self.seconds,
                peaks=PeakMeter(device, memory=True), on_failure=on_failure,
            )  # fmt: skip
            bits = {name: work.weight_bits(name) for name in measured}
            fidelity = {name: work.fidelity(name) for name in measured}
        return [
            Result.of(
                m.timing.noted(agreement[name], m.note, contender.version), bench="decode", contender=name,
                backend=contender.backend, device="cpu", dtype=self.dtype, case=self.sizes,
                memory_bytes=m.memory_bytes, base_bytes=m.base_bytes,
                bytes=read_bytes(self.config, self.workload, self.dtype), weight_bits=bits[name],
                fidelity=fidelity[name],
            )
            for name, m in measured.items() for contender in [DECODING_CONTENDERS[name]]
        ]  # fmt: skip

    @contextlib.contextmanager
    def work(self) -> Iterator[Work]:
        """Yield the work, with a random model in a folder and its first tokens and the logits of a text in float32."""
        with tempfile.TemporaryDirectory() as files:
            folder = Path(files)
            write_random_model(folder, self.config)
            expected, truth = self._expected(folder)
            yield Work(
                DECODING_CONTENDERS,
                start=lambda name: self._start(name, folder, self.text_tokens),
                first_output=lambda name, worker: (worker.step(), torch.load(_tokens_file(folder, name)))[1],
                expect_correct=lambda name, outputs: _expect_equal_start(name, outputs[name], expected, self.dtype),
                weight_bits=lambda name: weight_bits(DECODING_CONTENDERS[name], folder, self.dtype),
                fidelity=lambda name: Fidelity.of(torch.load(_logits_file(folder, name)), truth),
            )

    def _expected(self, folder: Path) -> tuple[Tensor, Tensor]:
        """Return the first tokens and the logits of the text in float32.

        Their process ends before the contenders fill the memory.
        """
        short = replace(self.workload, tokens=min(CHECKED_TOKENS, self.workload.tokens))
        replace(self, workload=short, dtype="float32")._start(REFERENCE, folder, self.text_tokens).step_once()
        return torch.load(_tokens_file(folder, REFERENCE)), torch.load(_logits_file(folder, REFERENCE))

    @property
    def text_tokens(self) -> int:
        """Tokens of each text whose logits are compared with those of float32."""
        return positions_of(self.workload.streams, self.workload.tokens)

    def _start(self, name: str, folder: Path, text: int) -> WorkerProcess:
        contender = ALL_DECODERS[name]
        contender.expect_installed()
        request = {"make": f"{__name__}:decode_step", "threads": torch.get_num_threads(), "folder": str(folder),
                   "config": dataclasses.asdict(self.config), "workload": dataclasses.asdict(self.workload),
                   "contender": name, "weights": self.dtype, "output": str(_tokens_file(folder, name)),
                   "logits": str(_logits_file(folder, name)), "text": text}  # fmt: skip
        return WorkerProcess(name, request, contender.environment)


def _tokens_file(folder: Path, name: str) -> Path:
    return folder / f"{name}.pt"


def _logits_file(folder: Path, name: str) -> Path:
    return folder / f"{name}.logits.pt"


@dataclass(frozen=True)
class GenerateCase(Case):
    """`generate` of peakgpt and eager in this process, on any device. The logits of the prompt are checked.

    Args:
        model: name of the model, for the name of the case.
        config: GPT-2 of any size.
        workload: streams, prompt and new tokens.
        dtype: of the weights.
    """

    kind: ClassVar[str] = "decode"
    model: str
    config: GPTConfig
    workload: Workload
    dtype: str

    @property
    def name(self) -> str:
        return joined(self.kind, self.model, "generate", str(self.workload), self.dtype)

    def all_contenders(self, device: torch.device) -> list[str]:
        return ["peakgpt", "eager"]

    def _measure(self, device: torch.device, on_failure: OnFailure) -> list[Result]:
        model = GPT(self.config).to(device, getattr(torch, self.dtype)).eval()
        ids = torch.randint(model.config.vocab_size, (self.workload.streams, self.workload.prompt), device=device)
        names = self.contenders(device)
        return compare_decoding(model, ids, names, count=self.workload.tokens, rounds=self.rounds,
                                budget_s=self.seconds)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--prompt", type=integer(), default=16, help="prompt tokens (default 16)")
    parser.add_argument("--tokens", type=integer(), default=32, help="tokens to add (default 32)")
    parser.add_argument("--streams", type=integer(), action="append", help="repeatable; default 1 and 8")
    parser.add_argument(
        "--dtype",
        action="append",
        choices=WEIGHT_FORMATS,
        help="weight format; repeatable; default: float32 and bfloat16, on the CPU also int8 and int4",
    )


def cases(args: argparse.Namespace, device: torch.device) -> list[Case]:
    """
    Raises:
        ValueError: no family of transformers has the model; on a GPU also other models than GPT-2, int8 and int4.
    """
    model, config = chosen_model(args)
    workloads = [Workload(streams, args.prompt, args.tokens) for streams in args.streams or (1, 8)]
    if device.type == "cpu":
        expect_family(config)
        return [
            DecodeCase(model, config, workload, dtype, rounds=7)
            for workload in workloads
            for dtype in args.dtype or WEIGHT_FORMATS
        ]
    if not is_gpt2(config):
        raise ValueError(f"bench decode: got --model {args.model} on {device}, expected a GPT-2 there")
    for dtype in args.dtype or ():
        if dtype not in GPU_FORMATS:
            raise ValueError(f"bench decode: got --dtype {dtype} on {device}, expected {' or '.join(GPU_FORMATS)}")
    return [
        GenerateCase(model, config, workload, dtype, rounds=5, seconds=20.0)
        for workload in workloads
        for dtype in args.dtype or GPU_FORMATS
    ]


def compare_decoding(
    model: GPT, ids: Tensor, names: Sequence[str] = ("peakgpt", "eager"), *, count: int, rounds: int = 5,
    budget_s: float | None = 20.0,
) -> list[Result]:  # fmt: skip
    """Time greedy decoding of `count` tokens by peakgpt and eager, after checking the logits of the prompt.

    Args:
        model: in the dtype to decode in.
        ids: (B, T) prompt.
        names: of the contenders to time.
        count: tokens to add.
        rounds, budget_s: see `interleave`.
    Returns:
        Results; bytes are the weights and the cache, read once per token.
    Raises:
        ValueError: the logits of peakgpt are wrong; see `expect_close`.
    """
    weight = next(model.parameters())
    eager = EagerGPT(model.config).to(weight.device, weight.dtype)
    eager.load_state_dict(model.state_dict())
    count = min(count, model.config.block_size - ids.shape[1])
    was_training, _ = model.training, model.eval()
    with torch.no_grad():
        truth = lambda: [copy.deepcopy(eager).double()(ids)]  # noqa: E731
        expect_close("decode: peakgpt", [model(ids)], [eager(ids)], weight.dtype, truth)
    contenders = {
        "peakgpt": lambda: model.generate(ids, max_new_tokens=count),
        "eager": lambda: eager.generate(ids, count),
    }
    timings = interleave({name: contenders[name] for name in names}, rounds=rounds, warmup=1, device=weight.device,
                         budget_s=budget_s, peaks=PeakMeter(weight.device, memory=True))  # fmt: skip
    model.train(was_training)
    c = model.config
    weights = sum(p.numel() for p in model.parameters()) - model.transformer.wpe.weight.numel()
    cached = 2 * c.n_layer * c.n_kv_head * c.head_dim * (ids.shape[1] + count / 2) * ids.shape[0]
    return [
        Result.of(
            timing, bench="decode", contender=name, backend="auto" if name == "peakgpt" else "torch",
            device=str(weight.device), dtype=str(weight.dtype).removeprefix("torch."),
            case=_sizes(c, Workload(len(ids), ids.shape[1], count)),
            bytes=count * (weights + cached) * weight.element_size(),
        )
        for name, timing in timings.items()
    ]  # fmt: skip


def _sizes(config: GPTConfig, workload: Workload) -> dict[str, int]:
    return {"n_layer": config.n_layer, "n_embd": config.n_embd, "prompt": workload.prompt, "tokens": workload.tokens,
            "batch": workload.streams}  # fmt: skip


def read_bytes(config: GPTConfig, workload: Workload, weights: str) -> float:
    """Return the bytes of the weights and of the past keys and values of all streams, read once per new token.

    Of a layer's experts those count that compute a token of any stream, if all are equally likely.
    """
    with torch.device("meta"):
        model = GPT(config)
    unused = {"transformer.wpe"} if config.tied_head else {"transformer.wpe", EMBEDDING}  # rows: negligible
    bits = {**dict.fromkeys((EMBEDDING, HEAD), HEAD_BITS[weights]), **dict.fromkeys(unused, 0)}
    idle = (1 - config.experts_per_token / config.experts) ** workload.streams if config.experts else 0.0
    weight_bytes = sum(
        p.numel() * (1 - idle * (".experts." in name)) * bits.get(name.rpartition(".")[0], BITS[weights]) / 8
        for name, p in model.named_parameters()
    )
    past = workload.prompt + workload.tokens / 2
    keys = sum(min(window or past, past) for window in config.windows)
    cached = 2 * config.n_kv_head * config.head_dim * keys * workload.streams
    return workload.tokens * (weight_bytes + cached * (4 if weights == "float32" else 2))


def _expect_equal_start(name: str, tokens: Tensor, expected: Tensor, weights: str) -> str:
    """Return a note on the number of first tokens that are equal.

    Args:
        tokens: (streams, at least T).
        expected: (streams, T), in float32.
    Raises:
        ValueError: too few are equal in float32, or the shapes differ.
    """
    first = tokens[:, : expected.shape[1]]
    if first.shape != expected.shape:
        raise ValueError(f"decode: {name}: tokens have shape {tuple(first.shape)}, expected {tuple(expected.shape)}")
    same = int((first == expected).long().cumprod(1).sum(1).min())
    if weights == "float32" and same < min(MIN_EQUAL_TOKENS, expected.shape[1]):
        raise ValueError(
            f"decode: {name}: only the first {same} tokens equal those of eager, expected at least {MIN_EQUAL_TOKENS}"
        )
    return f"{name}, {weights}: at least {same} of the first {expected.shape[1]} tokens equal those of eager in float32"


def decode_step(request: Mapping[str, Any]) -> Callable[[], float]:
    """Return the step of a contender: `make` of a worker process.

    Args:
        request: contender, folder of `write_random_model`, config, workload, weights, output (file for the tokens of
            the first run), text (tokens of a text after each prompt), logits (file for its logits).
    Returns:
        A function that decodes all streams and returns one token.
    """
    config, workload = GPTConfig(**request["config"]), Workload(**request["workload"])
    ids = random_prompts(config, workload.streams, workload.prompt)
    build = ALL_DECODERS[request["contender"]].build
    decoder = build(Path(request["folder"]), config, ids, workload, request["weights"])
    text = random_prompts(config, workload.streams, request["text"], SEED + 1)
    torch.save(decoder.logits(text), request["logits"])
    return saving_first(decoder.run, request["output"], lambda tokens: float(tokens[0, -1]))
