"""Choices, stop strings, stop ids, and ids without a token in the output of the engine."""

import pytest
import torch
from engine_runs import KINDS, collect, params_of

from peakgpt.engine.data.tokenizer import Tokenizer
from peakgpt.engine.data.tokenizer_training import train_tokenizer
from peakgpt.engine.gpt import GPT
from peakgpt.engine.inference.engine import Engine, SamplingParams
from peakgpt.engine.inference.speculative import PromptLookup
from peakgpt.engine.inference.text_stream import TextStream
from peakgpt.engine.model.config import GPTConfig


def test_choices_constrain_the_output(model):
    engine = Engine(model)
    choices = [(5, 6, 7), (5, 6, 8), (9,), (9, 4)]
    seen = set()
    for seed in range(40):
        params = SamplingParams(choices=choices, stop_token_ids=(0,), seed=seed, temperature=30.0)
        tokens = tuple(t for o in engine.stream([1, 2, 3], params) for t in o.token_ids)
        seen.add(tokens)
    assert seen == {(5, 6, 7), (5, 6, 8), (9, 0), (9, 4)}
    # Choices of one token: the most likely token is chosen.
    with torch.no_grad():
        logits = model(torch.tensor([[1, 2, 3]]))[0, -1]
    (out,) = engine.stream([1, 2, 3], SamplingParams(choices=[(t,) for t in (11, 12, 13)], temperature=0))
    assert out.token_ids[0] == 11 + int(logits[11:14].argmax()) and out.finish_reason == "stop"
    with pytest.raises(ValueError, match="is a prefix of another"):
        engine.submit([1], SamplingParams(choices=[(5,), (5, 6)]))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["der Bär läuft über die Brücke, 日本語もある " * 20], 300)


def test_text_stops_before_a_stop_string_that_spans_tokens(tokenizer: Tokenizer):
    text = "über die Brücke läuft der Bär 日本語"
    cases = (((), text), (("Brücke",), "über die "), (("ke l", "Bär"), "über die Brüc"), (("nie", "語も"), text),
             (("ä", "Brücken"), "über die Brücke l"), (("ü",), ""))  # fmt: skip
    for stops, expected in cases:
        stream, shown = TextStream(tokenizer, stops), ""
        for token in tokenizer.encode(text):
            shown += stream.feed(token)
            assert expected.startswith(shown), "text that was returned cannot be taken back"
            if stream.stopped_by:
                break
        shown += "" if stream.stopped_by else stream.finish()
        assert shown == expected and bool(stream.stopped_by) == (expected != text)


def test_stop_strings_stop_ids_and_choices_end_the_text(model, tokenizer):
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 200}
    wide = GPT(GPTConfig(**sizes, vocab_size=tokenizer.vocab_size)).eval()
    engine = Engine(wide, tokenizer)
    ids, params = tokenizer.encode("der Bär"), {"seed": 5, "max_tokens": 60}
    outputs = list(engine.stream(ids, SamplingParams(**params)))
    whole = tokenizer.decode([t for o in outputs for t in o.token_ids])
    assert "".join(o.text for o in outputs) == whole and outputs[-1].finish_reason == "length"
    stop = next(whole[i : i + 3] for i in range(20, 60) if whole[i : i + 3] not in whole[: i + 2])
    outputs = list(engine.stream(ids, SamplingParams(**params, stop=("never there", stop))))
    assert "".join(o.text for o in outputs) == whole[: whole.index(stop)]
    assert outputs[-1].finish_reason == "stop" and outputs[-1].stop_reason == stop
    token = outputs[3].token_ids[0]
    outputs = list(engine.stream(ids, SamplingParams(**params, stop_token_ids=(token,))))
    assert outputs[-1].stop_reason == outputs[-1].token_ids[-1] == token and outputs[-1].finish_reason == "stop"
    params = SamplingParams(choices=["über", "日本"], temperature=0)
    assert "".join(o.text for o in engine.stream(ids, params)) in ("über", "日本")


def test_token_outside_the_tokenizer_is_empty_text(tokenizer):
    """The vocabulary of a model may be padded; transformers decodes such ids to nothing."""
    size = tokenizer.vocab_size
    stream = TextStream(tokenizer)
    assert stream.feed(size) + stream.feed(tokenizer.encode("a")[0]) + stream.feed(size) + stream.finish() == "a"


@pytest.fixture(scope="module")
def padded(tokenizer):
    """A model with as many padded ids as tokens."""
    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 128}
    model = GPT(GPTConfig(**sizes, vocab_size=2 * tokenizer.vocab_size)).eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("kind", range(len(KINDS)))
@pytest.mark.parametrize("speculation", [None, PromptLookup])
def test_padded_id_is_not_sampled(padded, tokenizer, kind, speculation):
    """For every kind of sampling; the log-probabilities are those of the model."""
    prompt, size = tokenizer.encode("der Bär der Bär"), tokenizer.vocab_size
    params = params_of(kind, n=2)
    engine = Engine(padded, tokenizer, speculation=speculation and speculation())
    engine.submit(prompt, params)
    free = Engine(padded)
    free.submit(prompt, params)
    got, without = collect(engine), collect(free)
    assert all(token < size for tokens, _ in got.values() for token in tokens)
    assert any(token >= size for tokens, _ in without.values() for token in tokens)  # library users choose themselves
    for key, (_, logprobs) in got.items():
        assert logprobs[0][1] == without[key][1][0][1]


def test_padded_id_is_sampled_if_a_request_asks_for_it(padded, tokenizer):
    """By its bias or its choices; other requests of the same step are not changed."""
    prompt, token = tokenizer.encode("der Bär"), tokenizer.vocab_size + 3
    engine = Engine(padded, tokenizer)
    biased = engine.submit(prompt, SamplingParams(max_tokens=4, temperature=0, logit_bias={token: 100.0}))
    chosen = engine.submit(prompt, SamplingParams(max_tokens=4, choices=((token, token),), seed=0))
    plain = engine.submit(prompt, SamplingParams(max_tokens=4, seed=0))
    got = collect(engine)
    assert got[biased, 0][0] == [token] * 4 and got[chosen, 0][0] == [token] * 2
    assert max(got[plain, 0][0]) < tokenizer.vocab_size
