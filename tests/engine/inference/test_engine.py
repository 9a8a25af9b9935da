"""Engine: the output of a request does not depend on the batch, the chunks or the cache, bit for bit.

Mutations that these tests detect: a fully cached prompt that takes no step; cancel that leaks blocks.
"""

import copy

import pytest
import torch
from engine_runs import collect, expect_the_same, params_of, prompts

from peakgpt.engine.checkpoint.quantized.weights import load_quantized, quantize_state
from peakgpt.engine.gpt import GPT
from peakgpt.engine.inference.engine import Engine, SamplingParams
from peakgpt.engine.inference.program_executor import ProgramExecutor
from peakgpt.engine.inference.scheduler import Scheduler
from peakgpt.engine.inference.speculative import PromptLookup
from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.model.quantized_linear import Format
from peakgpt.kernels.core.dispatch import use_backend


@pytest.mark.parametrize(
    "options",
    [{}, {"budget": 9}, {"blocks": 9}, {"streams": 2}, {"blocks": 5, "budget": 30}],
    ids=["together", "chunked", "preempted", "two at a time", "cramped"],
)
def test_output_has_the_same_bits_alone_batched_chunked_and_preempted(model, options):
    expect_the_same(model, options)


@pytest.mark.parametrize(
    ("form", "cache"),
    [(None, None), (Format(8), None), (Format(4, 32), None), (Format(4, 64), None), (None, "int8")],
    ids=str,
)
def test_output_has_the_same_bits_with_quantized_weights_and_int8_cache(model, form, cache):
    """In one batch prompts are chunked, reuse prefixes and are preempted."""
    small = copy.deepcopy(model).bfloat16()
    if form:
        small = load_quantized(small, quantize_state(model.state_dict(), form), form, torch.bfloat16)
    expect_the_same(small, {"cache": cache}, tokens=30)
    expect_the_same(small, {"blocks": 9, "budget": 30, "cache": cache}, tokens=30)
    ids = prompts(1)[0] * 2
    outputs = [
        [t for o in engine.stream(ids, params_of(0)) for t in o.token_ids]
        for engine in (Engine(small, cache=cache), Engine(small, speculation=PromptLookup(), cache=cache))
    ]
    assert outputs[0] == outputs[1] and len(set(outputs[0])) > 3


def test_bit_check_detects_a_batch_dependent_rounding(model, monkeypatch):
    """Plant a relative difference of 1e-6 in steps with more than one chunk."""
    original = ProgramExecutor.step
    monkeypatch.setattr(
        ProgramExecutor, "step", lambda self, chunks: original(self, chunks) * (1.0 + (len(chunks) > 1) * 2.0**-20)
    )
    with pytest.raises(AssertionError):
        expect_the_same(model, {})


def test_bit_check_covers_preemption_and_prefix_reuse(model, monkeypatch):
    """Otherwise the bit check would prove nothing about them."""
    seen = []

    def spy(name):
        original = getattr(Scheduler, name)

        def spied(self, sequence):
            unfinished = len(sequence.token_ids) < sequence.max_length
            result = original(self, sequence)
            seen.append((name, unfinished, sequence.num_computed))
            return result

        monkeypatch.setattr(Scheduler, name, spied)

    spy("release")
    spy("_admit")
    engine = Engine(model, blocks=9)
    for i, ids in enumerate(prompts(6)):
        engine.submit(ids, params_of(i))
    collect(engine)
    assert any(name == "release" and unfinished for name, unfinished, _ in seen)
    assert any(name == "_admit" and computed == 64 for name, _, computed in seen)


def test_fully_cached_prompt_recomputes_its_last_block(model):
    """The prompt fills two blocks: the second one is recomputed, for the logits of its last token."""
    ids, engine = prompts(1, shared=127)[0], Engine(model)
    assert len(ids) == 128
    outputs = [[o.token_ids for o in engine.stream(ids, params_of(1))] for _ in range(3)]
    assert len(outputs[0]) == 60 and outputs[0] == outputs[1] == outputs[2]


def test_greedy_output_is_the_models_argmax(model):
    ids = prompts(1)[0]
    engine = Engine(model)
    tokens = [t for o in engine.stream(ids, SamplingParams(temperature=0, max_tokens=50)) for t in o.token_ids]
    reference = torch.tensor([ids])
    with torch.no_grad():
        for token in tokens:
            assert int(model(reference)[0, -1].argmax()) == token
            reference = torch.cat([reference, torch.tensor([[token]])], 1)
    assert len(set(tokens)) > 5


@pytest.mark.parametrize(("prompt", "budget", "steps"), [(20, 256, 1), (36, 40, 1), (37, 40, 2), (100, 40, 3)])
def test_first_token_comes_with_the_last_step_of_the_prompt(model, prompt, budget, steps):
    """A prompt takes the budget that four decoding sequences leave; it does not delay them."""
    engine = Engine(model, budget=budget)
    others = [engine.submit([i], params_of(0, max_tokens=60)) for i in range(4)]
    engine.step()
    late = engine.submit(prompts(1, shared=prompt - 1)[0], params_of(1))
    for step in range(1, steps + 1):
        request_ids = [output.request_id for output in engine.step() if output.token_ids]
        assert sorted(request_ids) == [*others, late][: 4 + (step == steps)], f"step {step}"


def test_cancel_frees_blocks_of_its_request_only(model):
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


def test_prompt_logprobs_are_the_models_own_from_their_first_position_on(model):
    ids = prompts(3)[2]
    with torch.no_grad():
        log_p = model(torch.tensor([ids]))[0].log_softmax(-1)[: len(ids) - 1]
    expected = log_p[range(len(ids) - 1), ids[1:]]
    engine = Engine(model, budget=50)
    for first, limit, top in ((0, 0, 1), (80, 3, 0), (len(ids) - 1, 0, 3), (len(ids), 0, 1)):
        params = SamplingParams(max_tokens=limit, prompt_logprobs=top, prompt_logprobs_start=first, logprobs=2)
        engine.submit(ids, params)
        outputs = list(engine.outputs())
        returned = [o.prompt_logprobs for o in outputs if o.prompt_logprobs]
        assert len(returned) == (first < len(ids))
        got = returned[0] if returned else ()
        start = max(first - 1, 0)
        scores = torch.tensor([lp.logprob for lp in got])
        torch.testing.assert_close(scores, expected[start:], rtol=1e-4, atol=1e-4)
        best = torch.tensor([[p for _, p in lp.top] for lp in got]).view(len(got), top)
        torch.testing.assert_close(best, log_p[start:].topk(top).values, rtol=1e-4, atol=1e-4)
        assert all(len(lp.top) == 2 for o in outputs for lp in o.logprobs)
        assert sum(len(o.token_ids) for o in outputs) == limit and outputs[-1].finish_reason == "length"


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        ([], {}, "0 prompt tokens"),
        ([1] * 299, {"max_tokens": 2}, "299 prompt tokens and max_tokens 2, .* at most block_size 300"),
        ([97], {}, "prompt has id 97, expected 0 to vocab_size 97 - 1"),
        ([1], {"stop_token_ids": (-1,)}, "stop_token_ids has id -1"),
        ([1], {"logit_bias": {100: 1.0}}, "logit_bias has id 100"),
        ([1], {"choices": ((3, 99),)}, "choices has id 99"),
        ([1], {"choices": ("yes",)}, "choice 'yes', expected token ids without a tokenizer"),
        ([1], {"stop": ("x",)}, "expected none without a tokenizer"),
        ([1], {"max_tokens": 280}, "up to 281 tokens, expected at most 256, the cache's size"),
    ],
)
def test_bad_requests_are_rejected(model, ids, options, message):
    engine = Engine(model, blocks=4)
    with pytest.raises(ValueError, match=message):
        engine.submit(ids, SamplingParams(**options))
    assert not engine.has_work


@pytest.mark.parametrize("changes", [{}, {"experts": 2}, {"position": "transformer_xl"}], ids=str)
def test_model_without_fused_kernels_runs_on_torch_ops(changes):
    torch.manual_seed(0)
    config = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=150, vocab_size=50, **changes)
    model = GPT(config).double().eval()  # no fused backend supports float64
    engine = Engine(model, budget=40)
    for i in range(3):
        engine.submit(list(range(20 * i + 1)), SamplingParams(temperature=0, max_tokens=20))
    for (request, _), (tokens, _) in collect(engine).items():
        ids = torch.arange(20 * request + 1)[None]
        with use_backend("eager"):
            assert tokens == model.generate(ids, max_new_tokens=20)[0, ids.shape[1] :].tolist()
