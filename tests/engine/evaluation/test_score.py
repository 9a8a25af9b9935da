"""Scores of given texts: transformers' log-probabilities, and the same bits whatever else is scored.

Mutations seen to fail: a child without a copy of its parent's last block, rows taken one place early,
windows that overlap in what they score.
"""

import pytest
import torch

from peakgpt.engine.evaluation.score import Scorer
from peakgpt.engine.gpt import GPT
from peakgpt.engine.model.config import GPTConfig

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_positions": 200, "vocab_size": 257}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    for parameter in theirs.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    path = tmp_path_factory.mktemp("score")
    theirs.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def theirs(folder):
    return transformers.GPT2LMHeadModel.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def scorer(folder):
    return Scorer(GPT.from_pretrained(folder))


@torch.no_grad()
def expected(theirs, context, continuation):
    ids = torch.tensor([context + continuation])
    log_p = theirs(ids[:, :-1]).logits.log_softmax(-1)[0, len(context) - 1 :]
    return log_p.gather(-1, ids[0, len(context) :, None])[:, 0], log_p.argmax(-1) == ids[0, len(context) :]


def draw(count, seed):
    return torch.randint(257, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def pairs():
    """Contexts that share beginnings of all kinds, ends inside of blocks and at their ends, the same text twice."""
    stem = draw(100, 1)
    made = [(stem[:n], draw(k, n + k)) for n in (1, 30, 63, 64, 65, 100) for k in (1, 2, 40)]
    made += [(stem[:64], stem[64:]), (stem[:1], stem[1:]), (stem[:64], stem[64:]), (stem[:70], [])]
    made += [(draw(1, 7), draw(200, 8)), (draw(150, 9), draw(51, 10))]
    return made


def test_log_probabilities_are_transformers(scorer, theirs):
    scores = scorer.score(pairs())
    for (context, continuation), score in zip(pairs(), scores, strict=True):
        if not continuation:
            assert score.logprobs == () and score.total == 0 and score.mean == 0
            continue
        log_p, greedy = expected(theirs, context, continuation)
        torch.testing.assert_close(torch.tensor(score.logprobs), log_p, rtol=0, atol=1e-4)
        assert list(score.greedy) == greedy.tolist()
        assert score.mean == pytest.approx(log_p.mean().item(), abs=1e-4)


def test_the_same_bits_whatever_is_scored_beside_it(scorer, folder):
    """Alone, in any order, and with a cache so small that each text makes a tree of its own."""
    together, small = scorer.score(pairs()), Scorer(GPT.from_pretrained(folder), blocks=5)
    assert [scorer.score([pair])[0] for pair in pairs()] == together
    assert scorer.score(pairs()[::-1])[::-1] == together
    assert small.score(pairs()) == together


def test_what_texts_share_is_run_once(scorer, monkeypatch):
    ran, step = [], scorer.runner.step
    monkeypatch.setattr(scorer.runner, "step", lambda chunks: ran.extend(len(c.ids) for c in chunks) or step(chunks))
    context = draw(150, 3)
    scorer.score([(context, [i, i]) for i in range(15)])
    assert sum(ran) == 150 + 15


def test_a_model_that_can_not_be_lowered_is_scored_as_it_is(scorer, folder):
    model = GPT.from_pretrained(folder).double()
    assert Scorer(model).runner is None
    for ours, wide in zip(scorer.score(pairs()), Scorer(model).score(pairs()), strict=True):
        torch.testing.assert_close(ours.logprobs, wide.logprobs, rtol=0, atol=1e-4)
        assert ours.greedy == wide.greedy


@pytest.mark.parametrize(("window", "stride"), [(None, None), (64, 64 - 1), (50, 1), (200, 100), (7, 3)])
@torch.no_grad()
def test_perplexity_by_windows(scorer, theirs, window, stride):
    """Each token once, from the window that ends with its stride."""
    ids = draw(250, 5)
    found = scorer.perplexity(ids, window=window, stride=stride)
    window, stride, nll, done = found.window, found.stride, 0.0, 1
    for end in [*range(window, 250, stride), 250]:
        begin = max(end - window, 0)
        log_p, _ = expected(theirs, ids[begin:done], ids[done:end])
        nll, done = nll - log_p.double().sum().item(), end
    assert found.tokens == 249 and found.nll_nats == pytest.approx(nll, rel=1e-5)
    assert found.value == pytest.approx(torch.tensor(nll / 249).exp().item(), rel=1e-4)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (([], [1]), "a context of 0 tokens and a continuation of 1"),
        (([1] * 200, [1, 2]), "a context of 200 tokens and a continuation of 2, .* at most block_size 200"),
        (([1], [257]), "ids from 1 to 257, expected 0 to vocab_size 257 - 1"),
        (([-1], [2]), "ids from -1 to 2"),
    ],
)
def test_bad_texts_are_refused(scorer, pair, message):
    with pytest.raises(ValueError, match=message):
        scorer.score([pair])


@pytest.mark.parametrize(("window", "stride"), [(201, 1), (1, 1), (50, 50), (50, 0)])
def test_bad_windows_are_refused(scorer, window, stride):
    with pytest.raises(ValueError, match=f"window is {window} and stride {stride}"):
        scorer.perplexity([1, 2, 3], window=window, stride=stride)
    with pytest.raises(ValueError, match="got 1 tokens"):
        scorer.perplexity([1])


def test_too_few_blocks_are_refused():
    model = GPT(GPTConfig(n_layer=1, n_embd=16, n_head=2, block_size=128, vocab_size=5))
    with pytest.raises(ValueError, match="blocks is 2, expected at least 3"):
        Scorer(model, blocks=2)
