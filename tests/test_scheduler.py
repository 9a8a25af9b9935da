"""The engine: each request gets the same text whatever runs beside it, in whatever pieces, with whatever cache.

Mutations seen to fail: a uniform number indexed by step, a prefix's block taken while it is being computed, a preempted
sequence that keeps `computed`, blocks not released by cancel.
"""

import pytest
import torch

from peakgpt.engine.config import GPTConfig
from peakgpt.engine.model import GPT
from peakgpt.engine.scheduler import Engine, SamplingParams


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_head=3, n_embd=24, block_size=300, vocab_size=97)).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.normal_(0.0, 0.5)
    return model


def collect(engine, finish=None):
    """(request, index) -> (tokens, log-probabilities)."""
    got = {}
    for o in engine.outputs():
        tokens, logprobs = got.setdefault((o.request, o.index), ([], []))
        tokens += o.tokens
        logprobs += [(lp.logprob, lp.top) for lp in o.logprobs or ()]
        if finish is not None and o.finish:
            finish[o.request, o.index] = o.finish
    return got


def prompts(count, shared=70):
    torch.manual_seed(1)
    start = torch.randint(97, (shared,)).tolist()
    return [start + torch.randint(97, (7 * i + 1,)).tolist() for i in range(count)]


KINDS = (
    {"temperature": 0.0},
    {"temperature": 0.8, "top_k": 5},
    {"temperature": 1.3, "top_p": 0.8, "min_p": 0.01},
    {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2, "logit_bias": {3: 2.0, 4: -9.0}},
)


def params_of(i, **changes):
    return SamplingParams(**{"max_new_tokens": 60, "seed": i, "logprobs": 2, **KINDS[i % len(KINDS)], **changes})


def alone(model, ids, params):
    engine = Engine(model, blocks=5)
    engine.submit(ids, params)
    return collect(engine)


@pytest.mark.parametrize(
    "options",
    [{}, {"budget": 9}, {"blocks": 9}, {"streams": 2}, {"blocks": 5, "budget": 30}],
    ids=["together", "chunked", "preempted", "two at a time", "cramped"],
)
def test_same_text_whatever_else_runs(model, options):
    engine = Engine(model, **options)
    asked = [(ids, params_of(i, n=1 + i % 2)) for i, ids in enumerate(prompts(6))]
    for ids, params in asked:
        engine.submit(ids, params)
    got = collect(engine)
    for i, (ids, params) in enumerate(asked):
        for (_, index), expected in alone(model, ids, params).items():
            assert got[i, index] == expected
    assert engine.pool.free_blocks == engine.pool.blocks and not any(engine.pool.uses)


def test_the_crowd_is_really_preempted_and_really_shares(model, monkeypatch):
    """Else the test above would prove nothing."""
    seen = []

    def spy(name):
        was = getattr(Engine, name)

        def spied(self, sequence):
            unfinished = len(sequence.tokens) < sequence.limit
            result = was(self, sequence)
            seen.append((name, unfinished, sequence.computed))
            return result

        monkeypatch.setattr(Engine, name, spied)

    spy("_release")
    spy("_admit")
    engine = Engine(model, blocks=9)
    for i, ids in enumerate(prompts(6)):
        engine.submit(ids, params_of(i))
    collect(engine)
    assert any(name == "_release" and unfinished for name, unfinished, _ in seen)
    assert any(name == "_admit" and computed == 64 for name, _, computed in seen)


def test_greedy_is_the_models(model):
    ids = prompts(1)[0]
    engine = Engine(model)
    tokens = [t for o in engine.stream(ids, SamplingParams(temperature=0, max_new_tokens=50)) for t in o.tokens]
    reference = torch.tensor([ids])
    with torch.no_grad():
        for token in tokens:
            assert int(model(reference)[0, -1].argmax()) == token
            reference = torch.cat([reference, torch.tensor([[token]])], 1)
    assert len(set(tokens)) > 5


def test_cancel_frees(model):
    engine = Engine(model, blocks=12)
    first, second = (engine.submit(ids, params_of(0, n=2)) for ids in prompts(2))
    for _ in range(5):
        engine.step()
    assert engine.cancel(first) and not engine.cancel(first)
    assert {key for key, _ in collect(engine).items()} == {(second, 0), (second, 1)}
    assert engine.pool.free_blocks == 12
    stream = engine.stream(prompts(1)[0], params_of(1))
    next(stream)
    with pytest.raises(ValueError, match="expected an idle one"):
        engine.stream([1], params_of(1))
    stream.close()
    assert not engine.has_work and engine.pool.free_blocks == 12


def test_prompt_logprobs(model):
    ids = prompts(3)[2]
    with torch.no_grad():
        expected = model(torch.tensor([ids]))[0].log_softmax(-1)[range(len(ids) - 1), ids[1:]]
    engine = Engine(model, budget=50)
    for first, limit in ((0, 0), (80, 3), (len(ids) - 1, 0), (len(ids), 0)):
        engine.submit(ids, SamplingParams(max_new_tokens=limit, prompt_logprobs=first, logprobs=1, temperature=0))
        outputs = list(engine.outputs())
        told = [o.prompt_logprobs for o in outputs if o.prompt_logprobs]
        got = [lp.logprob for lp in (told[0] if told else ())]
        assert len(told) == (first < len(ids))
        torch.testing.assert_close(torch.tensor(got), expected[max(first - 1, 0) :], rtol=1e-4, atol=1e-4)
        assert sum(len(o.tokens) for o in outputs) == limit and outputs[-1].finish == "length"
