"""ProgramExecutor: the model's logits, with the same bits for any chunks and batch.

Mutations that these tests detect: the last block of a table used as the first; a tile's queries masked by the tile's
last one; values of an odd key not zeroed; the head run on rows in the wrong order. With an int8 cache: values' scales
left out; scales of missing keys not zeroed; bytes truncated instead of rounded; scales not copied.
"""

import numpy as np
import pytest
import torch

from peakgpt.engine.checkpoint.quantized.weights import load_quantized, quantize_state
from peakgpt.engine.evaluation.score import Scorer
from peakgpt.engine.gpt import GPT
from peakgpt.engine.inference.chunk import Chunk
from peakgpt.engine.inference.executor import make_executor
from peakgpt.engine.inference.kv_cache import ContiguousKVCache, ProgramKVCache
from peakgpt.engine.inference.program_executor import ProgramExecutor
from peakgpt.engine.inference.torch_executor import TorchExecutor
from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.model.quantized_linear import Format
from peakgpt.kernels.ops.cache_store import quantize_heads

SIZES = {"n_layer": 2, "n_embd": 64, "n_head": 4, "block_size": 300, "vocab_size": 97}
MODELS = {
    "gpt2": {},
    "post norm, scaled by layer": {"residual": "post_norm", "scale_by_layer": True, "activation": "relu"},
    "parallel, interleaved rotary": {
        "residual": "parallel", "position": "rotary", "rotary_dim": 8, "rotary_interleaved": True, "tied_head": False,
        "head_bias": True,
    },
    "two norms, rotary": {"residual": "parallel_two_norms", "position": "rotary", "rotary_dim": 16},
    "alibi, embedding norm": {"position": "alibi", "embedding_norm": True, "activation": "gelu_erf"},
    "windows, one key head": {"windows": (None, 70), "n_kv_head": 1, "position_offset": 2, "bias": ("mlp", "norm")},
    "sandwich norms, two bases, scaled embedding": {
        "residual": "sandwich_norm", "position": "rotary", "n_kv_head": 2, "norm": "rms", "gated_mlp": True,
        "bias": False, "windows": (70, None), "local_rotary_base": 100.0, "embedding_scale": 8.1,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    },
    "output norms without weights": {
        "residual": "output_norm", "position": "rotary", "norm_weight": False, "bias": ("qkv",),
        "rotary_layers": (True, False),
    },
    "palm": {
        "residual": "parallel", "position": "rotary", "n_kv_head": 1, "norm": "rms", "gated_mlp": True,
        "activation": "silu", "bias": False, "logit_scale": 0.125,
    },
    "soft cap, sinks": {
        "attention_softcap": 1.5, "attention_sinks": True, "position": "rotary", "windows": (70, None), "n_kv_head": 2,
        "attention_scale": 0.4,
    },
    "soft cap, sinks, alibi": {"attention_softcap": 1.5, "attention_sinks": True, "position": "alibi"},
    "norms of heads, offset, rotary": {
        "position": "rotary", "rotary_dim": 8, "n_kv_head": 2, "norm": "rms", "norm_offset": 1.0, "qk_norm": "head",
        "bias": False, "logit_scale": 0.5, "logit_softcap": 2.0,
    },
    "norms of all heads": {"qk_norm": "full", "n_kv_head": 2, "logit_softcap": 3.0},
    "experts": {
        "experts": 5, "experts_every": 1, "experts_per_token": 3, "gated_experts": True, "gated_mlp": True,
        "expert_inner": 40, "activation": "silu", "mlp_only_layers": (0,), "normalize_experts": False,
    },
    "clamped gates": {"gated_mlp": True, "activation": "clamped_swiglu"},
    "experts, biases, clamped gates": {
        "experts": 5, "experts_every": 2, "experts_per_token": 2, "gated_experts": True, "gated_mlp": True,
        "expert_inner": 40, "activation": "clamped_swiglu", "router_bias": True, "attention_sinks": True,
    },
}  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(params=MODELS)
def config(request):
    return GPTConfig(**SIZES, **MODELS[request.param])


def model_of(config, dtype):
    torch.manual_seed(0)
    model = GPT(config)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.to(dtype).eval()


def whole(executor, ids, blocks=range(5)):
    return executor.step([Chunk(ids, 0, blocks, len(ids))])


@torch.no_grad()
def test_logits_equal_the_models(config, isa):
    model, ids = model_of(config, torch.float32), torch.randint(97, (150,))
    expected = model(ids[None])[0]
    torch.testing.assert_close(whole(ProgramExecutor(model, 5), ids), expected, rtol=1e-5, atol=2e-5)


@torch.no_grad()
def test_bfloat16_error_is_below_torchs(config, isa):
    """The program is float32 between products, torch bfloat16. Rows whose router is near a tie do not count."""
    model, ids = model_of(config, torch.bfloat16), torch.randint(97, (150,))
    truth = model_of(config, torch.bfloat16).double()(ids[None])[0]
    ours, torchs = ((logits - truth).abs().amax(-1).sort().values
                    for logits in (whole(ProgramExecutor(model, 5), ids), model(ids[None])[0].double()))  # fmt: skip
    assert ours.median() <= 0.75 * torchs.median()
    assert ours[-3 if config.experts else -1] <= torchs[-1]


def pieces(executor, ids):
    """Run in chunks of odd sizes together with another sequence, then token by token, in blocks in any order."""
    table, other_table = [6, 0, 4], [2, 5, 1]
    executor.step([Chunk(ids[:3], 0, table, 0)])  # no logits, as in all parts of a prompt but the last one
    logits, past = [], 0
    for count in (1, 69, 2, 58, 1, 1, 17, 1):
        others = [Chunk(ids[:5], past, other_table, 0)] if past % 2 else []
        logits.append(executor.step([*others, Chunk(ids[past : past + count], past, table, count)]))
        past += count
    return torch.cat(logits)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_for_any_chunks_and_batch(config, dtype, isa):
    executor, ids = ProgramExecutor(model_of(config, dtype), 7), torch.randint(97, (150,))
    expected = whole(executor, ids)
    assert torch.equal(pieces(executor, ids), expected)
    assert torch.equal(executor.step([Chunk(ids, 0, range(3))]), expected[-1:])
    many = executor.step([Chunk(ids[:n], 0, [i]) for i, n in enumerate((3, 64, 1, 40))])
    assert torch.equal(many, expected[[2, 63, 0, 39]])


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", (Format(8), Format(4, 32)), ids=("8 bits", "4 bits"))
@pytest.mark.parametrize("name", ("gpt2", "palm", "clamped gates"))
def test_quantized_model_is_near_torch_and_bitwise_chunk_independent(name, form, dtype, isa):
    config = GPTConfig(**SIZES, **MODELS[name])
    state = quantize_state(model_of(config, torch.float32).state_dict(), form)
    model, ids = load_quantized(GPT(config), state, form, dtype), torch.randint(97, (150,))
    executor = ProgramExecutor(model, 7)
    expected = whole(executor, ids)
    share = {torch.float32: 2e-2, torch.bfloat16: 6e-2}[dtype]  # a rounded input may differ by one
    limit = share * float(expected.abs().max())
    torch.testing.assert_close(expected, model(ids[None])[0].float(), rtol=0.0, atol=limit)
    assert torch.equal(pieces(executor, ids), expected)


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ("gpt2", "windows, one key head"))
def test_int8_cache_is_near_and_bitwise_chunk_independent(name, dtype, isa):
    """Near the logits of a float cache; the same bits for any chunks and any old block content."""
    model, ids = model_of(GPTConfig(**SIZES, **MODELS[name]), dtype), torch.randint(97, (150,))
    executor = ProgramExecutor(model, 7, cache_dtype="int8")
    for memory in (executor.kv_cache.keys, executor.kv_cache.values):
        memory.fill_(255)  # the scales are then NaN
    expected, plain = whole(executor, ids), whole(ProgramExecutor(model, 7), ids)
    error = (expected - plain).square().mean().sqrt() / plain.std()
    assert 0 < error < 0.02
    assert torch.equal(pieces(executor, ids), expected)
    copied = executor.step([Chunk(ids[:100], 0, (0, 1))])
    executor.kv_cache.copy_block(1, 5)
    again = [executor.step([Chunk(ids[100:101], 100, blocks)]) for blocks in ((0, 1), (0, 5))]
    assert torch.equal(copied[0], expected[99]) and all(torch.equal(row[0], expected[100]) for row in again)


@torch.no_grad()
@pytest.mark.parametrize("isa", ["scalar"], indirect=True)
def test_int8_cache_holds_the_bytes_of_the_cache_store_op(isa):
    """The C++ program rounds as kernels/ops/cache_store.py says; the scalar ISA stores keys as (D, BLOCK_TOKENS)."""
    config = GPTConfig(**SIZES)
    model, ids = model_of(config, torch.float32), torch.randint(97, (3,))
    executor = ProgramExecutor(model, 1, cache_dtype="int8")
    whole(executor, ids, [0])
    x = model.transformer.h[0].ln_1(model.transformer.wte(ids) + model.transformer.wpe.weight[:3])
    k = model.transformer.h[0].attn.c_attn(x).view(3, 3, 4, 16)[:, 1]  # (T, K, D)
    q, scale = quantize_heads(k)
    for head, block in enumerate(executor.kv_cache.keys[: 4 * 64 * 20].view(4, -1)):
        bytes_, scales = block[:1024].view(torch.int8).view(16, 64)[:, :3], block[1024:].view(torch.float32)[:3]
        assert (q[:, head] != bytes_.T).sum() <= 1  # the sums differ, so a value near a tie may round differently
        torch.testing.assert_close(scales, scale[:, head], rtol=1e-5, atol=0.0)


@torch.no_grad()
def test_torch_ops_with_a_contiguous_cache_fail_the_bit_check():
    """Training ops do not guarantee equal bits: a prompt in several parts must give other bits."""
    model = model_of(GPTConfig(**SIZES), torch.float32)
    ids = torch.randint(97, (1, 150))
    cache = ContiguousKVCache(model.config, 1, 150, dtype=torch.float32, device="cpu")
    parts = torch.cat([model.compute_logits(model.hidden_states(part, cache)) for part in ids.split(47, 1)], 1)
    assert not torch.equal(parts, model(ids))


def test_same_bits_for_any_thread_count(config, threads):
    executor, ids = ProgramExecutor(model_of(config, torch.float32), 7), torch.randint(97, (150,))
    results = []
    for count in (1, 2, 3, 4):
        threads(count)
        results.append(whole(executor, ids))
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_old_block_content_does_not_matter(config, dtype):
    executor, ids = ProgramExecutor(model_of(config, dtype), 5), torch.randint(97, (67,))
    expected = whole(executor, ids)
    for bits in (executor.kv_cache.keys, executor.kv_cache.values):
        bits.fill_(255)  # NaN in either dtype
    assert torch.equal(whole(executor, ids), expected)
    assert torch.equal(executor.step([Chunk(ids[:1], 67, range(2))]), whole(executor, torch.cat([ids, ids[:1]]))[-1:])


@pytest.mark.parametrize(
    ("chunk", "message"),
    [
        (Chunk([], 0, [0]), "0 tokens after 0"),
        (Chunk([1] * 10, 295, range(5)), "10 tokens after 295 .* at most block_size 300"),
        (Chunk([1, 97], 0, [0]), "ids from 1 to 97, expected 0 to vocab_size 97 - 1"),
        (Chunk([1], 64, [0]), "1 blocks of 64 tokens, expected enough for 65"),
        (Chunk([1], 0, [5]), "block 5, expected 0 to 4"),
        (Chunk([1], 0, [0], 2), "with logits of 2"),
    ],
)
def test_bad_chunks_are_rejected(chunk, message):
    executor = ProgramExecutor(model_of(GPTConfig(**SIZES), torch.float32), 5)
    with pytest.raises(ValueError, match=message):
        executor.step([chunk])


def test_unsupported_models_are_rejected_with_a_reason():
    with pytest.raises(NotImplementedError, match="no relative positions, got position 'transformer_xl'"):
        ProgramExecutor(GPT(GPTConfig(**SIZES, position="transformer_xl")), 1)
    with pytest.raises(NotImplementedError, match=r"got torch\.float64"):
        ProgramExecutor(GPT(GPTConfig(**SIZES)).double(), 1)


def test_kv_cache_size_in_bytes():
    memory, small = (
        ProgramKVCache(GPTConfig(**SIZES), 3, dtype=torch.bfloat16, cache_dtype=cache) for cache in (None, "int8")
    )
    assert memory.keys.numel() == 2 * 3 * 4 * 64 * 16 * 2 + 64
    assert small.keys.numel() == 2 * 3 * 4 * 64 * (16 + 4) + 64


def test_unknown_cache_dtype_is_rejected_by_every_executor():
    model = GPT(GPTConfig(**SIZES))
    for make in (ProgramExecutor, TorchExecutor, make_executor):
        with pytest.raises(ValueError, match="cache is 'int4', expected None or one of int8"):
            make(model, 3, cache_dtype="int4")
    with pytest.raises(ValueError, match="cache is 'int4', expected None or one of int8"):
        Scorer(GPT(GPTConfig(**SIZES, position="transformer_xl")), blocks=6, cache="int4")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode_gives_the_bits_of_step(config, dtype):
    executor, ids = ProgramExecutor(model_of(config, dtype), 7), torch.randint(97, (2, 71))
    tables, past = ([6, 0], [2, 5]), (70, 3)
    executor.step([Chunk(ids[i, :p], 0, tables[i], 0) for i, p in enumerate(past)])
    new = torch.stack([ids[i, p] for i, p in enumerate(past)])
    padded = np.zeros((2, 5), dtype=np.int32)
    padded[:, :2] = tables
    expected = executor.step([Chunk(new[i : i + 1], p, tables[i]) for i, p in enumerate(past)])
    assert torch.equal(executor.decode(new, np.array(past), padded), expected)


@pytest.mark.parametrize("name", ("mlp.c_fc.bias", "ln_1.weight", "mlp.c_proj.weight"))
@torch.no_grad()
def test_parameters_that_are_not_contiguous_are_left_to_torch(name):
    """The program reads parameters in place, one element after the other. Between these lies NaN."""
    model, ids = model_of(GPTConfig(**SIZES), torch.float32), torch.randint(97, (20,))
    expected = model(ids[None])[0]
    parameter = model.transformer.h[0].get_parameter(name)
    parameter.data = torch.stack((parameter, torch.full_like(parameter, torch.nan)), -1)[..., 0]
    executor = make_executor(model, 5)
    assert isinstance(executor, TorchExecutor) and f"got strides {parameter.stride()} of" in executor.note
    torch.testing.assert_close(whole(executor, ids), expected, rtol=1e-5, atol=2e-5)
