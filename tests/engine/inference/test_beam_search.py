"""Beam search gives transformers' sequences, on torch ops and in the C++ program.

Mutations that these tests detect: no length penalty; sequences added after the search ended; beams that share a block
that is not full.
"""

import itertools

import pytest
import torch
import transformers

import peakgpt
from peakgpt.kernels.core.dispatch import use_backend


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = peakgpt.GPT(peakgpt.GPTConfig(n_layer=2, n_head=3, n_embd=24, block_size=100, vocab_size=41)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, 0.35)
    model.save_pretrained(folder)
    return model, transformers.GPT2LMHeadModel.from_pretrained(folder).eval()


PROMPT = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 35]])


def hf_beam_search(model, count, beams, stop, penalty, early):
    return model.generate(
        PROMPT, attention_mask=torch.ones_like(PROMPT), do_sample=False, num_beams=beams, max_new_tokens=count,
        eos_token_id=list(stop) or None, pad_token_id=stop[0] if stop else 0, length_penalty=penalty,
        early_stopping=early,
    )  # fmt: skip


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_beam_search_gives_transformers_sequences(pair, backend):
    model, reference = pair
    num_beams, free = 2 if backend == "eager" else 3, hf_beam_search(reference, 12, 4, (), 1.0, False)[:, 5:]
    stops = (), (int(free[0, 6]),), (int(free[1, 4]), int(free[0, 8]), 33)  # tokens that occur in the outputs
    lengths = set()
    with use_backend(backend):
        for stop, penalty, early in itertools.product(stops, (-1.0, 0.0, 2.0), (True, False, "never")):
            if early and not stop:
                continue  # nothing ends early
            expected = hf_beam_search(reference, 12, num_beams, stop, penalty, early)
            ours = model.generate(PROMPT, max_new_tokens=12, num_beams=num_beams, eos_token_id=stop,
                                  length_penalty=penalty, early_stopping=early)  # fmt: skip
            assert torch.equal(ours, expected), (num_beams, stop, penalty, early)
            lengths.add(ours.shape[1])
    assert len(lengths) > 2, "outputs of equal length prove little"


def test_beams_longer_than_a_block_give_transformers_sequences(pair):
    model, reference = pair
    expected = hf_beam_search(reference, 90, 3, (), 1.0, False)
    assert torch.equal(model.generate(PROMPT, max_new_tokens=90, num_beams=3), expected)


def test_bad_or_ignored_options_are_rejected(pair):
    with pytest.raises(ValueError, match=r"num_beams is 0 .* expected at least 1"):
        pair[0].generate(PROMPT, num_beams=0)
    with pytest.raises(ValueError, match="early_stopping 'soon'"):
        pair[0].generate(PROMPT, num_beams=2, early_stopping="soon")
    for option in ({"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.9}):
        with pytest.raises(ValueError, match=rf"got {next(iter(option))} .* without do_sample=True"):
            pair[0].generate(PROMPT, num_beams=2, **option)
        with pytest.raises(ValueError, match=r"got do_sample=True with num_beams 2, expected one of the two"):
            pair[0].generate(PROMPT, num_beams=2, do_sample=True, **option)
    for option in ({"length_penalty": 2.0}, {"early_stopping": True}):
        with pytest.raises(ValueError, match="with num_beams 1, expected at least 2"):
            pair[0].generate(PROMPT, **option)
