"""Many streams from the server at once, beside the engine alone with the same requests, each in a process of its own.

Both keep as many requests open as there are streams: where one ends, the next begins. They begin staggered, so that
prompts come one by one. A sample is the time of streams x tokens new tokens in the middle of that. Who is not being
timed is stopped (SIGSTOP), so that rounds pair up. Then the server goes on alone for the whole time without a pause,
which is where times of first tokens, and between tokens, are from.

The client is this process: sockets that count events and read no JSON but the last, since it runs on the same cores.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import selectors
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from peakgpt.bench.decoders import Case, our_model
from peakgpt.bench.findings import OURS, Findings
from peakgpt.bench.streams import start
from peakgpt.bench.worker import Worker
from peakgpt.engine.inference.block_pool import BLOCK_TOKENS
from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.model.presets import preset
from peakgpt.kernels.cpu.memory import keep_pages
from peakgpt.kernels.hardware.clock import Result, Spread, interleave

STATUS, EVENT, LAST = b"HTTP/1.1 200", b"data: ", b"data: [DONE]\n\n"
LOOK_S = 0.002  # between looks for events: woken by each, the client would take a core for most of a step
WAIT_S = 60.0  # for the server to begin, to send anything, to end


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="gpt2", help="preset (default gpt2, 124M)")
    parser.add_argument("--streams", type=int, default=64, help="requests open at once (default 64)")
    parser.add_argument("--prompt", type=int, default=32, help="prompt tokens (default 32)")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens of a request (default 128)")
    parser.add_argument("--seconds", type=float, default=120.0,
                        help="of serving without a pause, after half of it in rounds (default 120)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")


def run(args: argparse.Namespace, device: torch.device) -> Findings:
    if device.type != "cpu":
        raise ValueError(f"serve: device is {device}, expected cpu")
    case = Case(args.streams, args.prompt, args.tokens)
    return Findings(compare_serving(preset(args.model), case, args.dtype, seconds=args.seconds))


def compare_serving(config: GPTConfig, case: Case, dtype: str, *, seconds: float) -> list[Result]:
    """Time the server beside the engine.

    Args:
        config, case, dtype: of the model and its requests, which are greedy.
        seconds: of serving without a pause; half of it before, in rounds beside the engine.
    Returns:
        Tokens of both by rounds; then, of the server without a pause, its tokens, and times to the first token and
        between tokens of a stream.
    Raises:
        ValueError: a request got an error, or fewer tokens than its usage says.
    """
    request = {"make": f"{__name__}:engine_step", "threads": torch.get_num_threads(), "dtype": dtype,
               "config": dataclasses.asdict(config), "case": dataclasses.asdict(case)}  # fmt: skip
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        state, ids = start(config, case)
        our_model(state, config, dtype).save_pretrained(folder, made_up_tokenizer(config.vocab_size))
        del state
        engine = Worker("engine", request, {})
        stack.callback(engine.close)
        server = stack.enter_context(serving(folder, dtype, blocks=blocks_for(case)))
        client = Client(server.port, ids.tolist(), case.tokens)
        stack.callback(client.close)

        def served() -> None:
            with server.awake():
                client.take(case.streams * case.tokens)

        engine.step()
        served()  # the staggered beginning
        begin = time.perf_counter()
        served()
        rounds = math.ceil(seconds / (time.perf_counter() - begin))
        timings = interleave({OURS: served, "engine": engine.step}, rounds=-(-rounds // 2), warmup=0,
                             workers=[engine.pid, server.process.pid])  # fmt: skip
        client.forget()
        with server.awake():
            begin = time.perf_counter()
            client.take(rounds * case.streams * case.tokens)
            whole_s = time.perf_counter() - begin
    sizes = {"n_layer": config.n_layer, "n_embd": config.n_embd, "prompt": case.prompt}
    same = {"bench": "serve", "backend": "auto", "device": "cpu", "dtype": dtype}
    found = [
        Result.of(timing, contender=name, case={**sizes, "tokens": case.tokens, "batch": case.streams}, **same)
        for name, timing in timings.items()
    ]
    speed = f"{rounds * case.streams * case.tokens / whole_s:.0f} tokens/s"
    found.append(Result(
        contender=OURS, case={**sizes, "tokens": case.tokens, "batch": case.streams, "time": "without a pause"},
        median_s=whole_s / rounds, q25_s=whole_s / rounds, q75_s=whole_s / rounds, rounds=1, dropped=0,
        note=f"without a pause: {whole_s:.0f} s, {speed}, {client.ended} requests ended, each whole", **same,
    ))  # fmt: skip
    for what, times in (("first token", client.first_s), ("between tokens", client.between_s)):
        cuts = statistics.quantiles(times, n=100)
        note = f"{what} of {len(times)}: 95 % within {1e3 * cuts[94]:.0f} ms, all within {1e3 * max(times):.0f} ms"
        spread = Spread.of(times)
        found.append(Result(
            contender=OURS, case={**sizes, "batch": case.streams, "time": what}, median_s=spread.median,
            q25_s=spread.q25, q75_s=spread.q75, rounds=len(times), dropped=0, note=note, **same,
        ))  # fmt: skip
    return found


def blocks_for(case: Case) -> int:
    return case.streams * -(-(case.prompt + case.tokens) // BLOCK_TOKENS)


def made_up_tokenizer(vocab_size: int):
    """Bytes, the end of text, and as many made-up words as are missing."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    from peakgpt.engine.data.tokenizer import BYTE_ALPHABET, END_OF_TEXT, Tokenizer

    names = [*BYTE_ALPHABET, END_OF_TEXT]
    names += [f"\u0120word{i}" for i in range(vocab_size - len(names))]
    library = tokenizers.Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    return Tokenizer(library)


def engine_step(request: Mapping[str, Any]) -> Callable[[], float]:
    """The engine's part, for a worker: a function that waits for streams x tokens new tokens."""
    from peakgpt.engine.inference.engine import Engine, SamplingParams  # needs tokenizers

    config, case = GPTConfig(**request["config"]), Case(**request["case"])
    keep_pages()  # as the server does
    state, ids = start(config, case)
    engine = Engine(our_model(state, config, request["dtype"]), blocks=blocks_for(case), streams=case.streams)
    streams = {}

    def begin(stream: int, tokens: int) -> None:
        params = SamplingParams(temperature=0.0, max_tokens=tokens)
        streams[engine.submit(ids[stream].tolist(), params)] = stream

    for stream in range(case.streams):
        begin(stream, staggered(stream, case))

    def step() -> float:
        left = case.streams * case.tokens
        while left > 0:
            for output in engine.step():
                if output.error:
                    raise output.error
                left -= len(output.tokens)
                if output.finish:
                    begin(streams.pop(output.request), case.tokens)
        return 0.0

    return step


def staggered(stream: int, case: Case) -> int:
    """Tokens of a stream's first request."""
    return -(-case.tokens * (stream + 1) // case.streams)


@dataclass
class Serving:
    """A running `peakgpt serve`, stopped unless awake."""

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
    """Start the command, and end it as its users do."""
    command = [sys.executable, "-m", "peakgpt", "serve", folder, "--port", "0"]
    options = ["--dtype", dtype, "--blocks", str(blocks)]
    process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True)
    try:
        said = process.stdout.readline()
        if not said:
            raise ValueError(f"serve: the server ended with exit code {process.wait(WAIT_S)}; its message is above")
        yield Serving(process, int(said.rpartition(":")[2]))
    finally:
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGCONT)
        try:
            process.wait(WAIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


@dataclass
class Stream:
    """One request that is open."""

    number: int
    socket: socket.socket
    begin: float
    tokens: int = 0
    seen: float = 0.0  # when its last token came
    tail: bytes = b""


@dataclass
class Client:
    """Keeps a request open for each prompt, while `take` runs; counts tokens.

    Args:
        port: of the server, on loopback.
        prompts: ids, one a stream.
        tokens: of a request, but for the first ones, which are staggered.
    """

    port: int
    prompts: Sequence[Sequence[int]]
    tokens: int
    first_s: list[float] = field(default_factory=list)
    between_s: list[float] = field(default_factory=list)
    selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)
    ended: int = 0  # requests, each with all its tokens
    paused_s: float = 0.0
    left_at: float | None = None

    def forget(self) -> None:
        """Begin to collect times, and to count, anew."""
        self.ended = 0
        self.first_s.clear()
        self.between_s.clear()

    def close(self) -> None:
        for key in list(self.selector.get_map().values()):
            key.fileobj.close()
        self.selector.close()

    def now(self) -> float:
        return time.perf_counter() - self.paused_s

    def take(self, tokens: int) -> None:
        """Wait for so many tokens.

        Raises:
            ValueError: an answer that is not whole.
        """
        if self.left_at is None:
            case = Case(len(self.prompts), 0, self.tokens)
            for number in range(len(self.prompts)):
                self._begin(number, staggered(number, case))
        else:
            self.paused_s += time.perf_counter() - self.left_at
        while tokens > 0:
            time.sleep(LOOK_S)
            ready = self.selector.select(WAIT_S)
            if not ready:
                raise ValueError(f"serve: no stream got anything for {WAIT_S} s")
            tokens -= sum(self._receive(key.data) for key, _ in ready)
        self.left_at = time.perf_counter()

    def _begin(self, number: int, tokens: int) -> None:
        body = json.dumps({"prompt": self.prompts[number], "max_tokens": tokens, "temperature": 0, "stream": True,
                           "stream_options": {"include_usage": True}}).encode()  # fmt: skip
        head = ("POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
                f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n")  # fmt: skip
        opened = socket.create_connection(("127.0.0.1", self.port), timeout=WAIT_S)
        opened.sendall(head.encode() + body)
        self.selector.register(opened, selectors.EVENT_READ, Stream(number, opened, self.now()))

    def _receive(self, stream: Stream) -> int:
        """Take what has come; returns how many events, which are tokens but for the last two."""
        data = stream.socket.recv(1 << 16)
        if not data:
            self._end(stream)
            return 0
        if len(stream.tail) < len(STATUS) and not STATUS.startswith((stream.tail + data)[: len(STATUS)]):
            raise ValueError(f"serve: got {(stream.tail + data).decode(errors='replace')!r}, expected status 200")
        held = stream.tail[1 - len(EVENT) :] + data
        new, now, last = held.count(EVENT), self.now(), LAST in stream.tail[1 - len(LAST) :] + data
        stream.tail = (stream.tail + data)[-1024:]
        if new:
            (self.between_s if stream.tokens else self.first_s).append(now - (stream.seen or stream.begin))
            stream.tokens, stream.seen = stream.tokens + new, now
        return new - 2 * last

    def _end(self, stream: Stream) -> None:
        self.selector.unregister(stream.socket)
        stream.socket.close()
        *_, usage, last = stream.tail.split(EVENT)
        if not last.startswith(b"[DONE]"):
            raise ValueError(f"serve: a stream ended with {stream.tail[-200:]!r}")
        told = json.loads(usage.split(b"\r\n")[0])["usage"]["completion_tokens"]
        if told != stream.tokens - 2:
            raise ValueError(f"serve: got {stream.tokens - 2} tokens, expected {told}")
        self.ended += 1
        self._begin(stream.number, self.tokens)
