"""Every limit of api/serve/limits.py: the maximum is accepted, and one more is rejected.

The numbers are repeated here, so that a change of a limit must be made in two places.
"""

import asyncio
import dataclasses
import json
import socket
from types import SimpleNamespace

import pytest
import serving  # skips all where the packages of peakgpt[serve] are missing
from serving import LIMITS, Running, guard

from peakgpt.serve.errors import BadRequest
from peakgpt.serve.json_body import parse
from peakgpt.serve.schema import check_request

# limit: (its value, function that makes the fields of a request with n of it)
FIELDS = {
    "prompts": (64, lambda n: {"prompt": ["x"] * n}),
    "prompt_tokens": (1 << 17, lambda n: {"prompt": [1] * n}),
    "max_tokens": (1 << 17, lambda n: {"max_tokens": n}),
    "n": (16, lambda n: {"n": n}),
    "choices": (128, lambda n: {"prompt": ["x"] * -(-n // 4), "n": 4}),
    "stop": (16, lambda n: {"stop": ["x"] * n}),
    "stop_chars": (256, lambda n: {"stop": "x" * n}),
    "logprobs": (20, lambda n: {"logprobs": n}),
    "bias": (1024, lambda n: {"logit_bias": {str(i): 1 for i in range(n)}}),
    "allowed_texts": (256, lambda n: {"choices": ["x"] * n}),
    "allowed_chars": (1024, lambda n: {"choices": ["x" * n]}),
}
CHAT = {
    "messages": (256, lambda n: {"messages": [{"role": "user", "content": "x"}] * n}),
    "tools": (128, lambda n: {"tools": [{"type": "function", "function": {"name": "f"}}] * n}),
    "max_tokens": (1 << 17, lambda n: {"max_completion_tokens": n}),
    "n": (16, lambda n: {"n": n}),
    "logprobs": (20, lambda n: {"logprobs": True, "top_logprobs": n}),
}
TIMES = {"header_s": 10.0, "body_s": 20.0, "write_s": 30.0, "keep_alive_s": 5, "drain_s": 30}
OTHERS = {"header_bytes": 16 << 10, "headers": 100, "body_bytes": 1 << 20, "json_depth": 32, "json_containers": 4096,
          "json_keys": 16384, "prompt_logprobs": 1 << 19, "queue": 512, "connections": 256, "inputs": 256}  # fmt: skip


def test_every_limit_has_a_test():
    assert {*FIELDS, *CHAT, *TIMES, *OTHERS} == {field.name for field in dataclasses.fields(LIMITS)}


@pytest.mark.parametrize(("chat", "name"), [*((False, name) for name in FIELDS), *((True, name) for name in CHAT)])
def test_field_limits_accept_the_maximum_and_reject_more(chat, name):
    most, fields = (CHAT if chat else FIELDS)[name]
    start = {"messages": [{"role": "user", "content": "x"}]} if chat else {"prompt": "x"}
    check_request({**start, **fields(most)}, chat=chat, limits=LIMITS)
    with pytest.raises(BadRequest) as refusal:
        check_request({**start, **fields(most + 1)}, chat=chat, limits=LIMITS)
    param = {"choices": "n"}.get(name) or [*fields(most)][-1]
    assert refusal.value.status == 400 and refusal.value.body["error"]["param"] == param


def test_json_depth_limit():
    nested = lambda depth: b'{"x":' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"  # noqa: E731
    assert parse(nested(OTHERS["json_depth"]), LIMITS)
    with pytest.raises(BadRequest, match="more than 32 levels"):
        parse(nested(OTHERS["json_depth"] + 1), LIMITS)


def test_json_container_limit():
    """Brackets in strings do not count."""
    many = lambda count: b'{"[{\\"[": [' + b",".join([b'"]}[{\\\\"', b"{}"] * (count - 1)) + b"]}"  # noqa: E731
    assert parse(many(OTHERS["json_containers"]), LIMITS)
    with pytest.raises(BadRequest, match="more than 4096 objects and lists"):
        parse(many(OTHERS["json_containers"] + 1), LIMITS)


def test_prompt_logprob_limit(running):
    """prompt tokens x n x (1 + logprobs): 128 prompts of 4096 tokens with the chosen token only, for example."""
    requests, most = running.server.requests, OTHERS["prompt_logprobs"]
    ask = lambda tokens: requests._check_prompt_logprobs(  # noqa: E731
        check_request({"prompt": "x", "echo": True, "logprobs": 3, "n": 2}, chat=False, limits=LIMITS), [range(tokens)]
    )
    ask(most // 8)
    with pytest.raises(BadRequest, match="log-probabilities of prompts") as refusal:
        ask(most // 8 + 1)
    assert refusal.value.body["error"]["param"] == "logprobs"


def test_json_key_limit():
    """Colons in strings do not count."""
    many = lambda count: json.dumps({f"{i}::": ":" for i in range(count)}).encode()  # noqa: E731
    assert parse(many(OTHERS["json_keys"]), LIMITS)
    with pytest.raises(BadRequest, match="16385 keys, expected up to 16384"):
        parse(many(OTHERS["json_keys"] + 1), LIMITS)


@pytest.mark.parametrize("declared", [True, False])
def test_body_size_limit(declared):
    def read(count):
        async def stream():
            for at in range(0, count, 1 << 16):
                yield b" " * min(1 << 16, count - at)

        headers = {"content-type": "application/json", **({"content-length": str(count)} if declared else {})}
        return asyncio.run(guard.read_body(SimpleNamespace(headers=headers, stream=stream), LIMITS))

    assert len(read(OTHERS["body_bytes"])) == OTHERS["body_bytes"]
    with pytest.raises(BadRequest, match="more than 1048576 bytes") as refusal:
        read(OTHERS["body_bytes"] + 1)
    assert refusal.value.status == 413


def head(count, size):
    """Return the scope of a request with `count` header lines and `size` bytes, target and separators included."""
    lines = [(b"x" * 4, b"")] * (count - 1)
    target = b"/health"
    rest = size - len(target) - 8 * (count - 1) - len(b"filler") - 4
    return {"type": "http", "path": "/health", "raw_path": target, "query_string": b"",
            "headers": [*lines, (b"filler", b"y" * rest)]}  # fmt: skip


def test_header_count_and_size_limits():
    check = guard.Guard(None, key=None, hosts=None, limits=LIMITS)._check
    check(head(OTHERS["headers"], OTHERS["header_bytes"]))
    for count, size in ((OTHERS["headers"] + 1, 4096), (9, OTHERS["header_bytes"] + 1)):
        with pytest.raises(BadRequest, match="header: got") as refusal:
            check(head(count, size))
        assert refusal.value.status == 431


@pytest.fixture(scope="module")
def running():
    tokenizer = serving.tiny_tokenizer()
    with Running(serving.tiny_model(tokenizer), tokenizer, limits=LIMITS) as running:
        yield running


def test_header_count_limit_over_http(running):
    with socket.create_connection(("127.0.0.1", running.port), timeout=5) as one:
        one.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n" + b"x: y\r\n" * 100 + b"connection: close\r\n\r\n")
        answer, _, body = b"".join(iter(lambda: one.recv(4096), b"")).partition(b"\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 431 ") and "102 lines" in json.loads(body)["error"]["message"]


def test_queue_limit(running):
    worker = running.server.worker
    for waiting, expected in ((OTHERS["queue"] - 2, 200), (OTHERS["queue"] - 1, 429)):
        worker.load += waiting
        try:
            assert running.ask("/v1/completions", {"prompt": "x", "n": 2, "max_tokens": 1})[0] == expected
        finally:
            worker.load -= waiting


def test_connection_limit(running):
    running.idle()
    connections, address = [], ("127.0.0.1", running.port)
    try:
        connections = [socket.create_connection(address, timeout=5) for _ in range(OTHERS["connections"])]
        connections[-1].sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert b"200 OK" in connections[-1].recv(1000)
        connections.append(socket.create_connection(("127.0.0.1", running.port), timeout=5))
        assert b"503" in connections[-1].recv(1000)
    finally:
        for connection in connections:
            connection.close()


def test_time_limits_reach_uvicorn():
    """tests/api/test_serve.py tests their effect, with shorter limits."""
    protocol_class, timers = guard.protocol(LIMITS), []
    protocol = protocol_class.__new__(protocol_class)
    protocol.loop = SimpleNamespace(call_later=lambda s, what: timers.append(s) or SimpleNamespace(cancel=lambda: None))
    protocol.transport, protocol.flow = SimpleNamespace(abort=None), SimpleNamespace(pause_writing=lambda: None)
    protocol._expect("head")
    protocol._expect("body")
    protocol.pause_writing()
    assert timers == [TIMES["header_s"], TIMES["body_s"] + 1, TIMES["write_s"]]
    config = guard.config(None, LIMITS)
    assert (config.timeout_keep_alive, config.timeout_graceful_shutdown) == (TIMES["keep_alive_s"], TIMES["drain_s"])

    async def never():
        await asyncio.sleep(60)
        yield b""

    async def wait(read, seconds):
        read.close()
        timers.append(seconds)
        raise asyncio.TimeoutError

    with pytest.MonkeyPatch.context() as patched, pytest.raises(BadRequest, match=r"got 0 bytes after 20\.0 s"):
        patched.setattr(asyncio, "wait_for", wait)
        request = SimpleNamespace(headers={"content-type": "application/json"}, stream=never)
        asyncio.run(guard.read_body(request, LIMITS))
    assert timers[-1] == TIMES["body_s"]
