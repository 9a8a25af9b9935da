"""Scorer: transformers' log-probabilities, with the same bits for any batch.

Mutations that these tests detect: a child node without a copy of its parent's last block; logit rows shifted by one;
windows whose scored tokens overlap.
"""

import pytest
import torch

from peakgpt.engine.evaluation.score import Scorer
from peakgpt.engine.gpt import GPT
from peakgpt.engine.model.config import GPTConfig
from peakgpt.kernels.core.dispatch import use_backend

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_positions": 200, "vocab_size": 257}
    hf_model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    for parameter in hf_model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    path = tmp_path_factory.mktemp("score")
    hf_model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def hf_model(folder):
    return transformers.GPT2LMHeadModel.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def scorer(folder):
    return Scorer(GPT.from_pretrained(folder))


@torch.no_grad()
def expected(hf_model, context, continuation):
    ids = torch.tensor([context + continuation])
    log_p = hf_model(ids[:, :-1]).logits.log_softmax(-1)[0, len(context) - 1 :]
    return log_p.gather(-1, ids[0, len(context) :, None])[:, 0], log_p.argmax(-1) == ids[0, len(context) :]


def draw(count, seed):
    return torch.randint(257, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def pairs():
    """Pairs with common prefixes of many lengths, ends inside and at the end of blocks, and one pair twice."""
    stem = draw(100, 1)
    made = [(stem[:n], draw(k, n + k)) for n in (1, 30, 63, 64, 65, 100) for k in (1, 2, 40)]
    made += [(stem[:64], stem[64:]), (stem[:1], stem[1:]), (stem[:64], stem[64:]), (stem[:70], [])]
    made += [(draw(1, 7), draw(200, 8)), (draw(150, 9), draw(51, 10))]
    return made


def test_logprobs_equal_transformers(scorer, hf_model):
    scores = scorer.score(pairs())
    for (context, continuation), score in zip(pairs(), scores, strict=True):
        if not continuation:
            assert score.logprobs == () and score.total == 0 and score.mean == 0
            continue
        log_p, greedy = expected(hf_model, context, continuation)
        torch.testing.assert_close(torch.tensor(score.logprobs), log_p, rtol=0, atol=1e-4)
        assert list(score.greedy) == greedy.tolist()
        assert score.mean == pytest.approx(log_p.mean().item(), abs=1e-4)


def test_scores_have_the_same_bits_alone_in_any_order_and_with_few_blocks(scorer, folder):
    """With few blocks each sequence has its own tree."""
    together, small = scorer.score(pairs()), Scorer(GPT.from_pretrained(folder), blocks=5)
    assert [scorer.score([pair])[0] for pair in pairs()] == together
    assert scorer.score(pairs()[::-1])[::-1] == together
    assert small.score(pairs()) == together


def test_a_common_prefix_runs_once(scorer, monkeypatch):
    assert tokens_run(scorer, monkeypatch, [(draw(150, 3), [i, i]) for i in range(15)]) == 150 + 15


def tokens_run(scorer, monkeypatch, pairs):
    """Number of tokens that the executor runs to score the pairs."""
    ran, step = [], scorer.executor.step
    record = lambda chunks: ran.extend(len(c.token_ids) for c in chunks) or step(chunks)  # noqa: E731
    monkeypatch.setattr(scorer.executor, "step", record)
    scorer.score(pairs)
    return sum(ran)


# ---- models that run on torch ops

SIZES = {"n_layer": 2, "n_embd": 32, "n_head": 4, "block_size": 200, "vocab_size": 257}
TORCH_MODELS = {
    "gpt2": {},
    "grouped heads, rotary": {"n_kv_head": 2, "position": "rotary", "rotary_dim": 4, "norm": "rms", "bias": False},
    "transformer_xl": {"position": "transformer_xl"},
    "relative_bias": {"position": "relative_bias"},
}


@pytest.fixture(params=TORCH_MODELS)
def model(request):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SIZES, **TORCH_MODELS[request.param])).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def torch_scorer(model, **options):
    with use_backend("eager"):
        scorer = Scorer(model, **options)
    assert scorer.executor.note
    return scorer


@torch.no_grad()
def test_torch_ops_score_each_pair_as_the_whole_model_does(model, monkeypatch):
    """Batched, with common prefixes run once; the values are those of one forward pass per pair."""
    scorer = torch_scorer(model)
    for (context, continuation), score in zip(pairs(), scorer.score(pairs()), strict=True):
        ids = torch.tensor(context + continuation)
        log_p = model(ids[None, :-1])[0, len(context) - 1 :].log_softmax(-1)
        expected = log_p.gather(-1, ids[len(context) :, None])[:, 0]
        torch.testing.assert_close(torch.tensor(score.logprobs), expected, rtol=0, atol=1e-4)
        assert list(score.greedy) == (log_p.argmax(-1) == ids[len(context) :]).tolist()
    assert tokens_run(scorer, monkeypatch, [(draw(150, 3), [i, i]) for i in range(15)]) == 150 + 15


def test_torch_ops_score_the_same_in_any_batch(model):
    """Torch ops do not guarantee equal bits: float32 sums may have another order."""
    scorer, small = torch_scorer(model), torch_scorer(model, blocks=5)
    together = scorer.score(pairs())
    for scores in ([scorer.score([pair])[0] for pair in pairs()], small.score(pairs())):
        for score, expected in zip(scores, together, strict=True):
            torch.testing.assert_close(score.logprobs, expected.logprobs, rtol=0, atol=1e-4)


def test_torch_ops_score_with_an_int8_cache(model):
    """Close to the scores with a float32 cache, but not equal. A pair alone scores nearly the same as in a batch."""
    exact, scorer = torch_scorer(model).score(pairs()), torch_scorer(model, cache="int8")
    scores = scorer.score(pairs())
    assert scorer.executor.kv_cache.keys.dtype == torch.int8
    got, expected = (
        torch.tensor([p for score in all_scores for p in score.logprobs]) for all_scores in (scores, exact)
    )
    assert 0 < (got - expected).square().mean().sqrt() < 0.02 * expected.std()
    for pair, score in zip(pairs(), scores, strict=True):
        torch.testing.assert_close(scorer.score([pair])[0].logprobs, score.logprobs, rtol=0, atol=2e-2)


def test_int8_cache_of_the_program_and_of_torch_ops_give_near_scores(folder):
    model = GPT.from_pretrained(folder)
    both = Scorer(model, cache="int8").score(pairs()), torch_scorer(model, cache="int8").score(pairs())
    for program_score, torch_score in zip(*both, strict=True):
        torch.testing.assert_close(program_score.logprobs, torch_score.logprobs, rtol=0, atol=2e-2)


def test_a_float64_model_scores_as_in_float32(scorer, folder):
    """Neither the C++ program nor a fused op supports float64."""
    wide = Scorer(GPT.from_pretrained(folder).double())
    assert "float64" in wide.executor.note
    for ours, expected in zip(scorer.score(pairs()), wide.score(pairs()), strict=True):
        torch.testing.assert_close(ours.logprobs, expected.logprobs, rtol=0, atol=1e-4)
        assert ours.greedy == expected.greedy
    int8 = Scorer(GPT.from_pretrained(folder).double(), cache="int8").score(pairs()[:3])
    torch.testing.assert_close(int8[0].logprobs, scorer.score(pairs()[:1])[0].logprobs, rtol=0, atol=2e-2)


@pytest.mark.parametrize(("window", "stride"), [(None, None), (64, 64 - 1), (50, 1), (200, 100), (7, 3)])
@torch.no_grad()
def test_perplexity_scores_each_token_once_by_windows(scorer, hf_model, window, stride):
    """Each token is scored once, in the window that ends with the token's stride."""
    ids = draw(250, 5)
    result = scorer.perplexity(ids, window=window, stride=stride)
    window, stride, nll, done = result.window, result.stride, 0.0, 1
    for end in [*range(window, 250, stride), 250]:
        begin = max(end - window, 0)
        log_p, _ = expected(hf_model, ids[begin:done], ids[done:end])
        nll, done = nll - log_p.double().sum().item(), end
    assert result.tokens == 249 and result.nll_nats == pytest.approx(nll, rel=1e-5)
    assert result.value == pytest.approx(torch.tensor(nll / 249).exp().item(), rel=1e-4)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (([], [1]), "a context of 0 tokens and a continuation of 1"),
        (([1] * 200, [1, 2]), "a context of 200 tokens and a continuation of 2, .* at most block_size 200"),
        (([1], [257]), "ids from 1 to 257, expected 0 to vocab_size 257 - 1"),
        (([-1], [2]), "ids from -1 to 2"),
    ],
)
def test_bad_pairs_are_rejected(scorer, pair, message):
    with pytest.raises(ValueError, match=message):
        scorer.score([pair])


@pytest.mark.parametrize(("window", "stride"), [(201, 1), (1, 1), (50, 50), (50, 0)])
def test_bad_windows_are_rejected(scorer, window, stride):
    with pytest.raises(ValueError, match=f"window is {window} and stride {stride}"):
        scorer.perplexity([1, 2, 3], window=window, stride=stride)
    with pytest.raises(ValueError, match="got 1 tokens"):
        scorer.perplexity([1])


def test_too_few_blocks_are_rejected():
    model = GPT(GPTConfig(n_layer=1, n_embd=16, n_head=2, block_size=128, vocab_size=5))
    with pytest.raises(ValueError, match="blocks is 2, expected at least 3"):
        Scorer(model, blocks=2)
