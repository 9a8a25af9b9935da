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

from peakgpt.bench import serve as bench
from peakgpt.bench import streaming_client
from peakgpt.bench.contenders.contender import Workload

CASE = Workload(streams=2, prompt=4, tokens=8)


@pytest.fixture
def running():
    tokenizer = bench.synthetic_tokenizer(300)
    running = serving.Running(serving.tiny_model(tokenizer), tokenizer)
    yield running
    running.close()


def test_compare_serving_times_server_and_engine(running, monkeypatch):
    """Both run in this process. Other tests start `peakgpt serve` and worker processes."""

    @contextlib.contextmanager
    def server_in_process(folder, dtype, *, blocks):
        yield SimpleNamespace(port=running.port, awake=contextlib.nullcontext, process=SimpleNamespace(pid=os.getpid()))

    engine_in_process = lambda name, request, environment: SimpleNamespace(  # noqa: E731
        step=bench.engine_step(request), pid=os.getpid(), close=lambda: None
    )
    monkeypatch.setattr(bench, "serving", server_in_process)
    monkeypatch.setattr(bench, "WorkerProcess", engine_in_process)
    monkeypatch.setattr(bench, "keep_pages", lambda: None)  # it changes the allocator of this process for good
    config = running.engine.config
    ours, engine, whole, first, between = bench.compare_serving(config, CASE, "float32", seconds=0.2)
    assert (ours.contender, engine.contender, whole.contender) == ("peakgpt", "engine", "peakgpt")
    assert ours.rounds == engine.rounds and whole.case["time"] == "without pauses"
    ended = int(whole.note.split(" requests ended")[0].split()[-1])
    assert ended >= 1 and abs(first.rounds - ended) <= CASE.streams < between.rounds
    # The client disconnects from open requests at the end: status 499 if the first token was not yet sent.
    assert not re.search(r'status="(4(?!99)|5)', running.ask("/metrics")[1])
    assert running.idle() == running.engine.pool.blocks


def response(tokens, completion_tokens, last="data: [DONE]\n\n", status="200 OK"):
    events = ['data: {"choices": []}\n\n'] * tokens
    usage = json.dumps({"choices": [], "usage": {"completion_tokens": completion_tokens}})
    parts = [*events, f"data: {usage}\n\n", *([last] if last else [])]
    body = "".join(f"{len(part):x}\r\n{part}\r\n" for part in parts)
    return f"HTTP/1.1 {status}\r\ntransfer-encoding: chunked\r\n\r\n{body}0\r\n\r\n".encode()


@contextlib.contextmanager
def client(data, pieces=1):
    """Connect a client with two streams and 3 tokens per request to a server that sends `data` to each, in pieces."""
    listening, size = socket.create_server(("127.0.0.1", 0)), -(-len(data) // pieces)

    def serve():
        with contextlib.suppress(OSError):  # the socket is closed at the end of the test
            while True:
                opened, _ = listening.accept()
                with opened:
                    opened.recv(1 << 16)
                    for start in range(0, len(data), size):
                        opened.sendall(data[start : start + size])

    thread = threading.Thread(target=serve)
    thread.start()
    streaming = streaming_client.StreamingClient(listening.getsockname()[1], [[1], [2]], 3)
    try:
        yield streaming
    finally:
        streaming.close()
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        thread.join()


@pytest.mark.parametrize("pieces", [1, 5, 1000])
def test_client_counts_tokens_and_requests(pieces):
    with client(response(3, 3), pieces) as streaming:
        streaming.take(30)
        assert 8 <= streaming.ended <= 12 and len(streaming.first_s) >= streaming.ended
        streaming.reset()
        streaming.take(6)
        assert 1 <= streaming.ended <= 4


@pytest.mark.parametrize("piece", [1, 7, 1 << 16])
def test_token_count_does_not_depend_on_packet_borders(piece):
    data = response(3, 3)
    parts = iter([data[start : start + piece] for start in range(0, len(data), piece)])
    stream = streaming_client.Stream(0, SimpleNamespace(recv=lambda size: next(parts)), 0.0)
    counts = [streaming_client.StreamingClient(0, [[1]], 3)._receive(stream) for _ in range(0, len(data), piece)]
    assert sum(counts) == 3 and stream.tokens == 5


@pytest.mark.parametrize(("data", "message"), [
    (response(2, 3), "got 2 tokens, expected 3"), (response(3, 2), "got 3 tokens, expected 2"),
    (response(3, 3, last=""), "got a stream that ended with"),
    (response(3, 3, last='data: {"error": {"message": "no"}}\n\n'), "got a stream that ended with"),
    (response(3, 3, status="429 Too Many Requests"), "429 Too Many Requests.*, expected status 200"),
], ids=["fewer", "more", "cut off", "error", "refused"])  # fmt: skip
def test_incomplete_response_raises(data, message):
    with client(data) as streaming, pytest.raises(ValueError, match=message):
        streaming.take(30)
