"""GPT.generate and GPT.stream: cached against uncached logits, greedy output against transformers, sampling, limits."""

import pytest
import torch
import transformers

import peakgpt
from peakgpt.engine.inference.kv_cache import ContiguousKVCache
from peakgpt.engine.inference.sampling import probabilities, sample, uniforms
from peakgpt.kernels.core.dispatch import load, use_backend


def model_of(**changes):
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 3, "n_embd": 24, "block_size": 20, "vocab_size": 41, **changes}
    model = peakgpt.GPT(peakgpt.GPTConfig(**sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, 0.5)  # large, since with small weights the tied head repeats one token
    return model


PROMPT = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 35]])


@pytest.mark.parametrize("backend", ["eager", "cpu", "gpu"])
@pytest.mark.parametrize("n_kv_head", [3, 1])
def test_cached_logits_equal_one_forward_pass(backend, n_kv_head):
    if backend != "eager" and isinstance(reason := load(backend, "attention"), str):
        pytest.skip(reason)
    model, ids = model_of(n_kv_head=n_kv_head), torch.randint(41, (2, 12))
    cache = ContiguousKVCache(model.config, 2, 12, dtype=torch.float32, device="cpu")
    with use_backend(backend), torch.no_grad():
        whole = model(ids)
        # A prompt, a chunk of several, then one by one.
        parts = [model.compute_logits(model.hidden_states(part, cache)) for part in ids.split((6, 4, 1, 1), dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)
    assert cache.length == 12
    with pytest.raises(ValueError, match="2 sequences of 13 tokens, expected 2 of at most 12"):
        model.hidden_states(ids[:, :1], cache)


def test_greedy_output_equals_transformers(tmp_path):
    model = model_of()
    model.save_pretrained(tmp_path)
    hf_model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    expected = hf_model.generate(
        PROMPT, attention_mask=torch.ones_like(PROMPT), do_sample=False, max_length=20, min_length=20, pad_token_id=0
    )
    ours = model.generate(PROMPT)
    assert torch.equal(ours, expected)
    assert len({*ours[0, 5:].tolist()}) > 3, "an output that repeats one token proves little"
    assert list(model.stream(PROMPT[:1])) == ours[0, 5:].tolist()


def test_same_seed_gives_the_same_sample():
    model = model_of()
    draw = [model.generate(PROMPT, do_sample=True, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2])
    before = torch.get_rng_state()
    model.generate(PROMPT, do_sample=True, seed=0)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(3)
    first = model.generate(PROMPT, do_sample=True)
    torch.manual_seed(3)
    assert torch.equal(first, model.generate(PROMPT, do_sample=True))


def test_eos_ends_a_sequence_and_pads_it():
    model = model_of()
    free = model.generate(PROMPT)[:, 5:].tolist()
    stop = next(token for token in free[0] if token not in free[1] and token != free[0][0])
    stop_position = free[0].index(stop)
    ours = model.generate(PROMPT, eos_token_id=(stop, 0))[:, 5:].tolist()
    assert ours[0][: stop_position + 1] == free[0][: stop_position + 1] and set(ours[0][stop_position:]) == {stop}
    end = next((i for i, token in enumerate(free[1]) if token == 0), 14)
    assert ours[1] == free[1][: end + 1]
    alone = model.generate(PROMPT[:1], eos_token_id=(stop,))
    assert alone[0, 5:].tolist() == free[0][: stop_position + 1]
    assert list(model.stream(PROMPT[:1], eos_token_id=(stop,))) == free[0][:stop_position]


def test_generate_in_training_mode_drops_nothing_out():
    model = model_of(dropout=0.5)
    expected = model.generate(PROMPT)
    assert torch.equal(model.train().generate(PROMPT), expected) and model.training


def test_int32_ids_and_bad_arguments():
    model = model_of()
    assert model.generate(PROMPT.int(), max_new_tokens=3).dtype == torch.int32
    assert torch.equal(model.generate(PROMPT, max_new_tokens=0), PROMPT)
    assert model.generate(PROMPT).shape == (2, 20)
    bad = [
        ({"max_new_tokens": 16}, "5 prompt tokens and max_new_tokens 16, expected at most block_size 20"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1, expected at least 0"),
        ({"max_new_tokens": "4"}, "max_new_tokens is '4', expected at least 0"),
        ({"do_sample": True, "temperature": -1.0}, r"temperature is -1.0, expected 0 \(greedy\) or at least 0.001"),
        ({"do_sample": True, "temperature": float("nan")}, "temperature is nan"),
        ({"do_sample": True, "temperature": 0.0}, "got temperature 0 with do_sample=True, expected do_sample=False"),
        ({"do_sample": True, "top_k": -1}, "top_k is -1, expected at least 1"),
        ({"do_sample": True, "top_p": 0.0}, "top_p is 0.0, expected 1e-06 <= top_p <= 1"),
        *(({name: value}, f"got {name} {value} without do_sample=True, expected both or neither")
          for name, value in (("temperature", 0.7), ("top_k", 5), ("top_p", 0.9), ("min_p", 0.1), ("seed", 0))),
    ]  # fmt: skip
    for options, message in bad:
        with pytest.raises(ValueError, match=message):
            model.generate(PROMPT, **options)
        with pytest.raises(ValueError, match=message):
            model.stream(PROMPT[:1], **options)  # at the call, not at the first token
    for name in ("max_tokens", "presence_penalty", "beams"):  # unknown options; one that only the Engine has
        for method in (model.generate, model.stream):
            with pytest.raises(TypeError, match=rf"{method.__name__}\(\) got an unexpected keyword argument '{name}'"):
                method(PROMPT[:1], **{name: 1})
    with pytest.raises(ValueError, match=r"shape \(2, 0\), expected \(B, T\) with at least one token"):
        model.generate(PROMPT[:, :0])
    for ids, shown in (([[1, 2]], r"\[\[1, 2\]\]"), ("text", "'text'")):
        for method in (model.generate, lambda ids: model.generate(ids, num_beams=2), model.stream):
            with pytest.raises(ValueError, match=rf"input_ids is {shown}, expected a Tensor"):
                method(ids)
    with pytest.raises(ValueError, match=r"attention_mask: got \[0, 1\], expected the shape"):
        model.generate(PROMPT, [0, 1])
    with pytest.raises(ValueError, match=r"stream: input_ids have shape \(2, 5\), expected \(1, T\)"):
        model.stream(PROMPT)


def test_pad_token_fills_a_sequence_after_its_eos_token():
    model = model_of()
    free = model.generate(PROMPT)[:, 5:].tolist()
    eos = next(token for token in free[0] if token not in free[1])
    end = free[0].index(eos) + 1
    got = model.generate(PROMPT, eos_token_id=eos, pad_token_id=40)[:, 5:].tolist()
    assert got == [free[0][:end] + [40] * (15 - end), free[1]]
    assert model.generate(PROMPT, eos_token_id=[eos])[:, 5:].tolist() == [free[0][:end] + [eos] * (15 - end), free[1]]


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
