"""Every error of the server: the table in docs/serving.md is that of the code, and each row can be provoked."""

import asyncio
import contextlib
import json
import re
import socket
import threading
from pathlib import Path

import pytest
import serving  # skips all where the packages of peakgpt[serve] are missing
from serving import LIMITS_HERE, Running, guard, posted

from peakgpt.serve import preparation
from peakgpt.serve.errors import ERRORS
from peakgpt.serve.schema import CHAT, COMPLETION

DOCUMENT = Path(__file__).parents[2] / "docs" / "serving.md"
KEY = "a key"
AUTHORIZED = {"authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def running():
    tokenizer = serving.tiny_tokenizer()
    chatting = serving.with_chat(tokenizer, "{{ messages[0].content }}")
    with Running(serving.tiny_model(tokenizer), chatting, key=[KEY, "other"], hosts=guard.LOOPBACK) as running:
        yield running


def raw(running, sent):
    """Send bytes. Return the status and the JSON of the answer."""
    with socket.create_connection(("127.0.0.1", running.port), timeout=20) as connection:
        connection.sendall(sent)
        head, _, body = b"".join(iter(lambda: connection.recv(4096), b"")).partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


def ask(path, data=None, **options):
    return lambda running: running.ask(path, data, {**AUTHORIZED, **options.pop("headers", {})}, **options)


def full_queue(running):
    running.server.worker.load += LIMITS_HERE.queue
    try:
        return ask("/v1/completions", {"prompt": "x"})(running)
    finally:
        running.server.worker.load -= LIMITS_HERE.queue


def failing(error):
    def provoke(running):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(preparation.RequestPreparation, "sequences", lambda *_: (_ for _ in ()).throw(error))
            return ask("/v1/completions", {"prompt": "x"})(running)

    return provoke


def many_connections(running):
    with contextlib.ExitStack() as stack:
        for _ in range(LIMITS_HERE.connections):
            stack.enter_context(socket.create_connection(("127.0.0.1", running.port), timeout=20))
        return raw(running, b"")


def stopped_engine(running):
    running.server.worker.failed = True
    try:
        return ask("/v1/models")(running)
    finally:
        running.server.worker.failed = False


def disconnected(running):
    """No client is left to read this one: read the job's event."""
    event = asyncio.Queue()
    outputs = serving.importlib.import_module("peakgpt.serve.stream").Outputs
    this = type("Outputs", (), {"job": type("Job", (), {"events": event})})

    async def receive():
        return {"type": "http.disconnect"}

    asyncio.run(outputs._watch_disconnect(this, type("Request", (), {"receive": staticmethod(receive)})))
    refusal = event.get_nowait()
    return refusal.status, refusal.body


POST = (b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer a key\r\n"
        b"content-type: application/json\r\n")  # fmt: skip
TEXT = {"prompt": "x"}
PROVOKE = {
    "invalid_json": ask("/v1/completions", raw=b"{"),
    "invalid_http": lambda running: raw(running, POST + b"content-length: x\r\n\r\n"),
    "invalid_value": ask("/v1/completions", {**TEXT, "n": 0}),
    "missing_required_parameter": ask("/v1/completions", {}),
    "unknown_parameter": ask("/v1/completions", {**TEXT, "tools": []}),
    "unsupported_parameter": ask("/v1/completions", {**TEXT, "suffix": "x"}),
    "context_length_exceeded": ask("/v1/completions", {**TEXT, "max_tokens": 500}),
    "invalid_api_key": lambda running: running.ask("/v1/models"),
    "host_not_allowed": ask("/v1/models", headers={"host": "example.org"}),
    "model_not_found": ask("/v1/completions", {**TEXT, "model": "x"}),
    "unknown_url": ask("/nowhere"),
    "method_not_supported": ask("/v1/completions"),
    "request_timeout": lambda running: raw(running, POST + b"content-length: 9\r\nconnection: close\r\n\r\n{"),
    "request_too_large": ask("/v1/completions", {"prompt": "x" * LIMITS_HERE.body_bytes}),
    "unsupported_media_type": ask("/v1/completions", TEXT, headers={"content-type": "text/plain"}),
    "rate_limit_exceeded": full_queue,
    "header_too_large": ask("/v1/models", headers={"x": "y" * LIMITS_HERE.header_bytes}),
    "client_disconnected": disconnected,
    "internal_error": failing(MemoryError()),
    "not_implemented": lambda running: raw(running, POST + b"transfer-encoding: gzip\r\n\r\n"),
    "too_many_connections": many_connections,
    "engine_stopped": stopped_engine,
}  # fmt: skip


def documented():
    """The table of the document: code -> (status, type, param)."""
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \| `(\w+)` \|([^|]*)\|", DOCUMENT.read_text(), re.MULTILINE)
    return {code: (int(status), kind, param.strip()) for status, kind, code, param in rows}


def test_documented_table_is_that_of_the_code():
    assert {code: row[:2] for code, row in documented().items()} == ERRORS


@pytest.mark.parametrize("code", ERRORS)
def test_every_error_can_be_provoked(running, code):
    status, answer = PROVOKE[code](running)
    error = answer["error"]
    assert (error["code"], status, error["type"]) == (code, *ERRORS[code]) and error["message"]
    assert (error["param"] is None) == (documented()[code][2] == ""), error


@pytest.mark.parametrize("name", [*COMPLETION, *CHAT])
def test_refused_fields_are_the_param(running, name):
    path, start = ("/v1/completions", TEXT)
    if name not in COMPLETION or name == "messages":
        path, start = ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "logprobs": True})
    for wrong in ({"x": {}}, -(10**30)):
        status, answer = ask(path, {**start, name: wrong})(running)
        assert (status, answer["error"]["param"]) == (400, name) and answer["error"]["code"] in ERRORS


CONTEXT = [
    ("/v1/completions", {"prompt": [5] * 129}, "prompt"),
    ("/v1/completions", {"prompt": [5] * 129, "max_tokens": 1}, "prompt"),
    ("/v1/completions", {"prompt": [5] * 128, "max_tokens": 1}, "max_tokens"),
    ("/v1/completions", {"prompt": ["x", [5] * 100], "max_tokens": 50}, "max_tokens"),
    ("/v1/completions", {"prompt": "x" * 20_000}, "prompt"), ("/tokenize", {"prompt": "x" * 20_000}, "prompt"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x z" * 99}]}, "messages"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 128}, "max_tokens"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "max_completion_tokens": 128},
     "max_completion_tokens"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "data", "param"), CONTEXT, ids=lambda value: str(value)[:50])
def test_context_overflow_has_the_code_and_words_by_which_clients_know_it(running, path, data, param):
    status, answer = ask(path, data)(running)
    assert (status, answer["error"]["code"], answer["error"]["param"]) == (400, "context_length_exceeded", param)
    assert answer["error"]["message"].startswith("This model's maximum context length is 128 tokens. ")


class Panic(BaseException):
    """As pyo3_runtime.PanicException: no Exception."""


@pytest.mark.parametrize("error", [Panic("x"), RecursionError(), ZeroDivisionError(), AssertionError()], ids=repr)
def test_exceptions_of_every_kind_become_one_error_and_others_continue(running, error):
    """In preparation, and in the engine's thread: in a step, in sampling, in decoding text."""
    expected = ask("/v1/completions", {**TEXT, "seed": 1})(running)[1]["choices"]
    assert failing(error)(running)[0] == 500

    def fail(*_, **__):
        raise error

    for owner, name in ((running.engine.executor, "step"), (running.engine, "_choose"), (running.engine, "_append")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, fail)
            status, answer = ask("/v1/completions", {**TEXT, "seed": 1})(running)
        assert (status, answer["error"]["code"]) == (500, "internal_error") and type(error).__name__ in str(answer)
    assert ask("/v1/completions", {**TEXT, "seed": 1})(running)[1]["choices"] == expected


@pytest.mark.parametrize("route", ["_models", "_page", "_metrics", "_health"])
def test_no_route_answers_a_plain_500(route):
    tokenizer = serving.tiny_tokenizer()
    with pytest.MonkeyPatch.context() as patch:

        async def fail(self):
            raise Panic

        patch.setattr(serving.serve.Server, route, fail)
        broken = Running(serving.tiny_model(tokenizer), tokenizer)
    path = {"_models": "/v1/models", "_page": "/", "_metrics": "/metrics", "_health": "/health"}[route]
    with broken:
        status, answer = broken.ask(path)
    assert status == 500 and answer["error"]["code"] == "internal_error"


def test_ended_engine_thread_answers_503_at_once_and_ends_the_server():
    """Running, waiting and later requests get an error; /health says so; the server's loop ends."""
    tokenizer = serving.tiny_tokenizer()
    dying = Running(serving.tiny_model(tokenizer), tokenizer)
    ended = threading.Event()
    dying.server.worker.on_failure = ended.set
    begun, answers = threading.Event(), []

    def step():
        begun.set()
        raise SystemExit

    dying.engine.step = step
    with dying:
        request = threading.Thread(target=lambda: answers.append(dying.ask("/v1/completions", TEXT)))
        request.start()
        assert begun.wait(20) and ended.wait(20)
        request.join(20)
        assert answers[0][0] == 503 and answers[0][1]["error"]["code"] == "engine_stopped"
        for path, data in (("/v1/completions", TEXT), ("/v1/models", None), ("/tokenize", TEXT), ("/", None)):
            status, answer = dying.ask(path, data)
            assert (status, answer["error"]["code"]) == (503, "engine_stopped")
        assert dying.ask("/health") == (503, {"status": "the engine thread has stopped"})


def test_error_in_a_stream_has_the_same_format(running):
    def fail(*_, **__):
        raise Panic

    sent = posted({"prompt": "x", "max_tokens": 120, "stream": True, "logit_bias": {"0": -100}})
    sent = sent.replace(
        b"host: localhost\r\n", b"host: localhost\r\nauthorization: Bearer other\r\nconnection: close\r\n"
    )
    with (
        pytest.MonkeyPatch.context() as patch,
        socket.create_connection(("127.0.0.1", running.port), timeout=20) as stream,
    ):
        stream.sendall(sent)
        text = stream.recv(4096)
        patch.setattr(running.engine, "_choose", fail)
        text += b"".join(iter(lambda: stream.recv(1 << 16), b""))
    last = [line for line in text.split(b"\n") if line.startswith(b"data: {")][-1]
    assert json.loads(last[6:])["error"]["code"] == "internal_error" and b"[DONE]" not in text


@pytest.mark.parametrize("name", ["_append", "_record_chunk"])
def test_panic_of_one_sequence_ends_only_this_one(name):
    """Interrupts end all, as always."""
    tokenizer = serving.tiny_tokenizer()
    engine = serving.Engine(serving.tiny_model(tokenizer), tokenizer, blocks=8)
    params = preparation.SamplingParams(max_tokens=5, temperature=0, logit_bias={tokenizer.end_id: -100})
    bad, good = engine.submit([5], params), engine.submit([6], params)
    original = getattr(engine, name)

    def fail(first, *args, error=Panic):
        sequence = getattr(first, "sequence", first)
        if sequence.request.request_id == bad:
            raise error
        return original(first, *args)

    setattr(engine, name, fail)
    outputs = list(engine.outputs())
    assert [type(one.error) for one in outputs if one.request_id == bad] == [Panic]
    assert sum(len(one.token_ids) for one in outputs if one.request_id == good) == 5
    setattr(engine, name, lambda *args: fail(*args, error=KeyboardInterrupt))
    bad = engine.submit([5], params)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
