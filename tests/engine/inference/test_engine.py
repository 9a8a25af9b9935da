"""Engine: the output of a request does not depend on the batch, the chunks or the cache, bit for bit.

Mutations that these tests detect: one uniform number for a whole draft; a fully cached prompt that takes no step;
cancel that leaks blocks; an error in sampling one row that ends the whole step.
"""

import copy

import pytest
import torch

from peakgpt.engine.checkpoint.quantized_weights import load_quantized, quantize_state
from peakgpt.engine.data.tokenizer import Tokenizer
from peakgpt.engine.data.tokenizer_training import train_tokenizer
from peakgpt.engine.gpt import GPT
from peakgpt.engine.inference.engine import Engine, SamplingParams
from peakgpt.engine.inference.program_executor import ProgramExecutor
from peakgpt.engine.inference.scheduler import Scheduler
from peakgpt.engine.inference.speculative import DraftModel, PromptLookup
from peakgpt.engine.inference.text_stream import TextStream
from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.model.quantized_linear import Format
from peakgpt.kernels.core.dispatch import use_backend


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


class Failing:
    """A part of a sequence that raises on every use."""

    def __getattr__(self, name):
        raise RuntimeError("planted")

    def __getitem__(self, index):
        raise RuntimeError("planted")


def crowd(engine, count=5):
    for i, ids in enumerate(prompts(count)):
        engine.submit(ids, params_of(i, max_tokens=12))
    return {s.request.request_id: s for s in engine.scheduler.waiting}


def expect_one_ended(model, engine, failed):
    """Check that all sequences except `failed` have the output that they have alone; return the error."""
    outputs = list(engine.outputs())
    (ended,) = (o for o in outputs if o.error)
    assert ended.request_id == failed and ended.finish_reason == "error" and not engine.has_work
    for i, ids in enumerate(prompts(5)):
        if i != failed:
            parts = [list(o.token_ids) for o in outputs if o.request_id == i]
            assert [t for part in parts for t in part] == alone(model, ids, params_of(i, max_tokens=12))[0][0]
    assert engine.pool.free_blocks == engine.pool.num_blocks and not any(engine.pool.ref_counts)
    return ended.error


@pytest.mark.parametrize("part", ["uniforms", "choices", "text_stream"])
def test_error_in_one_sequence_ends_only_that_sequence(model, part):
    engine = Engine(model)
    setattr(crowd(engine)[1], part, Failing())
    assert "planted" in str(expect_one_ended(model, engine, 1))
    with pytest.raises(RuntimeError, match="planted"):
        stream = engine.stream([1, 2, 3], params_of(1))
        setattr(engine.scheduler.waiting[0], part, Failing())
        list(stream)
    assert len(list(engine.stream([1, 2, 3], params_of(1)))) == 60, "the engine continues"


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("failed", range(len(KINDS)), ids=["greedy", "top_k", "top_p", "whole"])
def test_nan_or_inf_logits_end_only_their_sequence(model, failed, value, monkeypatch):
    """Plant the value in one logit or in all logits of a row, after some output tokens."""
    for where in (50, slice(None)):
        engine = Engine(model)
        original = engine.executor.step
        crowd(engine)

        def with_bad_logits(chunks, engine=engine, original=original, where=where):
            logits = original(chunks)
            owners = {id(s.block_table): s for s in engine.scheduler.running}
            for i, sequence in enumerate(owners[id(chunk.block_table)] for chunk in chunks):
                output = len(sequence.token_ids) - sequence.num_prompt
                if sequence.request.request_id == failed and output > 4 and len(logits) == 5:
                    logits[i, where] = float(value)
            return logits

        monkeypatch.setattr(engine.executor, "step", with_bad_logits)
        error = expect_one_ended(model, engine, failed)
        assert isinstance(error, ArithmeticError) and "are not finite" in str(error)


def test_failed_step_ends_only_sequences_that_fail_alone(model, monkeypatch):
    engine = Engine(model)
    original, batch_sizes = engine.executor.step, []
    sequences = crowd(engine)

    def failing(chunks):
        batch_sizes.append(len(chunks))
        if any(chunk.block_table is sequences[2].block_table and chunk.past > 80 for chunk in chunks):
            raise MemoryError("planted")
        return original(chunks)

    monkeypatch.setattr(engine.executor, "step", failing)
    assert isinstance(expect_one_ended(model, engine, 2), MemoryError)
    assert batch_sizes[-1] > 1, "the other sequences run in one batch again"
    crowd(engine)
    monkeypatch.setattr(engine.executor, "step", lambda chunks: original(chunks) if len(chunks) == 1 else 1 / 0)
    assert not any(o.error for o in engine.outputs()), "a failure of the batch alone ends no sequence"


def test_failed_speculation_is_disabled_and_output_is_unchanged(model):
    class Broken(PromptLookup):
        def propose(self, requests):
            raise RuntimeError("planted")

    ids, params = prompts(1)[0], params_of(0)
    expected = [t for o in Engine(model).stream(ids, params) for t in o.token_ids]
    with pytest.warns(UserWarning, match="without speculation, which failed: RuntimeError"):
        assert [t for o in Engine(model, speculation=Broken()).stream(ids, params) for t in o.token_ids] == expected


@pytest.fixture(scope="module")
def other(model):
    """A draft model with nearly the same weights, so that some drafts are accepted."""
    torch.manual_seed(0)
    draft = GPT(model.config).eval()
    state = {name: t + 0.05 * torch.randn_like(t) for name, t in model.state_dict().items()}
    draft.load_state_dict(state)
    return draft


@pytest.mark.parametrize("kind", ["lookup", "draft", "draft with few blocks"])
def test_speculation_gives_the_same_bits(model, other, kind):
    make = {"lookup": PromptLookup, "draft": lambda: DraftModel(other),
            "draft with few blocks": lambda: DraftModel(other, blocks=4)}[kind]  # fmt: skip
    proposed = 0
    for blocks, together in ((None, 1), (None, 2), (7, 3)):
        engines = [Engine(model, blocks=blocks, speculation=s) for s in (None, make())]
        results = []
        for engine in engines:
            for i, ids in enumerate(prompts(2 * together)):
                # Repeated prompts, so that the lookup finds matches.
                engine.submit((ids * 2)[:170], params_of(i, max_tokens=50))
            results.append(collect(engine))
        assert results[0] == results[1]
        assert engines[1].accepted <= engines[1].proposed and engines[1].pool.free_blocks == engines[1].pool.num_blocks
        proposed += engines[1].proposed
        assert engines[1].accepted > 0
    assert proposed > 50


def test_draft_model_with_another_vocabulary_is_rejected(model):
    small = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=300, vocab_size=90))
    with pytest.raises(ValueError, match="draft has vocab_size 90, expected the model's 97"):
        Engine(model, speculation=DraftModel(small))


def test_accepted_draft_tokens_save_steps(model):
    """The model is its own draft model: all drafts are accepted, eight tokens a step."""
    params, ids = SamplingParams(temperature=0, max_tokens=81), prompts(1)[0]
    plain, quick = Engine(model), Engine(model, speculation=DraftModel(model))
    outputs = [list(engine.stream(ids, params)) for engine in (plain, quick)]
    assert len(outputs[0]) == 81 and len(outputs[1]) == 11
    assert quick.accepted == quick.proposed == 70


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
