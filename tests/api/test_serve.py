"""The HTTP server, called by the client of OpenAI and through raw sockets: responses and errors."""

import contextlib
import dataclasses
import json
import re
import socket
import subprocess
import sys
import threading
import time

import pytest
import serving  # skips all where the packages of peakgpt[serve] are missing
from serving import Running, guard, posted, with_chat

from peakgpt.cli import main
from peakgpt.engine.evaluation.score import Scorer
from peakgpt.engine.gpt import GPT

KEY = "right key"
CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
CANARY = {"prompt": "the canary", "seed": 7, "max_tokens": 20, "logprobs": 3, "echo": True, "temperature": 0.9}


@pytest.fixture(scope="module")
def tokenizer():
    return serving.tiny_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return serving.tiny_model(tokenizer)


@pytest.fixture(scope="module")
def running(model, tokenizer):
    with Running(model, with_chat(tokenizer, CHAT), hosts=guard.LOOPBACK) as running:
        yield running


@pytest.fixture(scope="module")
def client(running):
    return running.openai_client()


def test_echo_returns_log_probabilities_of_prompt_and_completion(client, model, tokenizer):
    ids = [tokenizer.encode("the canary"), tokenizer.encode("a song")]
    answer = client.completions.create(model="tiny", prompt=ids, max_tokens=0, echo=True, logprobs=2)
    scores = Scorer(model).score([(one[:1], one[1:]) for one in ids])
    for choice, score, text in zip(answer.choices, scores, ("the canary", "a song"), strict=True):
        assert choice.text == text and choice.logprobs.token_logprobs[0] is None
        assert choice.logprobs.token_logprobs[1:] == pytest.approx(score.logprobs, abs=1e-6)
        assert "".join(choice.logprobs.tokens) == text and choice.logprobs.text_offset[0] == 0
    assert answer.usage.prompt_tokens == sum(map(len, ids)) and answer.usage.completion_tokens == 0


def test_stop_token_has_its_log_probability(client, tokenizer):
    """lm-eval takes the last entry as the new token, and sums the entries before it."""
    ids = tokenizer.encode("the canary")
    ending = {"max_tokens": 1, "logit_bias": {str(tokenizer.end_id): 100}}
    choice = client.completions.create(model="tiny", prompt=ids, echo=True, logprobs=1, **ending).choices[0]
    assert choice.text == "the canary" and len(choice.logprobs.token_logprobs) == len(ids) + 1


def test_streamed_parts_add_up_to_the_whole_completion(client):
    request = {"model": "tiny", "prompt": ["the", "a song"], "n": 2, "max_tokens": 30, "seed": 3}
    whole = client.completions.create(**request)
    texts, usage = {}, None
    for chunk in client.completions.create(**request, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
    assert texts == {choice.index: choice.text for choice in whole.choices} and len(texts) == 4
    assert usage == whole.usage and len(set(texts.values())) > 2


def test_stop_strings_end_the_completion(client):
    text = client.completions.create(model="tiny", prompt="the", max_tokens=60, seed=1).choices[0].text
    assert len(text) > 10
    cut = client.completions.create(model="tiny", prompt="the", max_tokens=60, seed=1, stop=text[5:7]).choices[0]
    assert cut.text == text[: text.find(text[5:7])] and cut.finish_reason == "stop"


def test_chat_completion_renders_template_and_streams(client):
    request = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 9, "seed": 1}
    whole = client.chat.completions.create(**request, logprobs=True, top_logprobs=2)
    stream = client.chat.completions.create(**request, stream=True)
    streamed = "".join(chunk.choices[0].delta.content for chunk in stream)
    same = client.completions.create(model="tiny", prompt="user: hi\nassistant:", max_tokens=9, seed=1)
    assert whole.choices[0].message.content == streamed == same.choices[0].text
    assert len(whole.choices[0].logprobs.content[0].top_logprobs) == 2


def test_models_tokenize_health_and_metrics_routes(running, client, tokenizer):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert running.ask("/health") == (200, {"status": "ok"})
    assert running.ask("/tokenize", {"prompt": "a song"})[1]["tokens"] == tokenizer.encode("a song")
    assert running.ask("/detokenize", {"tokens": tokenizer.encode("é song")}) == (200, {"prompt": "é song"})
    assert "peakgpt_tokens_total" in running.ask("/metrics")[1]
    assert "<textarea" in running.ask("/")[1]
    status, answer = running.ask("/nowhere")
    assert status == 404 and "got GET /nowhere, expected one of GET /, " in answer["error"]["message"]


@pytest.mark.parametrize(("value", "text"), [(-1, "got -1, "), ("1", "got '1', "), ([1], r"got [1], ")])
def test_error_messages_quote_the_received_value(running, value, text):
    assert text in running.ask("/v1/completions", {"prompt": "x", "max_tokens": value})[1]["error"]["message"]


BAD = [
    ({"suffix": "x"}, "suffix"), ({"unknown": 1}, "unknown"), ({"temperature": True}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": 1e-40}, "temperature"),
    ({"max_tokens": 1.0}, "max_tokens"), ({"max_tokens": 1 << 20}, "max_tokens"),
    ({"n": 17}, "n"), ({"n": 0}, "n"), ({"prompt": ["x"] * 9, "n": 16}, "n"), ({"best_of": 2}, "best_of"),
    ({"stop": ["x"] * 17}, "stop"), ({"stop": [""]}, "stop"), ({"logprobs": 21}, "logprobs"),
    ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"), ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"5000": 1}}, "logit_bias"), ({"prompt": [5000]}, "prompt"), ({"prompt": [True]}, "prompt"),
    ({"prompt": [[1], [-1]]}, "prompt"), ({"prompt": []}, "prompt"), ({"prompt": ["x"] * 65}, "prompt"),
    ({"prompt": [1] * 129}, "prompt"), ({"choices": ["x"] * 257}, "choices"), ({"num_beams": 2}, "num_beams"),
    ({"prompt": None}, "prompt"), ({"top_p": 1e-40}, "top_p"), ({"stream_options": {}}, "stream_options"),
    ({"prompt": "a" * 20000}, "prompt"), ({"prompt": [1] * 120, "max_tokens": 20}, "max_tokens"),
    ({"seed": 1 << 64}, "seed"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "param"), BAD, ids=lambda value: str(value)[:40])
def test_bad_fields_return_errors_in_openai_format(running, changes, param):
    status, answer = running.ask("/v1/completions", {"prompt": "x", **changes})
    assert status == 400 and answer["error"]["type"] == "invalid_request_error" and answer["error"]["param"] == param
    assert answer["error"]["message"]


# Fields of OpenAI and of other servers that change the text: beam search, response formats, tools.
UNKNOWN = (
    "use_beam_search", "num_beams", "beams", "length_penalty", "early_stopping", "response_format", "functions",
    "function_call", "guided_json", "guided_regex", "guided_choice", "grammar", "min_tokens", "ignore_eos",
    "stop_token_ids", "prompt_logprobs", "do_sample", "modalities", "prediction", "service_tier", "store", "metadata",
    "web_search_options", "chat_template",
)  # fmt: skip
ONLY = {"/v1/completions": ("messages", "top_logprobs", "max_completion_tokens", "tools", "tool_choice"),
        "/v1/chat/completions": ("prompt", "echo", "best_of", "suffix")}  # fmt: skip


@pytest.mark.parametrize(("path", "start"), [
    ("/v1/completions", {"prompt": "x"}), ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
], ids=["completions", "chat"])  # fmt: skip
def test_unsupported_openai_fields_are_rejected(running, path, start):
    for name in (*UNKNOWN, *ONLY[path]):
        for value in (1, None, [{"type": "function"}]):
            status, answer = running.ask(path, {**start, "max_tokens": 1, name: value})
            error = answer["error"]
            assert (status, error["type"], error["param"]) == (400, "invalid_request_error", name), (name, value)
            assert error["message"] and error["code"] == "unknown_parameter"
    assert running.ask(path, {**start, "max_tokens": 1})[0] == 200


def test_best_of_must_equal_n(running):
    for n, best_of, expected in ((1, 1, 200), (3, 3, 200), (1, 3, 400), (3, 1, 400)):
        status, answer = running.ask("/v1/completions", {"prompt": "x", "max_tokens": 1, "n": n, "best_of": best_of})
        assert status == expected and (status == 400 or len(answer["choices"]) == n)
        assert status == 200 or answer["error"]["param"] == "best_of"


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b'{"prompt": "x", "temperature": NaN}', "NaN"), (b'{"prompt": "x", "temperature": -Infinity}', "Infinity"),
        (b'{"prompt": "x", "temperature": 1e999}', "inf"), (b'{"prompt": "\\ud800"}', "lone surrogate"),
        (b'{"prompt": "x", "prompt": "y"}', "twice"), (b"[" * 10000, "levels"),
        (b'"' + b'\\"' * 5000, "expected JSON"),
        (b"\xff", "expected JSON"), (b"[]", "expected a JSON object"), (b"", "expected JSON"),
        (b'{"prompt": "' + b"x" * (1 << 15) + b'"}', "more than"),
    ],
    ids=lambda value: str(value[:30]),
)  # fmt: skip
def test_bad_bodies_are_rejected(running, raw, text):
    status, answer = running.ask("/v1/completions", raw=raw)
    assert status == (413 if text == "more than" else 400) and text in answer["error"]["message"]


def test_wrong_model_content_type_host_and_header_are_rejected(running):
    assert running.ask("/v1/completions", {"prompt": "x", "model": "other"})[0] == 404
    assert running.ask("/v1/completions", {"prompt": "x"}, {"content-type": "text/plain"})[0] == 415
    assert running.ask("/health", headers={"host": "evil.example"})[0] == 403
    status, answer = running.ask("/health", headers={"x": "y" * (17 << 10)})
    assert status == 431 and answer["error"]["message"]


def test_every_route_except_health_needs_the_api_key(model, tokenizer):
    with Running(model, tokenizer, key=KEY) as keyed:
        paths = [route.path for route in keyed.server.app.routes]
        assert len(paths) == 10
        for path in [*paths, "/nowhere"]:
            assert keyed.ask(path)[0] == 401 or path == "/health"
            assert keyed.ask(path, headers={"authorization": "Bearer wrong"})[0] == 401 or path == "/health"
        assert keyed.ask("/health")[0] == 200
        assert keyed.ask("/v1/models", headers={"authorization": f"Bearer {KEY}"})[0] == 200
        assert keyed.ask("/", headers={"authorization": "Basic OnJpZ2h0IGtleQ=="})[0] == 200
        refused = keyed.ask("/v1/chat/completions", {"messages": []}, {"authorization": f"Bearer {KEY}"})
        assert refused[0] == 400 and "got a model without chat template, expected" in refused[1]["error"]["message"]


@pytest.mark.parametrize("sent", [b"", b"POST /v1/comp", b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n"])
def test_slow_headers_are_cut_off(running, sent):
    with socket.create_connection(("127.0.0.1", running.port), timeout=5) as slow:
        slow.sendall(sent)
        begin = time.monotonic()
        with contextlib.suppress(ConnectionResetError):
            assert slow.recv(100) == b""
        assert time.monotonic() - begin < 3


def test_slow_bodies_are_cut_off(running):
    with socket.create_connection(("127.0.0.1", running.port), timeout=5) as slow:
        slow.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
                     b"content-length: 100\r\n\r\n{")  # fmt: skip
        assert b"408" in slow.recv(1000)


def test_bodies_that_no_route_reads_are_cut_off(running):
    """The time limit of a body holds although no route reads the body, and data that arrives does not extend it."""
    with socket.create_connection(("127.0.0.1", running.port), timeout=5) as slow:
        slow.sendall(b"POST /nowhere HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000\r\n\r\n{")
        assert b"404" in slow.recv(1000)
        begin = time.monotonic()
        with pytest.raises(ConnectionError):
            while time.monotonic() - begin < 5:
                slow.sendall(b"x")
                time.sleep(0.1)


def test_client_that_does_not_read_is_cut_off(model, tokenizer):
    with Running(model, tokenizer, send_bytes=4096) as small, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", small.port))
        client.sendall(posted({"prompt": ["x"] * 8, "max_tokens": 120, "seed": 1, "stream": True}))
        until = time.monotonic() + 10
        while not (connections := small.uvicorn.server_state.connections):
            assert time.monotonic() < until
        while connections:
            assert time.monotonic() < until, "the connection is still open"
            time.sleep(0.01)
        assert small.idle() == 40


@pytest.mark.parametrize(("sent", "status"), [
    (b"GET / HTTP/1.1\r\nhost: localhost\r\nx: " + b"y" * (20 << 10), 431),
    (b"GET /" + b"y" * (20 << 10) + b" HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n", 431),
    (b"\x16\x03\x01 what\r\n\r\n", 400), (b"GET / HTTP/1.1\r\n\r\n", 400),
    (b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: -1\r\n\r\n", 400),
], ids=["header", "target", "no HTTP", "no host", "length"])  # fmt: skip
def test_bad_headers_return_errors_in_openai_format(running, sent, status):
    with socket.create_connection(("127.0.0.1", running.port), timeout=5) as connection:
        connection.sendall(sent)
        head, _, body = b"".join(iter(lambda: connection.recv(4096), b"")).partition(b"\r\n\r\n")
        assert head.startswith(f"HTTP/1.1 {status} ".encode()) and json.loads(body)["error"]["message"]


def test_too_many_connections_are_rejected(running):
    begin, connections = time.monotonic(), []
    try:
        connections = [socket.create_connection(("127.0.0.1", running.port), timeout=5) for _ in range(31)]
        assert b"503" in connections[-1].recv(1000)
    finally:
        for connection in connections:
            connection.close()
    while running.ask("/health")[0] != 200:
        assert time.monotonic() - begin < 5


def test_full_queue_returns_429(running):
    assert running.ask("/v1/completions", {"prompt": ["x"] * 41})[0] == 429
    assert running.idle() == 40


def test_disconnected_client_frees_its_cache(running):
    for stream in (True, False):
        with socket.create_connection(("127.0.0.1", running.port), timeout=5) as gone:
            gone.sendall(posted({"prompt": ["x"] * 30, "max_tokens": 120, "stream": stream}))
            until = time.monotonic() + 5
            while not running.engine.has_work:
                assert time.monotonic() < until
        assert running.idle() == 40


def test_failing_request_does_not_affect_others(running, monkeypatch):
    """First the engine rejects requests while another runs. Then a step raises, and later requests succeed."""
    expected = running.ask("/v1/completions", CANARY)[1]["choices"]
    answers = []
    thread = threading.Thread(target=lambda: answers.append(running.ask("/v1/completions", CANARY)[1]["choices"]))
    thread.start()
    for _ in range(5):
        assert running.ask("/v1/completions", {"prompt": "x", "logit_bias": {"5000": 1}})[0] == 400
    thread.join()
    assert answers == [expected]
    with monkeypatch.context() as patched:
        patched.setattr(running.engine.executor, "step", lambda chunks: 1 / 0)
        status, answer = running.ask("/v1/completions", CANARY)
    assert status == 500 and answer["error"]["type"] == "server_error"
    assert running.ask("/v1/completions", CANARY)[1]["choices"] == expected and running.idle() == 40


def test_serve_command_finishes_streams_on_sigterm(model, tokenizer, tmp_path):
    """After SIGTERM running streams finish, new connections are refused, and the exit code is 0.

    Nothing here depends on who is faster: the server may have finished its streams before this process sees that it
    refuses connections.
    """
    config = dataclasses.replace(model.config, block_size=1024)
    GPT(config).save_pretrained(tmp_path / "long", tokenizer)
    command = [sys.executable, "-m", "peakgpt", "serve", str(tmp_path / "long"), "--port", "0", "--dtype", "float32"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert re.fullmatch(r"cache: \d+ blocks of 64 tokens, .* MiB; .*\n", process.stderr.readline())
            address = re.fullmatch(r"long: http://127\.0\.0\.1:(\d+)\n", process.stdout.readline())
            at = ("127.0.0.1", int(address[1]))
            with socket.create_connection(at, timeout=60) as idle, contextlib.ExitStack() as stack:
                idle.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
                assert b"200 OK" in idle.recv(1000)
                no_end = {str(tokenizer.end_id): -100}
                request = {"prompt": "x", "max_tokens": 400, "logit_bias": no_end, "stream": True}
                streams = [stack.enter_context(socket.create_connection(at, timeout=60)) for _ in range(4)]
                for stream in streams:
                    stream.sendall(posted(request))
                begun = [stream.recv(100) for stream in streams]
                process.terminate()
                with pytest.raises(ConnectionError):
                    while True:
                        socket.create_connection(at, timeout=60).close()
                        time.sleep(0.01)  # a full queue of connections would not answer
                for begin, stream in zip(begun, streams, strict=True):
                    text = begin + b"".join(iter(lambda s=stream: s.recv(1 << 16), b""))
                    assert text.count(b"data: ") == 401 and text.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
            assert process.wait(60) == 0
        finally:
            process.kill()


def test_host_other_than_loopback_needs_an_api_key(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("PEAKGPT_API_KEY", raising=False)
    assert main(["serve", str(tmp_path), "--host", "0.0.0.0"]) == 2
    assert "without an API key, expected --api-key-file or $PEAKGPT_API_KEY" in capsys.readouterr().err


def fuzz(running, count):
    """Send random valid and invalid requests. Then the canary must give the same bits, and all blocks must be free."""
    given = pytest.importorskip("hypothesis", reason="hypothesis is not installed")
    from hypothesis import strategies as st

    odd = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9), st.just([]), st.just({}))
    good = {
        "prompt": st.text(max_size=20) | st.lists(st.integers(0, 299), max_size=9)
        | st.lists(st.text(max_size=4), max_size=9),
        "max_tokens": st.integers(0, 6), "temperature": st.floats(0, 2), "top_p": st.floats(0, 1),
        "top_k": st.integers(1, 300),
        "n": st.integers(1, 3),
        "stop": st.lists(st.text(min_size=1, max_size=3), max_size=3),
        "logprobs": st.integers(0, 5), "echo": st.booleans(), "seed": st.integers(0, 99), "stream": st.booleans(),
        "presence_penalty": st.floats(-2, 2),
        "frequency_penalty": st.floats(-2, 2),
        "logit_bias": st.dictionaries(st.integers(0, 300).map(str), st.floats(-100, 100), max_size=3),
        "choices": st.lists(st.text(min_size=1, max_size=5), max_size=3), "repetition_penalty": st.floats(0.1, 3),
        "min_p": st.floats(0, 1), "suffix": st.none(),
    }  # fmt: skip
    prompt = {"prompt": good.pop("prompt")}
    mixed = {name: strategy | odd for name, strategy in {**good, "other": odd}.items()}
    requests = st.fixed_dictionaries(prompt, optional=good) | st.fixed_dictionaries(
        {"prompt": prompt["prompt"] | odd}, optional=mixed
    )
    first, statuses = running.ask("/v1/completions", CANARY)[1]["choices"], []
    bodies = []

    @given.settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(given.HealthCheck))
    @given.given(requests)
    def one(data):
        status, answer = running.ask("/v1/completions", data)
        assert status in (200, 400), (status, answer)
        assert status == 200 or answer["error"]["message"]
        statuses.append(status)
        bodies.append(json.dumps(data).encode())

    one()
    assert statuses.count(200) > count / 20 and statuses.count(400) > count / 20
    assert running.ask("/v1/completions", CANARY)[1]["choices"] == first
    assert running.idle() == 40 and not running.server.worker.jobs and not running.engine.scheduler.running
    return bodies


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def test_random_requests_never_break_the_server(running):
    fuzz(running, 200)


@pytest.mark.slow
def test_many_random_requests_leak_no_memory(running):
    """Repeats the same requests for the measurement, because hypothesis keeps the requests that it draws."""
    bodies = fuzz(running, 10_000)[-2000:]
    sizes = []
    for _ in range(3):
        for raw in bodies:
            running.ask("/v1/completions", raw=raw)
        sizes.append(resident_bytes())
    assert running.idle() == 40
    assert sizes[-1] - sizes[0] < 4 << 20
