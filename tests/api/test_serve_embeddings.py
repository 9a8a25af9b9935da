"""/v1/embeddings, called by the client of OpenAI and by plain HTTP: vectors, their formats, limits and errors."""

import base64
import dataclasses
import threading

import numpy as np
import pytest
import serving  # skips all where the packages of peakgpt[serve] are missing
import torch
from serving import Running

from peakgpt.engine.inference.engine import Engine

TEXTS = ["the canary", "a song", "the canary sings a song"]


@pytest.fixture(scope="module")
def tokenizer():
    return serving.tiny_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return serving.tiny_model(tokenizer)


@pytest.fixture(scope="module")
def running(model, tokenizer):
    with Running(model, tokenizer, limits=dataclasses.replace(serving.LIMITS_HERE, inputs=8)) as running:
        yield running


@pytest.fixture(scope="module")
def expected(model, tokenizer):
    return Engine(model, tokenizer, blocks=40).embed(TEXTS)


def ask(running, **data):
    return running.ask("/v1/embeddings", data)


@pytest.mark.parametrize("options", [{}, {"encoding_format": "float"}, {"encoding_format": "base64"}])
def test_the_client_of_openai_gets_the_vectors(options, running, tokenizer, expected):
    client = running.openai_client()
    ids = [tokenizer.encode(text) for text in TEXTS]
    for given, rows in ((TEXTS, expected), (ids, expected), (TEXTS[0], expected[:1]), (ids[0], expected[:1])):
        answer = client.embeddings.create(model="tiny", input=given, **options)
        assert answer.object == "list" and answer.model == "tiny"
        assert [entry.index for entry in answer.data] == list(range(len(rows)))
        vectors = [entry.embedding for entry in answer.data]
        if options.get("encoding_format") == "base64":  # the client decodes only what it did not ask for
            vectors = [np.frombuffer(base64.b64decode(vector), "<f4") for vector in vectors]
        assert torch.equal(torch.tensor(np.array(vectors, dtype=np.float32)), rows)
        count = sum(map(len, ids[: len(rows)]))
        assert answer.usage.prompt_tokens == answer.usage.total_tokens == count


def test_pooling_and_length(running, model, tokenizer):
    status, answer = ask(running, input=TEXTS, pooling="mean", normalize=False)
    vectors = torch.tensor([entry["embedding"] for entry in answer["data"]])
    engine = Engine(model, tokenizer, blocks=40)
    assert status == 200 and torch.equal(vectors, engine.embed(TEXTS, pooling="mean", normalize=False))


def test_embeddings_beside_completions_have_the_same_bits(running, expected):
    completion = {"prompt": "the canary", "max_tokens": 60, "temperature": 0, "logprobs": 1}
    _, alone = running.ask("/v1/completions", completion)
    results = []
    threads = [threading.Thread(target=lambda: results.append(running.ask("/v1/completions", completion)))]
    threads += [threading.Thread(target=lambda: results.append(ask(running, input=TEXTS))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(status == 200 for status, _ in results)
    for _, answer in results:
        if answer["object"] == "list":
            assert torch.equal(torch.tensor([entry["embedding"] for entry in answer["data"]]), expected)
        else:
            assert answer["choices"] == alone["choices"]
    assert running.idle() == 40


@pytest.mark.parametrize(
    ("fields", "param", "code", "text"),
    [
        ({}, "input", "missing_required_parameter", "got none"),
        ({"input": ""}, "input", "invalid_value", "got a text without tokens"),
        ({"input": ["a", ""]}, "input", "invalid_value", "got a text without tokens"),
        ({"input": []}, "input", "invalid_value", "expected strings, or lists of 1 to"),
        ({"input": [[]]}, "input", "invalid_value", "expected strings, or lists of 1 to"),
        ({"input": [1, "a"]}, "input", "invalid_value", "expected strings, or lists of 1 to"),
        ({"input": [[1, True]]}, "input", "invalid_value", "expected strings, or lists of 1 to"),
        ({"input": 1}, "input", "invalid_value", "expected strings, or lists of 1 to"),
        ({"input": ["a"] * 9}, "input", "invalid_value", "expected up to 8 prompts"),
        ({"input": [[10**6]]}, "input", "invalid_value", "got ids from 1000000"),
        ({"input": [[1] * 129]}, "input", "context_length_exceeded", "maximum context length is 128 tokens"),
        ({"input": "a " * 6_000}, "input", "context_length_exceeded", "characters, expected up to"),
        ({"input": "a", "dimensions": 4}, "dimensions", "unsupported_parameter", "one width"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format", "invalid_value", "expected one of float, base64"),
        ({"input": "a", "pooling": "max"}, "pooling", "invalid_value", "expected one of last, mean"),
        ({"input": "a", "normalize": 1}, "normalize", "invalid_value", "expected true or false"),
        ({"input": "a", "n": 2}, "n", "unknown_parameter", "expected one of model, input"),
        ({"input": "a", "model": "gpt-9"}, "model", "model_not_found", "expected 'tiny'"),
    ],
    ids=lambda v: str(v)[:30],
)
def test_bad_input_names_the_field(fields, param, code, text, running):
    status, answer = ask(running, **fields)
    error = answer["error"]
    assert status in (400, 404) and (error["param"], error["code"]) == (param, code) and text in error["message"], error
    assert running.idle() == 40


def test_a_full_queue_is_refused(model, tokenizer):
    with Running(model, tokenizer, limits=dataclasses.replace(serving.LIMITS_HERE, queue=2)) as running:
        status, answer = ask(running, input=TEXTS)
        assert status == 429 and answer["error"]["code"] == "rate_limit_exceeded"
        assert ask(running, input=TEXTS[:2])[0] == 200
