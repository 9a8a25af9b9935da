"""Scaled rotary frequencies: the bits of transformers for every rope_type, clear errors, one model on every path."""

import pytest
import torch
import transformers

from peakgpt.engine.gpt import GPT
from peakgpt.engine.inference.chunk import Chunk
from peakgpt.engine.inference.executor import make_executor
from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.model.rope_scaling import KINDS, complete, frequencies
from peakgpt.kernels.core.dispatch import use_backend

ROPE_INIT_FUNCTIONS = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS
WIDTH, BLOCK_SIZE = 64, 96
FACTORS = {"short_factor": [1.0 + 0.01 * i for i in range(32)], "long_factor": [2.0 + 0.5 * i for i in range(32)]}
CASES = [
    {"rope_type": "linear", "factor": 3.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 24},
    {"rope_type": "yarn", "factor": 4.0},
    {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 24, "beta_fast": 16, "beta_slow": 2,
     "truncate": False, "attention_factor": 1.25},
    {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.7, "original_max_position_embeddings": 24},
    {"rope_type": "longrope", **FACTORS},
    {"rope_type": "longrope", **FACTORS, "original_max_position_embeddings": 24},
    {"rope_type": "longrope", **FACTORS, "original_max_position_embeddings": 24, "factor": 16.0},
]  # fmt: skip


@pytest.mark.parametrize("scaling", CASES, ids=str)
@pytest.mark.parametrize("base", [10000.0, 500000.0])
def test_frequencies_have_the_bits_of_transformers(scaling, base):
    config = transformers.LlamaConfig(
        hidden_size=2 * WIDTH, num_attention_heads=2, max_position_embeddings=BLOCK_SIZE,
        rope_parameters={**scaling, "rope_theta": base},
    )  # fmt: skip
    expected, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, "cpu", seq_len=BLOCK_SIZE)
    full = complete(scaling, pairs=WIDTH // 2, base=base, block_size=BLOCK_SIZE)
    got, our_factor = frequencies(full, WIDTH, base, BLOCK_SIZE, "cpu")
    assert torch.equal(got, expected) and our_factor == pytest.approx(factor, rel=1e-12)
    assert complete(full, pairs=WIDTH // 2, base=base, block_size=BLOCK_SIZE) == full


def test_every_kind_is_compared():
    assert {case["rope_type"] for case in CASES} == set(KINDS)


@pytest.mark.parametrize("length", [8, 10, 11, 40])
def test_longrope_equals_transformers_below_and_above_its_original_length(length, tmp_path):
    """More is in test_longrope.py."""
    torch.manual_seed(0)
    factors = {name: values[:4] for name, values in FACTORS.items()}
    rope = {"rope_type": "longrope", "rope_theta": 100.0, "original_max_position_embeddings": 10, **factors}
    config = transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=67,
        max_position_embeddings=40, rope_parameters=rope,
    )  # fmt: skip
    hf_model = transformers.LlamaForCausalLM(config).eval()
    hf_model.save_pretrained(tmp_path)
    ids = torch.randint(67, (2, length))
    with torch.no_grad():
        logits = GPT.from_pretrained(tmp_path)(ids)
        torch.testing.assert_close(logits, hf_model(ids).logits, rtol=1e-5, atol=1e-5)


BAD = [
    ({}, "rope_type is None, expected one of default, linear, dynamic, llama3, yarn, longrope"),
    ({"rope_type": "su"}, "rope_type is 'su', expected one of default"),
    ({"rope_type": "linear"}, "factor is None, expected the parameters of 'linear': factor"),
    ({"rope_type": "default", "factor": 2.0}, "factor is 2.0, expected the parameters of 'default': none"),
    ({"rope_type": "linear", "factor": 2.0, "beta_fast": 1.0}, "beta_fast is 1.0, expected the parameters of 'linear'"),
    ({"rope_type": "linear", "factor": float("nan")}, "factor is nan, expected a number above 0"),
    ({"rope_type": "dynamic", "factor": True}, "factor is True, expected a number above 0"),
    ({"rope_type": "yarn", "factor": 2.0, "truncate": 1}, "truncate is 1, expected true or false"),
    ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 1.5}, "is 1.5, expected an integer"),
    ({"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0},
     "high_freq_factor is 4.0, expected more than low_freq_factor 4.0"),
    ({"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]},
     r"short_factor is \[1.0\], expected a list of 4 numbers above 0"),
]  # fmt: skip
SIZES = {"n_layer": 2, "n_embd": 32, "n_head": 4, "block_size": 40, "vocab_size": 67, "position": "rotary"}


@pytest.mark.parametrize(("scaling", "message"), BAD)
def test_bad_parameters_are_one_sentence(scaling, message):
    with pytest.raises(ValueError, match=f"GPTConfig: rope_scaling: .*{message}") as error:
        GPTConfig(**SIZES, rope_scaling=scaling)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"position": "alibi", "rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "none without rotary"),
        ({"position": "learned", "rotary_layers": (True, False)}, "true without rotary positions"),
        ({"local_rotary_base": 100.0}, "none without rotary positions and windows"),
        ({"position": "learned", "embedding_scale": 2.0}, "1 with learned positions"),
        ({"rotary_layers": ()}, "at least one"),
        ({"norm": "rms", "bias": False, "norm_weight": False}, "true, as norm is rms"),
        ({"norm_weight": False}, "no bias of norms, as norm_weight is false"),
    ],
)
def test_fields_that_would_be_ignored_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**{**SIZES, **fields})


VARIANTS = {
    "scaled": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 10}},
    "two bases": {"windows": (5, None), "local_rotary_base": 50.0,
                  "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    "some layers": {"rotary_layers": (False, True), "n_kv_head": 2},
    "no layer, interleaved": {"rotary_layers": (False,), "rotary_interleaved": True},
    "sandwich": {"residual": "sandwich_norm", "norm": "rms", "bias": False, "embedding_scale": 5.6568},
    "output": {"residual": "output_norm", "norm_weight": False, "bias": ("qkv", "mlp")},
}  # fmt: skip


def build(variant, dtype=torch.float32):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SIZES, **VARIANTS[variant]}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def loss_and_gradients(model, ids, targets, **options):
    loss = model(ids, targets, **options)
    return torch.autograd.grad(loss, list(model.parameters())), loss.detach()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("backend", ["eager", "cpu", pytest.param("gpu", marks=pytest.mark.slow)])
def test_every_backend_has_the_loss_and_gradients_of_float64(variant, backend):
    if backend == "gpu":
        pytest.importorskip("triton")
    ids, targets = torch.randint(67, (2, 2, 17), generator=torch.Generator().manual_seed(1))
    expected, loss = loss_and_gradients(build(variant, torch.float64), ids, targets)
    with use_backend(backend):
        gradients, got = loss_and_gradients(build(variant), ids, targets)
    torch.testing.assert_close(got, loss.float(), rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs.float(), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("backend", [None, "eager"], ids=["program", "torch executor"])
def test_executors_have_the_logits_of_one_pass(variant, backend):
    """In chunks, two sequences at once. Seen to fail: one table of angles for all layers."""
    model, ids = build(variant), torch.randint(67, (2, 30), generator=torch.Generator().manual_seed(2))
    expected = model(ids)
    if backend is None:
        executor = make_executor(model, 2)
        assert executor.note == ""
    else:
        with use_backend(backend):
            executor = make_executor(model, 2)
    past, got = 0, []
    for count in (7, 1, 21, 1):
        chunks = [Chunk(row[past : past + count].tolist(), past, [i], count) for i, row in enumerate(ids)]
        got.append(executor.step(chunks).view(2, count, -1))
        past += count
    torch.testing.assert_close(torch.cat(got, 1), expected, rtol=1e-5, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["two bases", "some layers"])
def test_packed_documents_have_the_angles_of_their_positions(variant):
    model, ids = build(variant, torch.float64), torch.randint(67, (1, 20), generator=torch.Generator().manual_seed(3))
    position_ids = torch.cat((torch.arange(7), torch.arange(13)))[None]
    expected = torch.cat((model.hidden_states(ids[:, :7]), model.hidden_states(ids[:, 7:])), 1)
    torch.testing.assert_close(model.hidden_states(ids, position_ids=position_ids), expected, rtol=0, atol=1e-12)


@torch.no_grad()
def test_the_embedding_scale_is_rounded_to_bfloat16_on_both_paths():
    """5.6568 is 5.65625 in bfloat16. Mutation that makes it fail: a scale in float32."""
    model, ids = build("sandwich", torch.bfloat16), torch.arange(9)[None]
    rounded = torch.tensor(5.6568, dtype=torch.bfloat16)
    assert torch.equal(model._embed(ids, 0, None), model.transformer.wte.weight[:9][None] * rounded)
    exact = build("sandwich", torch.bfloat16).double()  # scales by 5.6568: an error of 1e-4 only
    errors = [
        (logits.double() - exact(ids)).abs().max()
        for logits in (model(ids), make_executor(model, 1).step([Chunk(ids[0].tolist(), 0, [0], 9)])[None])
    ]
    assert errors[1] <= 2 * errors[0] + 1e-3
