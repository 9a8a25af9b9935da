"""longrope: a text has the factors of its own length on every path, as in transformers' Phi-3.

transformers chooses the factors of a batch by its longest text, ours of each text by itself; so padded batches are
compared with each text alone.
"""

import pytest
import torch
import torch.nn.functional as F
import transformers
from family_variants import LONGROPE, NEOX, T, V

from peakgpt.engine.evaluation.score import Scorer
from peakgpt.engine.gpt import GPT
from peakgpt.engine.inference.chunk import Chunk
from peakgpt.engine.inference.decoder import make_decoder
from peakgpt.engine.inference.engine import Engine, SamplingParams
from peakgpt.engine.inference.executor import make_executor
from peakgpt.engine.inference.kv_cache import ContiguousKVCache
from peakgpt.engine.inference.speculative import DraftModel, PromptLookup
from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.training.train_config import TrainConfig
from peakgpt.engine.training.trainer import Trainer
from peakgpt.kernels.core.dispatch import use_backend

SWITCH = 12
BACKENDS = [None, "eager"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Return transformers' Phi-3, whose texts of more than 12 tokens have the long factors, and ours."""
    torch.manual_seed(0)
    config = transformers.Phi3Config(
        **NEOX, num_key_value_heads=1, rope_parameters=LONGROPE, original_max_position_embeddings=SWITCH, vocab_size=V,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    config._attn_implementation = "eager"
    hf_model, folder = transformers.Phi3ForCausalLM(config).eval(), tmp_path_factory.mktemp("phi3")
    with torch.no_grad():
        for parameter in hf_model.parameters():
            parameter.add_((0.2 if parameter.dim() > 1 else 0.05) * torch.randn_like(parameter))
    hf_model.save_pretrained(folder)
    return hf_model, GPT.from_pretrained(folder, dropout=0.0).eval()


def tokens(rows, count, seed=3):
    return torch.randint(V, (rows, count), generator=torch.Generator().manual_seed(seed))


def greedy(hf_model, ids, length=T):
    options = {"do_sample": False, "max_length": length, "min_length": length, "pad_token_id": 0}
    return hf_model.generate(ids, attention_mask=torch.ones_like(ids), **options)


@pytest.mark.parametrize("backend", ["eager", "cpu"])
@pytest.mark.parametrize("length", [SWITCH - 3, SWITCH, SWITCH + 1, T])
def test_loss_and_gradients_equal_transformers_for_short_and_long_texts(pair, length, backend):
    """Seen to fail: the long factors for every text of a model."""
    hf_model, ours = pair
    ids, targets = tokens(2, length), tokens(2, length, 4)
    for model in pair:
        model.zero_grad()
    logits = hf_model(ids).logits
    F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    with use_backend(backend):
        torch.testing.assert_close(ours(ids), logits, rtol=1e-5, atol=1e-5)
        ours(ids, targets).backward()
    block, expected = ours.transformer.h[0], hf_model.model.layers[0]
    for got, other in (("c_attn", "qkv_proj"), ("c_proj", "o_proj")):
        layers = getattr(block.attn, got), getattr(expected.self_attn, other)
        torch.testing.assert_close(*(layer.weight.grad for layer in layers), rtol=1e-5, atol=1e-5)


def test_the_two_sets_of_factors_differ_visibly(pair):
    hf_model, _ = pair
    ids = tokens(1, T)
    short = hf_model(ids[:, :SWITCH]).logits
    assert (hf_model(ids).logits[:, :SWITCH] - short).abs().max() > 0.1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("prompt", [3, SWITCH, SWITCH + 1, 17])
def test_cached_greedy_text_equals_transformers(pair, prompt, backend):
    """Before, at and after the length at which the factors change. Seen to fail: keys of shorter texts are kept."""
    hf_model, ours = pair
    ids = tokens(4, prompt)
    with use_backend(backend) if backend else torch.no_grad():
        assert torch.equal(ours.generate(ids), greedy(hf_model, ids))


def outputs(model, prompts, **options):
    engine, rows = Engine(model, **options), {}
    for prompt in prompts:
        rows[engine.submit(prompt.tolist(), SamplingParams(temperature=0))] = prompt.tolist()
    for output in engine.outputs():
        assert output.error is None, output.error
        rows[output.request_id] += output.token_ids
    return list(rows.values()), engine


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("budget", [5, 64])
def test_the_engine_restarts_texts_that_become_long(pair, backend, budget):
    """Prompts cut into chunks of 5 tokens, too. Seen to fail: a chunk has the factors of its own end."""
    hf_model, ours = pair
    prompts = [row[:count] for row, count in zip(tokens(5, T), (7, 11, SWITCH, 18, 2), strict=True)]
    expected = [greedy(hf_model, prompt[None])[0].tolist() for prompt in prompts]
    with use_backend(backend) if backend else torch.no_grad():
        assert outputs(ours, prompts, budget=budget)[0] == expected


@pytest.mark.parametrize("make_draft", [lambda model: PromptLookup(), DraftModel], ids=["lookup", "model"])
def test_speculation_does_not_change_the_text(pair, make_draft):
    """Drafts end where the factors change. Seen to fail: a draft over this length."""
    hf_model, ours = pair
    prompts = [row[:count] for row, count in zip(tokens(3, T), (7, 11, 2), strict=True)]
    expected = [greedy(hf_model, prompt[None])[0].tolist() for prompt in prompts]
    got, engine = outputs(ours, prompts, speculation=make_draft(ours), streams=1)
    assert got == expected
    assert engine.proposed > 0
    if make_draft is DraftModel:  # the same model: a rejected token would be of a draft with old keys
        assert engine.accepted == engine.proposed


def long_model(switch=130, **more):
    """Build a model whose factors change after some blocks of the cache."""
    torch.manual_seed(1)
    scaling = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [3.0] * 4,
               "original_max_position_embeddings": switch}  # fmt: skip
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 4, "block_size": 200, "vocab_size": V, "position": "rotary"}
    model = GPT(GPTConfig(**sizes, rope_scaling=scaling, **more)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def uncached(model, ids, length):
    """Return the greedy text without a cache."""
    while ids.shape[1] < length:
        ids = torch.cat((ids, model(ids)[:, -1:].argmax(-1)), 1)
    return ids


@torch.no_grad()
def test_long_and_short_texts_share_no_cached_blocks():
    """A short text, a longer one with the same prefix, and the short one again. Seen to fail: equal prefix hashes."""
    model, ids = long_model(), tokens(1, 150)[0].tolist()
    engine = Engine(model, blocks=20)
    for count in (128, 145, 126):
        engine.submit(ids[:count], SamplingParams(temperature=0, max_tokens=6, logprobs=0))
        text, logprobs = ids[:count], []
        for output in engine.outputs():
            text, logprobs = [*text, *output.token_ids], [*logprobs, *(entry.logprob for entry in output.logprobs)]
        for end, logprob in zip(range(count, count + 6), logprobs, strict=True):
            expected = model(torch.tensor([text[:end]]))[0, -1].log_softmax(-1)[text[end]].item()
            assert logprob == pytest.approx(expected, abs=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_are_those_of_one_pass_over_each_text(backend):
    """Texts on both sides of the length, with a common prefix. Seen to fail: one tree for all texts."""
    model, ids = long_model(switch=20), tokens(1, 40)[0].tolist()
    pairs = [(ids[:10], ids[10:count]) for count in (15, 21, 22, 40)]
    with use_backend(backend) if backend else torch.no_grad():
        scores = Scorer(model).score(pairs)
    for (context, continuation), score in zip(pairs, scores, strict=True):
        text = torch.tensor([context + continuation])
        log_p = model(text[:, :-1]).log_softmax(-1)[0, len(context) - 1 :]
        expected = log_p.gather(1, text[0, len(context) :, None])[:, 0]
        torch.testing.assert_close(torch.tensor(score.logprobs), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS)
def test_beams_equal_transformers(pair, backend):
    hf_model, ours = pair
    ids = tokens(2, 8)
    options = {"do_sample": False, "num_beams": 3, "max_length": T, "min_length": T, "pad_token_id": 0}
    expected = hf_model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    with use_backend(backend) if backend else torch.no_grad():
        assert torch.equal(ours.generate(ids, num_beams=3), expected)


@pytest.mark.parametrize("backend", ["eager", "cpu", pytest.param("gpu", marks=pytest.mark.slow)])
@pytest.mark.parametrize("qk_norm", ["none", "head"])
def test_each_padded_text_of_a_batch_has_its_own_factors(backend, qk_norm):
    """Lengths 9, 20, 21 and 30 with a change after 20: loss, gradients and text. Seen to fail: those of the longest."""
    if backend == "gpu":
        pytest.importorskip("triton")
    model, ids = long_model(switch=20, qk_norm=qk_norm), tokens(4, 31)
    firsts = [21, 10, 9, 0]
    mask = torch.stack([(torch.arange(30) >= first).long() for first in firsts])
    targets = torch.where(mask.bool(), ids[:, 1:], -100)
    with use_backend(backend):
        padded = model(ids[:, :-1], targets, attention_mask=mask, loss_weight=torch.ones(4, 30))
        got = torch.autograd.grad(padded, [*model.parameters()])
        alone = sum(
            model(ids[i : i + 1, first:-1], ids[i : i + 1, first + 1 :], loss_weight=torch.ones(1, 30 - first))
            for i, first in enumerate(firsts)
        )
        expected = torch.autograd.grad(alone, [*model.parameters()])
        torch.testing.assert_close(padded, alone, rtol=1e-5, atol=1e-4)
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        texts = model.generate(ids[:, 1:], mask, max_new_tokens=9)
        for i, first in enumerate(firsts):
            assert torch.equal(texts[i, first:], uncached(model, ids[i : i + 1, first + 1 :], 39 - first)[0])


@torch.no_grad()
def test_packed_documents_have_the_factors_of_their_own_length():
    model, ids = long_model(switch=20).double(), tokens(1, 60)
    lengths = (7, 20, 21, 12)
    position_ids = torch.cat([torch.arange(n) for n in lengths])[None]
    expected = torch.cat([model.hidden_states(part) for part in ids.split(lengths, 1)], 1)
    torch.testing.assert_close(model.hidden_states(ids, position_ids=position_ids), expected, rtol=0, atol=1e-12)


def test_recorded_training_steps_follow_the_lengths_of_their_documents():
    """A step is recorded once and replayed: the lengths are read in it, not when it is recorded."""
    model = long_model(switch=20)
    trainer = Trainer(model.train(), TrainConfig(batch=1, tokens=40, dtype=torch.float32), steps=6)
    for seed, lengths in enumerate([(40,), (10, 30), (20, 20), (21, 19), (5, 5, 30), (39, 1)]):
        ids, targets = tokens(1, 40, seed), tokens(1, 40, seed + 10)
        with torch.no_grad():
            parts = zip(ids.split(lengths, 1), targets.split(lengths, 1), strict=True)
            expected = sum(model(part.contiguous(), target.contiguous()) * part.numel() for part, target in parts) / 40
        loss = trainer.step(ids, targets, torch.cat([torch.arange(n) for n in lengths])[None])
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert trainer.update.obstacle is None


@torch.no_grad()
@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_chunks_have_the_factors_of_the_whole_text(backend, hooked):
    model, ids = long_model(switch=20), tokens(1, 30)
    expected = model(ids)[0]
    if hooked:
        model.transformer.h[0].register_forward_hook(lambda module, args, out: None)
    with use_backend(backend) if backend else torch.no_grad():
        executor = make_executor(model, 1)
        parts = [executor.step([Chunk(ids[0, p : p + n].tolist(), p, [0], n, 30)])
                 for p, n in ((0, 11), (11, 1), (12, 18))]  # fmt: skip
    torch.testing.assert_close(torch.cat(parts), expected, rtol=1e-5, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS)
def test_embeddings_and_scores_of_prompts_cut_into_chunks_are_those_of_one_pass(backend):
    """Texts of 20 and 21 tokens, with a change after 20, in chunks of 8."""
    model, ids = long_model(switch=20), tokens(2, 21)
    with use_backend(backend) if backend else torch.no_grad():
        engine = Engine(model, budget=8)
        for count in (20, 21):
            text = ids[:1, :count]
            hidden = model.hidden_states(text)[0]
            got = engine.embed([text[0].tolist()], pooling="mean", normalize=False)[0]
            torch.testing.assert_close(got, hidden.mean(0), rtol=1e-4, atol=1e-5)
            params = SamplingParams(temperature=0, max_tokens=0, prompt_logprobs=0)
            (output,) = engine.stream(text[0].tolist(), params)
            log_p = model(text)[0, :-1].log_softmax(-1).gather(1, text[0, 1:, None])[:, 0]
            scored = torch.tensor([entry.logprob for entry in output.prompt_logprobs])
            torch.testing.assert_close(scored, log_p, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_old_keys_are_refused(pair):
    _, ours = pair
    cache = ContiguousKVCache(ours.config, 1, T, dtype=torch.float32, device="cpu")
    ours(tokens(1, 10), cache=cache)
    with pytest.raises(ValueError, match="got 3 tokens after 10 in the cache, expected all tokens of the text"):
        ours(tokens(1, 3), cache=cache)


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_decoder_rewinds_over_the_change(backend):
    model, ids = long_model(switch=20), tokens(2, 25)
    with use_backend(backend) if backend else torch.no_grad():
        decoder = make_decoder(model, 2, 30, 30)
        first = decoder.step(ids[:, :18]).clone()
        decoder.step(ids[:, 18:])
        decoder.rewind(17)
        torch.testing.assert_close(decoder.step(ids[:, 17:18]), first)
