"""Texts, tokens and offsets of answers: characters of several tokens, and ids that only the model has."""

import json

import pytest
import torch
from serving import Running, with_chat  # skips all where the packages of peakgpt[serve] are missing

from peakgpt.engine.data.tokenizer_training import train_tokenizer
from peakgpt.engine.gpt import GPT
from peakgpt.engine.inference.engine import Engine, SamplingParams
from peakgpt.engine.model.config import GPTConfig

PADDING = 40
TEXTS = ["the € cat", "日本語 text", "é", "👩‍👩‍👧 family", "a\u0301b", "\x00 \ufffd x", "<|endoftext|>x", "\n\n  two",
         "ﬀ ǆ Ω", "\U0001d4b3"]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the cat sat on the mat"], 270)


@pytest.fixture(scope="module")
def model(tokenizer):
    """A model with more rows than the tokenizer has tokens, which by itself always chooses one of these rows."""
    torch.manual_seed(0)
    vocab_size = tokenizer.vocab_size + PADDING
    model = GPT(GPTConfig(n_layer=1, n_embd=16, n_head=2, block_size=256, vocab_size=vocab_size)).eval()
    with torch.no_grad():
        model.transformer.ln_f.bias.fill_(1.0)
        model.transformer.wte.weight[tokenizer.vocab_size :] += 3.0
    return model


@pytest.fixture(scope="module")
def running(model, tokenizer):
    with Running(model, with_chat(tokenizer, "{{ messages[0].content }}")) as running:
        yield running


def parts(running, data, path="/v1/completions"):
    """Return the whole choice, and the parts of the streamed one."""
    status, answer = running.ask(path, data)
    assert status == 200, answer
    events = running.ask(path, {**data, "stream": True})[1]
    events = [json.loads(line[6:]) for line in events.splitlines() if line.startswith("data: {")]
    return answer["choices"][0], [event["choices"][0] for event in events]


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("logprobs", [None, 0, 20])
@pytest.mark.parametrize("echo", [False, True])
def test_ids_beyond_the_tokenizer_are_empty_text_and_sampled_only_if_asked(
    running, tokenizer, temperature, logprobs, echo, asked
):
    bias = {str(tokenizer.vocab_size + 3): 100} if asked else {str(tokenizer.vocab_size + 3): -1, "5": 1}
    data = {
        "prompt": "the cat",
        "max_tokens": 4,
        "temperature": temperature,
        "seed": 0,
        "logit_bias": bias,
        "echo": echo,
    }
    data |= {} if logprobs is None else {"logprobs": logprobs}
    whole, streamed = parts(running, data)
    assert whole["text"] == "".join(part["text"] for part in streamed)
    assert (whole["text"] == ("the cat" if echo else "")) == asked
    if logprobs is not None:
        tokens = whole["logprobs"]["tokens"][-4:]
        assert (tokens == [f"<{tokenizer.vocab_size + 3}>"] * 4) == asked
        assert asked or not any(token.startswith(("<2", "<3")) for token in tokens)
        top = whole["logprobs"]["top_logprobs"][-1]
        assert logprobs < 20 or sum(token.startswith("<") for token in top) >= 19  # they are the model's favorites


def test_chat_shows_ids_beyond_the_tokenizer(running, tokenizer):
    data = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2, "logprobs": True, "top_logprobs": 20}
    whole, streamed = parts(running, {**data, "logit_bias": {str(tokenizer.vocab_size): 100}}, "/v1/chat/completions")
    entries = whole["logprobs"]["content"]
    assert [entry["token"] for entry in entries] == [f"<{tokenizer.vocab_size}>"] * 2 and entries[0]["bytes"] == []
    assert whole["message"]["content"] == "" and len(streamed) >= 2


def test_hidden_ids_do_not_change_log_probabilities(model, tokenizer):
    """They come from the model's own distribution, also in a batch with requests that ask for such an id."""
    engine, asked = Engine(model, tokenizer, blocks=16), tokenizer.vocab_size + 1
    alone = [one.logprobs[0] for one in engine.stream([5], SamplingParams(max_tokens=3, temperature=0, logprobs=3))]
    engine.submit([5], SamplingParams(max_tokens=3, temperature=0, logprobs=3))
    engine.submit([5], SamplingParams(max_tokens=3, temperature=0, logit_bias={asked: 100}, logprobs=0))
    outputs = list(engine.outputs())
    assert [one.logprobs[0] for one in outputs if one.request_id == 1] == alone
    assert {one.token_ids[0] for one in outputs if one.request_id == 2} == {asked}
    assert all(token >= tokenizer.vocab_size for token, _ in alone[0].top) and alone[0].token < tokenizer.vocab_size


@pytest.mark.parametrize("text", TEXTS)
def test_offsets_are_where_tokens_begin_in_the_returned_text(running, text):
    for data in ({"max_tokens": 0}, {"max_tokens": 3, "n": 2}, {"max_tokens": 3, "stop": ["a", "zz"]}):
        whole, streamed = parts(running, {"prompt": text, "echo": True, "logprobs": 1, "seed": 1, **data, "n": 1})
        for got, told in ((whole["text"], whole["logprobs"]), ("".join(p["text"] for p in streamed), joined(streamed))):
            assert got.startswith(text) and told["text_offset"] == sorted(told["text_offset"])
            for token, at in zip(told["tokens"], told["text_offset"], strict=True):
                if at < len(got) and not token.startswith(("bytes:", "<2", "<3")):
                    assert got[at : at + len(token)] == token[: len(got) - at]


def joined(streamed):
    columns = [part["logprobs"] for part in streamed if part["logprobs"]]
    return {name: [value for column in columns for value in column[name]] for name in columns[0]}


@pytest.mark.parametrize("text", ["€", "é", "日", "👩", "x€"])
def test_no_seam_splits_a_character(running, tokenizer, text):
    """A prompt of ids that ends inside a character, for each such cut; the completion is its last byte."""
    ids = tokenizer.encode(text)
    data = {"prompt": ids[:-1], "max_tokens": 1, "temperature": 0, "logit_bias": {str(ids[-1]): 100}, "logprobs": 0}
    whole, streamed = parts(running, {**data, "echo": True})
    assert whole["text"] == text == "".join(part["text"] for part in streamed)
    assert all("\ufffd" not in part["text"] for part in streamed)
    whole, streamed = parts(running, data)
    assert whole["text"] == text[-1] == "".join(part["text"] for part in streamed)
    assert whole["logprobs"]["text_offset"] == [0]
    whole, _ = parts(running, {"prompt": ids[:-1], "max_tokens": 0, "echo": True})
    assert whole["text"] == tokenizer.decode(ids[:-1])


def test_random_texts_and_cuts_have_whole_offsets(running, tokenizer):
    """Echo of any ids, also of those that are no UTF-8, is their decoded text, and offsets lie in it."""
    given = pytest.importorskip("hypothesis", reason="hypothesis is not installed")
    from hypothesis import strategies as st

    @given.settings(max_examples=60, deadline=None, database=None)
    @given.given(st.text(min_size=1, max_size=9).map(tokenizer.encode) | st.lists(st.integers(0, 269), min_size=1))
    def one(ids):
        ids = [token for token in ids if token < tokenizer.vocab_size][:100] or [5]
        data = {"prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 0}
        choice = running.ask("/v1/completions", data)[1]["choices"][0]
        told, text = choice["logprobs"], tokenizer.decode(ids)
        assert choice["text"] == text
        for token, at in zip(told["tokens"], told["text_offset"], strict=True):
            assert token.startswith("bytes:") or text[at : at + len(token)] == token

    one()
