"""Engine.embed: transformers' hidden states, pooled; the same bits in any batch; beside other requests.

Mutations that these tests detect: the mean divided by the tokens of the last chunk; hidden states before the last norm;
a preempted text that starts its sum anew; the head's rows selected instead of the text's.
"""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import transformers

from peakgpt.engine.data.tokenizer_training import train_tokenizer
from peakgpt.engine.gpt import GPT
from peakgpt.engine.inference.engine import Engine, SamplingParams
from peakgpt.engine.model.config import GPTConfig
from peakgpt.kernels.core.dispatch import use_backend

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 256,
         "vocab_size": 97}  # fmt: skip
GPT2 = transformers.GPT2Config(n_layer=2, n_head=4, n_embd=64, n_positions=256, vocab_size=97)
MODELS = {
    "gpt2": GPT2,
    "opt, post norm": transformers.OPTConfig(
        **SIZES, ffn_dim=96, word_embed_proj_dim=32, do_layer_norm_before=False, dropout=0.0
    ),
    "openai-gpt": transformers.OpenAIGPTConfig(n_layer=2, n_head=4, n_embd=64, n_positions=256, vocab_size=97),
}
LENGTHS = (1, 5, 65, 150)


def texts():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(97, (length,), generator=generator).tolist() for length in LENGTHS]


@pytest.fixture(params=MODELS)
def pair(request, tmp_path):
    """A tiny random model of transformers, and the same one of ours."""
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(MODELS[request.param]).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    return theirs, GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize("backend", [nullcontext, partial(use_backend, "eager")], ids=["fastest", "eager"])
def test_vectors_are_transformers_pooled_hidden_states(pair, backend):
    theirs, model = pair
    with torch.no_grad():
        hidden = [theirs.base_model(torch.tensor([ids])).last_hidden_state[0] for ids in texts()]
    expected = {"last": torch.stack([h[-1] for h in hidden]), "mean": torch.stack([h.mean(0) for h in hidden])}
    with backend():
        engine = Engine(model, blocks=16, budget=130)  # the longest text takes two steps
        got = {pooling: engine.embed(texts(), pooling=pooling, normalize=False) for pooling in expected}
    for pooling, vectors in got.items():
        assert vectors.dtype == torch.float32 and vectors.shape == expected[pooling].shape
        assert (1 - F.cosine_similarity(vectors.double(), expected[pooling].double())).max() < 1e-6
        torch.testing.assert_close(vectors, expected[pooling], rtol=1e-4, atol=1e-4)


def test_vectors_have_length_one_unless_it_is_not_wanted():
    engine = Engine(tiny(), blocks=16)
    raw, unit = (engine.embed(texts(), normalize=normalize) for normalize in (False, True))
    torch.testing.assert_close(unit, F.normalize(raw), rtol=1e-6, atol=1e-6)


def tiny(dtype=torch.float32, **changes):
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_embd": 64, "n_head": 4, "block_size": 300, "vocab_size": 97, **changes}
    return GPT(GPTConfig(**sizes)).to(dtype).eval()


@pytest.mark.parametrize("model", [{}, {"position": "transformer_xl"}, {"logit_scale": 0.5}], ids=str)
def test_executors_agree(model):
    """The C++ program, torch ops on packed sequences, and sequences one by one."""
    model = tiny(**model)
    engine = Engine(model, blocks=16)
    got = engine.embed(texts(), pooling="mean", normalize=False)
    with torch.no_grad():
        expected = torch.stack([model.hidden_states(torch.tensor([ids]))[0].mean(0) for ids in texts()])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert bool(engine.executor_note) == (model.config.position == "transformer_xl")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_vector_has_the_same_bits_in_any_batch(dtype, pooling):
    """Alone, in a batch, in chunks of any size, with a known prefix, and after preemption."""
    model, ids = tiny(dtype), texts()
    alone = [Engine(model, blocks=5).embed([one], pooling=pooling)[0] for one in ids]
    for options in ({"blocks": 40}, {"blocks": 5, "budget": 33}):
        engine = Engine(model, **options)
        for _ in range(2):  # the second time the first blocks are known
            assert torch.equal(engine.embed(ids, pooling=pooling), torch.stack(alone)), options


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_preempted_text_gets_the_same_vector(pooling):
    """After 72 of its 150 tokens, because a request that came earlier needs a block; one block is known then."""
    model, ids = tiny(), texts()[-1]
    expected = Engine(model, blocks=8).embed([ids], pooling=pooling)[0]
    engine = Engine(model, blocks=4, budget=4)
    engine.submit([1] * 40, SamplingParams(max_tokens=120, temperature=0.0))
    (sequence,) = engine.preparation.prepare_embeddings([ids], pooling, True)
    engine.add(sequence)
    computed, release = [], engine.scheduler.release
    engine.scheduler.release = lambda s: (computed.append(s.num_computed), release(s))
    (vector,) = [output.embedding for output in engine.outputs() if output.embedding is not None]
    assert torch.equal(vector, expected) and 64 < computed[0] < 150


def test_embeddings_run_beside_other_requests_without_changing_them():
    model, ids = tiny(), texts()
    params = SamplingParams(max_tokens=30, temperature=0.9, seed=3, logprobs=1)
    alone = [(o.token_ids, o.logprobs) for o in Engine(model, blocks=40).stream(ids[1], params)]
    expected = Engine(model, blocks=40).embed(ids)
    engine = Engine(model, blocks=40)
    request = engine.submit(ids[1], params)
    outputs = engine.step()
    sequences = engine.preparation.prepare_embeddings(ids, "last", True)
    rows = {engine.add(sequence): row for row, sequence in enumerate(sequences)}
    outputs += engine.step()
    assert engine.scheduler.running and any(output.embedding is not None for output in outputs), "in one step"
    outputs += engine.outputs()
    assert [(o.token_ids, o.logprobs) for o in outputs if o.request_id == request] == alone
    vectors = {rows[o.request_id]: o.embedding for o in outputs if o.embedding is not None}
    assert torch.equal(torch.stack([vectors[row] for row in range(len(ids))]), expected)
    assert engine.pool.free_blocks == 40


def test_a_text_that_fails_ends_alone():
    model = tiny()
    with torch.no_grad():
        model.transformer.wte.weight[7] = float("nan")
    engine = Engine(model, blocks=40)
    with pytest.raises(ArithmeticError, match="embed: the hidden states of 2 tokens are not finite"):
        engine.embed([[1, 2], [1, 7]])
    assert not engine.has_work and engine.pool.free_blocks == 40
    assert engine.embed([[1, 2]]).isfinite().all()


def test_texts_get_the_tokenizers_special_tokens():
    tokenizer = train_tokenizer(["the canary sings a song"], 270)
    engine = Engine(tiny(vocab_size=270), tokenizer, blocks=8)
    got = engine.embed(["the canary", "a song"])
    assert torch.equal(got, engine.embed([tokenizer.encode("the canary"), tokenizer.encode("a song")]))
    assert engine.embed([]).shape == (0, 64)


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        ("text", {}, "got the text 'text', expected a list"),
        (["text"], {}, "expected token ids without a tokenizer"),
        ([[]], {}, "0 prompt tokens, expected at least one"),
        ([[1], [97]], {}, "has id 97, expected 0 to vocab_size 97 - 1"),
        ([[1] * 301], {}, "301 prompt tokens .* at most block_size 300"),
        ([[1]], {"pooling": "max"}, "pooling is 'max', expected one of last, mean"),
    ],
)
def test_bad_input_is_one_sentence(inputs, options, message):
    engine = Engine(tiny(), blocks=8)
    with pytest.raises(ValueError, match=message):
        engine.embed(inputs, **options)
    assert not engine.has_work


def test_an_engine_with_other_requests_is_refused():
    engine = Engine(tiny(), blocks=8)
    engine.submit([1], SamplingParams(max_tokens=2))
    with pytest.raises(ValueError, match="got an engine with other requests"):
        engine.embed([[1]])
