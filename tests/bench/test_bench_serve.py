"""`bench serve`: its client counts the tokens of the server, and raises on incomplete responses."""

import contextlib
import json
import os
import re
import socket
import threading
from types import SimpleNamespace

import pytest
import serving  # skips all where the packages of peakgpt[serve] are missing
import torch

from peakgpt.bench import serve as bench
from peakgpt.bench import streaming_client
from peakgpt.bench.contenders.contender import Workload
from peakgpt.bench.interleave import raise_failure

CASE = Workload(streams=2, prompt=4, tokens=8)


@pytest.fixture
def running():
    tokenizer = bench.synthetic_tokenizer(300)
    with serving.Running(serving.tiny_model(tokenizer), tokenizer) as running:
        yield running


def test_server_and_engine_give_paired_rounds_and_latencies(running, monkeypatch):
    """Both run in this process. Other tests start `peakgpt serve` and worker processes."""

    @contextlib.contextmanager
    def here(folder, dtype, *, blocks):
        yield SimpleNamespace(port=running.port, awake=contextlib.nullcontext, process=SimpleNamespace(pid=os.getpid()))

    made = lambda name, request, environment: SimpleNamespace(  # noqa: E731
        step=bench.engine_step(request), pid=os.getpid(), close=lambda: None
    )
    monkeypatch.setattr(bench, "serving", here)
    monkeypatch.setattr(bench, "WorkerProcess", made)
    monkeypatch.setattr(bench, "keep_pages", lambda: None)  # it changes the allocator of this process for good
    config = running.engine.config
    case = bench.ServeCase("tiny", config, CASE, "float32", rounds=100, seconds=0.2)
    ours, engine, whole, first, between = case.measure(torch.device("cpu"), raise_failure)
    assert (ours.contender, engine.contender, whole.contender) == ("peakgpt", "engine", "peakgpt")
    assert ours.rounds == engine.rounds and whole.case["time"] == "without a pause"
    ended = int(whole.note.split(" requests ended")[0].split()[-1])
    assert ended >= 1 and abs(first.rounds - ended) <= CASE.streams < between.rounds
    # The client disconnects from open requests at the end: status 499 if the first token was not yet sent.
    assert not re.search(r'status="(4(?!99)|5)', running.ask("/metrics")[1])
    idle = running.idle()
    assert idle == running.engine.pool.num_blocks


def answer(tokens, told, last="data: [DONE]\n\n", status="200 OK"):
    events = ['data: {"choices": []}\n\n'] * tokens
    usage = json.dumps({"choices": [], "usage": {"completion_tokens": told}})
    parts = [*events, f"data: {usage}\n\n", *([last] if last else [])]
    body = "".join(f"{len(part):x}\r\n{part}\r\n" for part in parts)
    return f"HTTP/1.1 {status}\r\ntransfer-encoding: chunked\r\n\r\n{body}0\r\n\r\n".encode()


@contextlib.contextmanager
def client(said, pieces=1):
    """A client of two streams with requests of 3 tokens, of a server that says this to each of them, in pieces."""
    listening = socket.create_server(("127.0.0.1", 0))

    def serve():
        with contextlib.suppress(OSError):  # the socket is closed at the end of the test
            while True:
                opened, _ = listening.accept()
                with opened:
                    opened.recv(1 << 16)
                    for at in range(0, len(said), -(-len(said) // pieces)):
                        opened.sendall(said[at : at + -(-len(said) // pieces)])

    thread = threading.Thread(target=serve)
    thread.start()
    asking = streaming_client.StreamingClient(listening.getsockname()[1], [[1], [2]], 3)
    try:
        yield asking
    finally:
        asking.close()
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        thread.join()


@pytest.mark.parametrize("pieces", [1, 5, 1000])
def test_client_counts_tokens_and_completed_requests(pieces):
    with client(answer(3, 3), pieces) as asking:
        asking.take(30)
        assert 8 <= asking.ended <= 12 and len(asking.first_s) >= asking.ended
        asking.reset()
        asking.take(6)
        assert 1 <= asking.ended <= 4


@pytest.mark.parametrize("piece", [1, 7, 1 << 16])
def test_client_counts_the_same_tokens_for_any_packet_size(piece):
    said = answer(3, 3)
    parts = iter([said[at : at + piece] for at in range(0, len(said), piece)])
    stream = streaming_client.Stream(0, SimpleNamespace(recv=lambda most: next(parts)), 0.0)
    counts = [streaming_client.StreamingClient(0, [[1]], 3)._receive(stream) for _ in range(0, len(said), piece)]
    assert sum(counts) == 3 and stream.tokens == 5


@pytest.mark.parametrize(("said", "message"), [
    (answer(2, 3), "got 2 tokens, expected 3"), (answer(3, 2), "got 3 tokens, expected 2"),
    (answer(3, 3, last=""), "got a stream that ended with"),
    (answer(3, 3, last='data: {"error": {"message": "no"}}\n\n'), "got a stream that ended with"),
    (answer(3, 3, status="429 Too Many Requests"), "429 Too Many Requests.*, expected status 200"),
], ids=["fewer", "more", "cut off", "error", "refused"])  # fmt: skip
def test_incomplete_response_or_error_status_raises(said, message):
    with client(said) as asking, pytest.raises(ValueError, match=message):
        asking.take(30)
