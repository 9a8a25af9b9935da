"""Speculative decoding changes no bit of the output.

Mutation that these tests detect: one uniform number for a whole draft.
"""

import pytest
import torch
from engine_runs import collect, params_of, prompts

from peakgpt.engine.gpt import GPT
from peakgpt.engine.inference.engine import Engine, SamplingParams
from peakgpt.engine.inference.speculative import DraftModel, PromptLookup
from peakgpt.engine.model.config import GPTConfig


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
