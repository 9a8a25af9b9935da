"""An error, or logits that are not finite, end only the requests that they belong to.

Mutation that these tests detect: an error in sampling one row that ends the whole step.
"""

import pytest
from engine_runs import KINDS, alone, params_of, prompts

from peakgpt.engine.inference.engine import Engine


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
