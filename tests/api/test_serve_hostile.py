"""Hostile requests: each field of each route with values of the wrong size, type and content, and large products.

Every answer is 200, or an error in OpenAI's format; and a stream that runs beside them gets all its tokens.
"""

import json
import threading
import urllib.request
from types import SimpleNamespace

import pytest
import serving  # skips all where the packages of peakgpt[serve] are missing
from serving import LIMITS, Running

from peakgpt.engine.data import tokenizer as tokenizer_module
from peakgpt.engine.data.chat_template import ChatTemplates
from peakgpt.engine.inference import constrained_decoding, preparation, text_stream
from peakgpt.engine.inference.sampling_params import SamplingParams
from peakgpt.serve import json_body, schema
from peakgpt.serve import preparation as requests
from peakgpt.serve.errors import ERRORS
from peakgpt.serve.schema import CHAT, COMPLETION, DETOKENIZE, TOKENIZE

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
ROUTES = {
    "/v1/completions": (COMPLETION, {"prompt": "x", "max_tokens": 2}),
    "/v1/chat/completions": (CHAT, {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}),
    "/tokenize": (TOKENIZE, {"prompt": "x"}),
    "/detokenize": (DETOKENIZE, {"tokens": [1]}),
}
MANY = 10**6
# JSON texts, because some of them are no JSON.
VALUES = {
    "zero": "0", "negative": "-1", "huge": "1" + "0" * 400, "huge float": "1e308", "inf": "1e999", "NaN": "NaN",
    "minus inf": "-Infinity", "fraction": "0.5", "id out of range": "[4294967296]", "true": "true", "null": "null",
    "empty text": '""', "NUL": '"\\u0000"', "lone surrogate": '"\\ud800"', "pair": '"\\ud83d\\ude00"',
    "RTL": '"\\u202e\\uffff"', "long text": json.dumps("canary " * 60_000), "one long word": json.dumps("a" * 500_000),
    "empty list": "[]", "empty object": "{}", "mixed list": '[1, "x", null, {}]', "list of empty": '[""]',
    "object": '{"x": {"y": [1]}}', "ids as keys": '{"-1": 1, "1e3": 2, "99999999999": 0}', "NaN inside": "[NaN]",
    "deep lists": "[" * 5000 + "]" * 5000, "deep objects": '{"a":' * 2000 + "1" + "}" * 2000, "unclosed": "[" * 5000,
    "many numbers": "[" + "1," * (MANY // 4) + "1]", "many texts": "[" + '"x",' * (MANY // 8) + '"x"]',
    "many lists": "[" + "[]," * (MANY // 8) + "[]]",
    "many keys": "{" + ",".join(f'"{i}":1' for i in range(50_000)) + "}",
}  # fmt: skip


@pytest.fixture(scope="module")
def running():
    tokenizer = serving.tiny_tokenizer()
    with Running(serving.tiny_model(tokenizer), serving.with_chat(tokenizer, TEMPLATE), limits=LIMITS) as running:
        yield running


@pytest.fixture(scope="module", autouse=True)
def stream(running):
    """Streams beside the tests, one after the other, until all tests end. Each must get all its tokens."""
    stop, complete = threading.Event(), []
    end_id = running.server.requests.tokenizer.end_id
    body = {"prompt": "x", "max_tokens": 100, "stream": True, "seed": 1, "logit_bias": {str(end_id): -100}}

    def read():
        while not stop.is_set():
            request = urllib.request.Request(
                f"http://127.0.0.1:{running.port}/v1/completions", json.dumps(body).encode(),
                {"content-type": "application/json"},
            )  # fmt: skip
            with urllib.request.urlopen(request, timeout=60) as response:
                complete.append(sum(line.startswith(b"data: {") for line in response))

    thread = threading.Thread(target=read)
    thread.start()
    yield SimpleNamespace(complete=complete)
    stop.set()
    thread.join()
    assert complete and set(complete) == {100}


def assert_answer(status, answer):
    """Every answer is 200, or an error whose status and type are those of its code."""
    if status != 200:
        error = answer["error"]
        assert error.keys() == {"message", "type", "param", "code"} and error["message"]
        assert ERRORS[error["code"]] == (status, error["type"]) and 400 <= status < 500
        assert len(error["message"]) < 1000


@pytest.mark.parametrize(("path", "name"), [(path, name) for path, (fields, _) in ROUTES.items() for name in fields])
def test_hostile_values_get_an_answer_in_openai_format(running, path, name):
    start = {key: value for key, value in ROUTES[path][1].items() if key != name}
    head = json.dumps(start)[:-1] + (", " if start else "")
    for value in VALUES.values():
        raw = f'{head}"{name}": {value}}}'.encode()
        assert_answer(*running.ask(path, raw=raw))
    assert running.ask(path, ROUTES[path][1])[0] == 200


def test_random_fields_and_values_get_an_answer_in_openai_format(running):
    """Several hostile values at once, in any order, with repeated names."""
    given = pytest.importorskip("hypothesis", reason="hypothesis is not installed")
    from hypothesis import strategies as st

    short = sorted(value for value in VALUES.values() if len(value) < 1000)
    names = sorted({*COMPLETION, *CHAT, "odd"})
    pairs = st.lists(st.tuples(st.sampled_from(names), st.sampled_from(short)), max_size=6)

    @given.settings(max_examples=80, deadline=None, database=None)
    @given.given(st.sampled_from(sorted(ROUTES)), pairs)
    def one(path, fields):
        raw = "{" + ", ".join(f"{json.dumps(name)}: {value}" for name, value in fields) + "}"
        assert_answer(*running.ask(path, raw=raw.encode()))

    one()


def watch(patch, owner, name, note):
    """Call `note` with the arguments of each call of a function."""
    original = getattr(owner, name)

    def watched(*args, **options):
        note(*args, **options)
        return original(*args, **options)

    patch.setattr(owner, name, watched)


class Own(list):
    """A list that ignores what other threads append: the streams beside the test."""

    def append(self, value):
        if threading.current_thread() is threading.main_thread():
            super().append(value)


# The dimensions of a request that multiply. Each is a function of a size that returns fields.
DIMENSIONS = {
    "prompts": lambda n: {"prompt": ["x"] * n}, "n": lambda n: {"n": n},
    "choices": lambda n: {"choices": [f"{i}{'y' * 50}" for i in range(n * 8)]},
    "stop": lambda n: {"stop": [f"{i}{'z' * 50}" for i in range(n)]},
    "logit_bias": lambda n: {"logit_bias": {str(i): 1 for i in range(n * 8)}},
}  # fmt: skip


@pytest.mark.parametrize("other", [name for name in DIMENSIONS if name not in ("prompts", "n")])
@pytest.mark.parametrize("copies", ["prompts", "n"])
def test_work_before_the_first_token_is_shared_between_continuations(running, monkeypatch, copies, other):
    """Twelve times the continuations need no more work on choices, stop strings and biases than one."""
    work = {1: Own(), 12: Own()}
    for count, done in work.items():
        with monkeypatch.context() as patch:
            watch(
                patch, tokenizer_module.Tokenizer, "encode", lambda this, text, done=done, **_: done.append(len(text))
            )
            watch(
                patch, constrained_decoding.Choices, "__init__", lambda this, ids, _, done=done: done.append(len(ids))
            )
            watch(patch, SamplingParams, "__post_init__", lambda this, done=done: done.append(1))
            fields = {"prompt": "x", "max_tokens": 2, **DIMENSIONS[other](2), **DIMENSIONS[copies](count)}
            completion = schema.check_request(fields, chat=False, limits=LIMITS)
            sequences, _ = running.server.requests.sequences(completion, completion.fields["prompt"])
            assert sum(map(len, sequences)) == count
            done.remove(1)  # the first prompt
            done[:] = done[len(completion.fields["prompt"]) - 1 :]  # the other prompts
    assert work[1] == work[12]


def test_choices_take_four_bytes_a_token():
    """A tree of dicts took 230 bytes a token, for each continuation."""
    tokens = [[i, *range(1000)] for i in range(50)]
    choices = constrained_decoding.Choices(tokens, (0,))
    assert sum(len(one) * one.itemsize for one in choices.sequences) == 4 * 50 * 1001


def test_choices_longer_than_the_context_are_cut(running):
    engine = running.engine.preparation
    [[sequence]] = engine.prepare([([1], SamplingParams(choices=["y" * 5000], stop_token_ids=(0,)))])
    assert len(sequence.choices.choices.sequences[0]) == engine.config.block_size + 1


def test_work_of_stop_strings_does_not_depend_on_their_length():
    """Count comparisons of characters: at most two for each character and stop string, whatever is held back."""

    class Text(str):
        compared = 0

        def __getitem__(self, index):
            Text.compared += 1
            return str.__getitem__(self, index)

    stops = [Text("a" * 255 + "b"), *(Text(char * 256) for char in "bcdefgh")]
    list(map(text_stream._shorter_matches, stops))
    Text.compared = 0
    stream = text_stream.TextStream(SimpleNamespace(pieces=None, clean_up_tokenization_spaces=False), stops)
    for _ in range(1000):
        stream._release("a")
    assert Text.compared <= 3 * 1000 * len(stops) + 3 * 1000


def test_nothing_of_a_request_is_prepared_in_the_event_loop_or_the_engine_thread(running, monkeypatch):
    """Parsing, checks, templates, encoding, choices and large answers run in threads of their own."""
    seen = {}
    for owner, name in (
        (json_body, "parse"), (tokenizer_module.Tokenizer, "encode"), (tokenizer_module.Tokenizer, "decode"),
        (preparation.Preparation, "prepare"), (ChatTemplates, "render"), (constrained_decoding.Choices, "__init__"),
    ):  # fmt: skip
        names = seen.setdefault(name, set())
        watch(monkeypatch, owner, name, lambda *_, names=names, **__: names.add(threading.current_thread().name))
    monkeypatch.setattr(requests, "parse", json_body.parse)
    large = {"prompt": "the canary", "echo": True, "logprobs": 2, "choices": ["x", "y"], "max_tokens": 2}
    for path, data in (("/v1/completions", large), *((path, data) for path, (_, data) in ROUTES.items())):
        assert running.ask(path, data)[0] == 200
    assert set(seen) == {"parse", "encode", "decode", "prepare", "render", "__init__"}
    assert all(name.startswith(("prepare", "chat template")) for name in set.union(*seen.values()))


def test_full_queue_refuses_before_a_prompt_is_encoded(running, monkeypatch):
    worker = running.server.worker
    monkeypatch.setattr(tokenizer_module.Tokenizer, "encode", lambda *_: 1 / 0)
    worker.load += LIMITS.queue
    try:
        status, answer = running.ask("/v1/completions", {"prompt": "x"})
    finally:
        worker.load -= LIMITS.queue
    assert status == 429 and answer["error"]["code"] == "rate_limit_exceeded"


def test_refused_requests_leave_no_load(running):
    before = running.server.worker.load
    for fields in ({"prompt": [9999]}, {"prompt": "x", "logit_bias": {"9999": 1}}, {"prompt": [1] * 500}):
        assert running.ask("/v1/completions", {**fields, "n": 3})[0] == 400
    assert running.server.worker.load <= before + 1
