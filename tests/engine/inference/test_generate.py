"""Generation: the cache against the whole forward, greedy text against transformers', sampling, stops and limits."""

import pytest
import torch
import transformers

import peakgpt
from peakgpt.engine.inference.kv_cache import KVCache
from peakgpt.engine.inference.sampling import probabilities, sample, uniforms
from peakgpt.kernels.core.dispatch import load, use_backend


def model_of(**changes):
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 3, "n_embd": 24, "block_size": 20, "vocab_size": 41, **changes}
    model = peakgpt.GPT(peakgpt.GPTConfig(**sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, 0.5)  # large, or the tied head repeats one token for ever
    return model


PROMPT = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 35]])


@pytest.mark.parametrize("backend", ["eager", "cpu", "gpu"])
@pytest.mark.parametrize("n_kv_head", [3, 1])
def test_cached_decode_equals_the_whole_forward(backend, n_kv_head):
    if backend != "eager" and isinstance(reason := load(backend, "attention"), str):
        pytest.skip(reason)
    model, ids = model_of(n_kv_head=n_kv_head), torch.randint(41, (2, 12))
    cache = KVCache(model.config, 2, 12, dtype=torch.float32, device="cpu")
    with use_backend(backend), torch.no_grad():
        whole = model(ids)
        # A prompt, a chunk of several, then one by one.
        parts = [model.compute_logits(model.hidden_states(part, cache)) for part in ids.split((6, 4, 1, 1), dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)
    assert cache.length == 12
    with pytest.raises(ValueError, match="2 sequences of 13 tokens, expected 2 of at most 12"):
        model.hidden_states(ids[:, :1], cache)


def test_greedy_text_equals_transformers(tmp_path):
    model = model_of()
    model.save_pretrained(tmp_path)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    expected = theirs.generate(
        PROMPT, attention_mask=torch.ones_like(PROMPT), do_sample=False, max_length=20, min_length=20, pad_token_id=0
    )
    ours = model.generate(PROMPT, temperature=0)
    assert torch.equal(ours, expected)
    assert len({*ours[0, 5:].tolist()}) > 3, "a text that repeats one token proves little"
    assert list(model.stream(PROMPT[:1], temperature=0)) == ours[0, 5:].tolist()


def test_seeds_decide():
    model = model_of()
    draw = [model.generate(PROMPT, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2])
    before = torch.get_rng_state()
    model.generate(PROMPT, seed=0)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(3)
    first = model.generate(PROMPT)
    torch.manual_seed(3)
    assert torch.equal(first, model.generate(PROMPT))


def test_stops_end_and_fill():
    model = model_of()
    free = model.generate(PROMPT, temperature=0)[:, 5:].tolist()
    stop = next(token for token in free[0] if token not in free[1] and token != free[0][0])
    at = free[0].index(stop)
    ours = model.generate(PROMPT, temperature=0, stop=(stop, 0))[:, 5:].tolist()
    assert ours[0][: at + 1] == free[0][: at + 1] and set(ours[0][at:]) == {stop}
    end = next((i for i, token in enumerate(free[1]) if token == 0), 14)
    assert ours[1] == free[1][: end + 1]
    alone = model.generate(PROMPT[:1], temperature=0, stop=(stop,))
    assert alone[0, 5:].tolist() == free[0][: at + 1]
    assert list(model.stream(PROMPT[:1], temperature=0, stop=(stop,))) == free[0][:at]


def test_training_mode_does_not_matter():
    model = model_of(dropout=0.5)
    expected = model.generate(PROMPT, temperature=0)
    assert torch.equal(model.train().generate(PROMPT, temperature=0), expected) and model.training


def test_int32_and_limits():
    model = model_of()
    assert model.generate(PROMPT.int(), max_new_tokens=3).dtype == torch.int32
    assert torch.equal(model.generate(PROMPT, max_new_tokens=0), PROMPT)
    assert model.generate(PROMPT).shape == (2, 20)
    bad = [
        ({"max_new_tokens": 16}, "5 prompt tokens and max_new_tokens 16, expected at most block_size 20"),
        ({"max_new_tokens": -1}, "max_tokens is -1, expected at least 0"),
        ({"max_new_tokens": "4"}, "max_tokens is '4', expected at least 0"),
        ({"temperature": -1.0}, r"temperature is -1.0, expected 0 \(greedy\) or at least 0.001"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0, expected at least 1"),
        ({"top_p": 0.0}, "top_p is 0.0, expected 1e-06 <= top_p <= 1"),
    ]
    for options, message in bad:
        with pytest.raises(ValueError, match=message):
            model.generate(PROMPT, **options)
        with pytest.raises(ValueError, match=message):
            model.stream(PROMPT[:1], **options)  # at the call, not at the first token
    for name in ("max_tokens", "min_p"):  # no option at all; one that only the Engine has
        for who in (model.generate, model.stream):
            with pytest.raises(TypeError, match=rf"{who.__name__}: got option '{name}', expected max_new_tokens, temp"):
                who(PROMPT[:1], **{name: 1})
    with pytest.raises(TypeError, match=r"got option 'beam', expected .*, beams, "):
        model.generate(PROMPT, beam=2)
    with pytest.raises(ValueError, match=r"shape \(2, 0\), expected \(B, T\) with at least one token"):
        model.generate(PROMPT[:, :0])
    for ids, said in (([[1, 2]], r"\[\[1, 2\]\]"), ("text", "'text'")):
        for who in (model.generate, lambda ids: model.generate(ids, beams=2), model.stream):
            with pytest.raises(ValueError, match=rf"ids is {said}, expected a Tensor"):
                who(ids)
    with pytest.raises(ValueError, match=r"start is \[0, 1\], expected a Tensor"):
        model.generate(PROMPT, start=[0, 1])
    with pytest.raises(ValueError, match=r"stream: ids have shape \(2, 5\), expected \(1, T\)"):
        model.stream(PROMPT)


LOGITS = torch.tensor([[2.0, 0.0, 1.0, -1.0], [0.0, 3.0, -0.5, -0.5]])


def dense(p, ids):
    return p if ids is None else torch.zeros(len(p), 4).scatter_(-1, ids, p)


def test_probabilities():
    def reference(row, temperature, kept):
        p = torch.softmax(row / temperature, -1) * torch.tensor([i in kept for i in range(4)])
        return p / p.sum()

    cases = [
        ((1.0, None, None), (range(4), range(4))),
        ((0.5, 2, None), ((0, 2), (0, 1))),
        ((1.0, None, 0.7), ((0, 2), (1,))),  # 0.64 does not reach 0.7, 0.64 + 0.24 does
        ((1.0, None, 1.0), (range(4), range(4))),
        ((1.0, 3, 0.01), ((0,), (1,))),
        ((2.0, 9, None), (range(4), range(4))),
    ]
    for arguments, kept in cases:
        got = dense(*probabilities(LOGITS, *arguments))
        expected = torch.stack([reference(row, arguments[0], k) for row, k in zip(LOGITS, kept, strict=True)])
        torch.testing.assert_close(got / got.sum(-1, keepdim=True), expected)


def test_samples_follow_the_probabilities():
    count = 20000
    p = dense(*probabilities(LOGITS[:1]))[0]
    for options in ({}, {"top_k": 4}):
        tokens = sample(LOGITS[:1].expand(count, -1), **options, u=uniforms(5, 0, 0, count))
        share = tokens.bincount(minlength=4) / count
        assert ((share - p).abs() < 4 * (p * (1 - p) / count).sqrt()).all()
