"""The HTTP server under many streams versus the engine alone: `peakgpt bench serve`.

Server and engine run the same requests, each in its own process. Both keep one request open for each stream: when one
ends, the next begins. The first requests are staggered, so that prompts arrive one by one. A sample is the time of
streams x tokens new tokens. The process that is not timed is stopped (SIGSTOP), so that rounds pair up. Afterwards the
server runs alone without pauses, which gives the times to the first token and between tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from peakgpt.bench.case import Case, expect_cpu, joined
from peakgpt.bench.contenders.contender import Workload
from peakgpt.bench.contenders.models import our_model, random_prompts, write_random_model
from peakgpt.bench.contenders.worker_process import WorkerProcess
from peakgpt.bench.interleave import OnFailure, interleave
from peakgpt.bench.run_results import OURS
from peakgpt.bench.schema import Result
from peakgpt.bench.streaming_client import WAIT_S, StreamingClient, first_request_tokens
from peakgpt.bench.timing import Spread
from peakgpt.engine.inference.block_pool import BLOCK_TOKENS
from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.model.presets import preset
from peakgpt.kernels.command_line import integer
from peakgpt.kernels.cpu.memory import keep_pages

SERVING_S = 120.0  # duration of serving without pauses; the rounds versus the engine take half of it before


@dataclass(frozen=True)
class ServeCase(Case):
    """The server and the engine alone, in turns, then the server without pauses.

    Serving without pauses gives three further results: one for all tokens, one for the times to the first token, one
    for the times between tokens. `seconds` is the duration of serving without pauses; the rounds versus the engine
    take half of that time before.

    Args:
        model: name of the model, for the name of the case.
        config: the model.
        workload: streams, prompt and new tokens; decoding is greedy.
        dtype: dtype of the weights.
    """

    kind: ClassVar[str] = "serve"
    model: str
    config: GPTConfig
    workload: Workload
    dtype: str

    @property
    def name(self) -> str:
        return joined(self.kind, self.model, str(self.workload), self.dtype)

    def all_contenders(self, device: torch.device) -> list[str]:
        return [OURS, "engine"]

    def _measure(self, device: torch.device, on_failure: OnFailure) -> list[Result]:
        """
        Raises:
            ValueError: a request got an error, or a number of tokens that differs from its `usage`.
        """
        names = self.contenders(device)
        return compare_serving(self.config, self.workload, self.dtype, names, seconds=self.seconds or SERVING_S,
                               most_rounds=self.rounds)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="gpt2", help="preset (default gpt2, 124M)")
    parser.add_argument("--streams", type=integer(), default=64, help="requests open at once (default 64)")
    parser.add_argument("--prompt", type=integer(), default=32, help="prompt tokens (default 32)")
    parser.add_argument("--tokens", type=integer(), default=128, help="new tokens of a request (default 128)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")


def cases(args: argparse.Namespace, device: torch.device) -> list[Case]:
    expect_cpu("serve", device)
    workload = Workload(args.streams, args.prompt, args.tokens)
    return [ServeCase(args.model, preset(args.model), workload, args.dtype, rounds=100, seconds=SERVING_S)]


def compare_serving(
    config: GPTConfig, workload: Workload, dtype: str, names: Sequence[str], *, seconds: float, most_rounds: int
) -> list[Result]:
    """Time the server and the engine alone; see ServeCase."""
    request = {
        "make": f"{__name__}:engine_step",
        "threads": torch.get_num_threads(),
        "dtype": dtype,
        "workload": dataclasses.asdict(workload),
    }
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        write_random_model(Path(folder), config)
        synthetic_tokenizer(config.vocab_size).save(folder)
        ids = random_prompts(config, workload.streams, workload.prompt)
        engine = WorkerProcess("engine", {**request, "folder": folder}, {})
        stack.callback(engine.close)
        server = stack.enter_context(serving(folder, dtype, blocks=blocks_for(workload)))
        client = StreamingClient(server.port, ids.tolist(), workload.tokens)
        stack.callback(client.close)

        def served() -> None:
            with server.awake():
                client.take(workload.streams * workload.tokens)

        engine.step()
        served()  # staggered start
        begin = time.perf_counter()
        served()
        rounds = math.ceil(seconds / (time.perf_counter() - begin))
        contenders = {OURS: served, "engine": engine.step}
        timings = interleave({name: contenders[name] for name in names}, rounds=min(most_rounds, -(-rounds // 2)),
                             warmup=0, workers={OURS: server.process.pid, "engine": engine.pid})  # fmt: skip
        client.reset()
        with server.awake():
            begin = time.perf_counter()
            client.take(rounds * workload.streams * workload.tokens)
            whole_s = time.perf_counter() - begin
    sizes = {"n_layer": config.n_layer, "n_embd": config.n_embd, "prompt": workload.prompt}
    same = {"bench": "serve", "backend": "auto", "device": "cpu", "dtype": dtype}
    results = [
        Result.of(timing, contender=name, case={**sizes, "tokens": workload.tokens, "batch": workload.streams}, **same)
        for name, timing in timings.items()
    ]
    speed = f"{rounds * workload.streams * workload.tokens / whole_s:.0f} tokens/s"
    results.append(Result(
        contender=OURS, case={**sizes, "tokens": workload.tokens, "batch": workload.streams, "time": "without a pause"},
        median_s=whole_s / rounds, q25_s=whole_s / rounds, q75_s=whole_s / rounds, rounds=1, dropped=0,
        note=f"without pauses: {whole_s:.0f} s, {speed}, {client.ended} requests ended, all complete", **same,
    ))  # fmt: skip
    for what, times in (("first token", client.first_s), ("between tokens", client.between_s)):
        cuts = statistics.quantiles(times, n=100)
        note = f"{what} of {len(times)}: 95 % within {1e3 * cuts[94]:.0f} ms, all within {1e3 * max(times):.0f} ms"
        spread = Spread.of(times)
        results.append(Result(
            contender=OURS, case={**sizes, "batch": workload.streams, "time": what}, median_s=spread.median,
            q25_s=spread.q25, q75_s=spread.q75, rounds=len(times), dropped=0, note=note, **same,
        ))  # fmt: skip
    return results


def blocks_for(workload: Workload) -> int:
    return workload.streams * -(-(workload.prompt + workload.tokens) // BLOCK_TOKENS)


def synthetic_tokenizer(vocab_size: int):
    """Return a tokenizer with all bytes, the end-of-text token, and synthetic words up to the vocabulary size."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    from peakgpt.engine.data.token_pieces import BYTE_ALPHABET
    from peakgpt.engine.data.tokenizer import END_OF_TEXT, Tokenizer

    names = [*BYTE_ALPHABET, END_OF_TEXT]
    names += [f"\u0120word{i}" for i in range(vocab_size - len(names))]
    library = tokenizers.Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    return Tokenizer(library)


def engine_step(request: Mapping[str, Any]) -> Callable[[], float]:
    """Return the step of the engine: `make` of a worker process. A step computes streams x tokens new tokens."""
    from peakgpt.engine.inference.engine import Engine, SamplingParams  # needs tokenizers

    workload, model = Workload(**request["workload"]), our_model(Path(request["folder"]), request["dtype"])
    keep_pages()  # as the server does
    ids = random_prompts(model.config, workload.streams, workload.prompt)
    engine = Engine(model, blocks=blocks_for(workload), streams=workload.streams)
    streams = {}

    def submit(stream: int, tokens: int) -> None:
        params = SamplingParams(temperature=0.0, max_tokens=tokens)
        streams[engine.submit(ids[stream].tolist(), params)] = stream

    for stream in range(workload.streams):
        submit(stream, first_request_tokens(stream, workload.streams, workload.tokens))

    def step() -> float:
        left = workload.streams * workload.tokens
        while left > 0:
            for output in engine.step():
                if output.error:
                    raise output.error
                left -= len(output.token_ids)
                if output.finish_reason:
                    submit(streams.pop(output.request_id), workload.tokens)
        return 0.0

    return step


@dataclass
class ServerProcess:
    """A running `peakgpt serve`, stopped by SIGSTOP outside of `awake`."""

    process: subprocess.Popen
    port: int

    @contextlib.contextmanager
    def awake(self):
        os.kill(self.process.pid, signal.SIGCONT)
        try:
            yield
        finally:
            os.kill(self.process.pid, signal.SIGSTOP)


@contextlib.contextmanager
def serving(folder: str, dtype: str, *, blocks: int):
    """Start `peakgpt serve`, and end it by SIGTERM."""
    command = [sys.executable, "-m", "peakgpt", "serve", folder, "--port", "0"]
    options = ["--dtype", dtype, "--blocks", str(blocks)]
    process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True)
    try:
        first_line = process.stdout.readline()
        if not first_line:
            raise ValueError(f"serve: the server ended with exit code {process.wait(WAIT_S)}; its message is above")
        yield ServerProcess(process, int(first_line.rpartition(":")[2]))
    finally:
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGCONT)
        try:
            process.wait(WAIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
