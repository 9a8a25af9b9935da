"""Runs of the inference engine: prompts, parameters, and the outputs of a request alone and in a batch."""

import torch

from peakgpt.engine.gpt import GPT
from peakgpt.engine.inference.engine import Engine, SamplingParams


def collect(engine, finish=None):
    """(request, index) -> (tokens, log-probabilities)."""
    got = {}
    for o in engine.outputs():
        tokens, logprobs = got.setdefault((o.request_id, o.index), ([], []))
        tokens += o.token_ids
        logprobs += [(lp.logprob, lp.top) for lp in o.logprobs or ()]
        if finish is not None and o.finish_reason:
            finish[o.request_id, o.index] = o.finish_reason
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
    return SamplingParams(**{"max_tokens": 60, "seed": i, "logprobs": 2, **KINDS[i % len(KINDS)], **changes})


def alone(model, ids, params, cache=None):
    key = (id(model), tuple(ids), params.seed, params.max_tokens, params.n, cache)
    if key not in ALONE:
        engine = Engine(model, blocks=5, cache=cache)
        engine.submit(ids, params)
        ALONE[key] = model, {index: got for (_, index), got in collect(engine).items()}
    return ALONE[key][1]


ALONE: dict[tuple, tuple[GPT, dict]] = {}  # the entry keeps its model alive, so that no other model gets its id


def expect_the_same(model, options, tokens=60):
    """Check that each output of a batch, log-probabilities included, has the bits of the same request alone."""
    engine = Engine(model, **options)
    assert not engine.executor_note
    requests = [(ids, params_of(i, n=1 + i % 2, max_tokens=tokens)) for i, ids in enumerate(prompts(6, shared=150))]
    for ids, params in requests:
        engine.submit(ids, params)
    got = collect(engine)
    for i, (ids, params) in enumerate(requests):
        for index, expected in alone(model, ids, params, options.get("cache")).items():
            assert got[i, index] == expected
    assert engine.pool.free_blocks == engine.pool.num_blocks and not any(engine.pool.ref_counts)
