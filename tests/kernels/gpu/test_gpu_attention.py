"""Properties of Triton attention, in the interpreter if there is no GPU; test_ops.py holds the plain cases.

Mutations that these tests caught: the causal or window mask missing in one kernel, dk scaled by 1.01, a range of full
tiles one too long, rows without keys left at NaN, the slope's sign, a group's heads summed into the wrong key head, the
slope of the cap missing in one kernel, a sink of another head.
"""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from peakgpt.bench.check import double, judge, leaf
from peakgpt.kernels.core import backends
from peakgpt.kernels.core.dispatch import interpreted, use_backend
from peakgpt.kernels.doctor import Choice, Diagnosis
from peakgpt.kernels.ops.attention import attention, attention_qkv
from peakgpt.kernels.ops.attention_math import dropout_mask, live_mask

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
if not (interpreted() or torch.cuda.is_available()):
    pytest.skip("needs a CUDA device or the interpreter", allow_module_level=True)
from peakgpt.kernels.gpu import launch  # noqa: E402
from peakgpt.kernels.gpu.attention import attention as gpu  # noqa: E402
from peakgpt.kernels.gpu.attention.tiles import Slower  # noqa: E402

DEVICE = "cpu" if interpreted() else "cuda"
SLOPES = torch.tensor([0.5, -0.25, 0.125, 1.0], device=DEVICE)
SINKS = torch.tensor([2.0, -1.0, 0.5, 300.0], device=DEVICE)


def ints(*values):
    return torch.tensor(values, device=DEVICE)


def make(batch, tokens, heads, head_dim, keys=None, kv_heads=None, dtype=torch.float32):
    torch.manual_seed(tokens)
    sizes = {"batch": batch, "tokens": tokens, "heads": heads, "head_dim": head_dim, "keys": keys, "kv_heads": kv_heads}
    return [leaf(t) for t in attention.sample(**sizes, dtype=dtype, device=DEVICE)]


def run(backend, tensors, **params):
    """Return out, dq, dk, dv, then the gradients of slopes, bias and sinks if they require one."""
    terms = [t for t in map(params.get, ("alibi", "bias", "sinks")) if t is not None and t.requires_grad]
    with use_backend(backend):
        out = attention(*tensors, **params)
    torch.manual_seed(7)
    up = torch.randn(out.shape, dtype=torch.float64).to(out)
    return [out, *torch.autograd.grad(out, [*tensors, *terms], up)]


def assert_right(tensors, **params):
    ours, torchs = run("gpu", tensors, **params), run("eager", tensors, **params)
    wide = dict(zip(params, double([v if torch.is_tensor(v) else None for v in params.values()]), strict=True))
    truth = run("eager", double(tensors), **{n: v if wide[n] is None else wide[n] for n, v in params.items()})
    for i, verdict in enumerate(judge(ours, torchs, truth, tensors[0].dtype)):
        assert verdict.passed, f"result {i} of out, dq, dk, dv, dalibi, dbias, dsinks: {verdict}"
    return ours


# ---- values and gradients ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_all_options_together_are_right(dtype):
    heads = 4 if dtype == torch.float32 else 2
    tensors = make(2, 65, heads, 24, keys=129, kv_heads=heads // 2, dtype=dtype)
    bias = leaf(torch.randn(2, 1, 65, 129, device=DEVICE).to(dtype))
    assert_right(
        tensors, alibi=leaf(SLOPES[:heads]), window=40, scale=0.3, kv_start=ints(0, 70), kv_len=ints(100, 129).int(),
        bias=bias, dropout=0.2, seed=ints(11), softcap=2.0, sinks=leaf(SINKS[:heads]),
    )  # fmt: skip


@pytest.mark.parametrize(
    "params",
    [
        {"alibi": SLOPES},
        {"alibi": SLOPES, "causal": False},
        {"window": 1},
        {"window": 33, "causal": False},
        {"kv_start": ints(3, 40)},
        {"kv_len": ints(64, 1), "causal": False},
        {"bias": leaf(torch.randn(2, 4, 65, 65, device=DEVICE))},
        {"bias": leaf(torch.randn(2, 1, 65, 65, device=DEVICE)), "causal": False},
        {"bias": leaf(torch.randn(1, 4, 65, 65, device=DEVICE)), "window": 20},
        {"bias": leaf(torch.randn(1, 1, 65, 65, device=DEVICE).mT), "kv_start": ints(3, 40)},
        {"dropout": 0.3, "seed": ints(2**40 + 7)},
        {"dropout": 0.9, "seed": ints(-5), "causal": False},
        {"softcap": 2.0},
        {"softcap": 50.0, "window": 20, "alibi": leaf(SLOPES)},
        {"sinks": leaf(SINKS), "kv_start": ints(3, 40)},
        {"sinks": SINKS, "softcap": 2.0, "causal": False},
    ],
    ids=lambda p: "-".join(p),
)
def test_each_option_is_right(params):
    assert_right(make(2, 65, 4, 16, kv_heads=1), **params)


@pytest.mark.parametrize(
    ("starts", "params"),
    [
        ([0, 1, 18, 18, 50, 65], {}),
        ([0, 0, 64, 65], {"causal": False}),
        ([0, 40, 65], {"window": 9, "causal": False}),
        ([0, 7, 65], {"kv_start": ints(3), "kv_len": ints(50)}),
        ([0, 65], {"alibi": leaf(SLOPES), "bias": leaf(torch.randn(1, 4, 65, 65, device=DEVICE))}),
    ],
)
def test_packed_documents_are_right(starts, params):
    assert_right(make(1, 65, 4, 16, kv_heads=2), cu_seqlens=ints(*starts).int(), **params)


@pytest.mark.parametrize("head_dim", [1, 80, 96, 256])
def test_padded_head_widths_are_right(head_dim):
    assert_right(make(1, 33, 1, head_dim, dtype=torch.bfloat16))


TILES = {tiles: (precision, width) for (_, precision, width), tiles in gpu.TILES.items()}


@pytest.mark.parametrize("tiles", TILES, ids=lambda t: "-".join(f"{x.BLOCK_Q}x{x.BLOCK_K}" for x in t if x))
def test_every_tile_row_is_right(tiles, monkeypatch):
    precision, width = TILES[tiles]
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    tokens = 1 + max(max(t.BLOCK_Q, t.BLOCK_K) for t in tiles if t)
    tensors = make(1, tokens, 1, width, dtype=dtype)
    monkeypatch.setitem(gpu.TILES, (launch.arch(tensors[0]), precision, width), tiles)
    bias = leaf(torch.randn(1, 1, tokens, tokens, device=DEVICE).to(dtype))
    assert_right(tensors, **({"bias": bias} if tiles.dbias else {}))


def test_lse_is_natural_log_of_the_sum():
    q, k, v = (t.detach() for t in make(1, 40, 2, 16))
    (out,), (lse,) = attention.alloc(q, k, v, needs=(True,) * 3)
    out.fill_(float("nan")), lse.fill_(float("nan"))
    gpu.forward((out,), (lse,), q, k, v, *[None] * 7, causal=True, window=None, scale=0.5, dropout=0.0)
    s = 0.5 * torch.einsum("bthd,bshd->bhts", q, k).masked_fill(~live_mask(q, k, True, None), float("-inf"))
    torch.testing.assert_close(lse, s.logsumexp(-1))


# ---- properties ----


@pytest.mark.parametrize(
    "sizes, params, dead",
    [
        ((1, 70, 1, 16, 5), {}, (0, slice(0, 65))),
        ((2, 20, 1, 16, 20), {"kv_len": ints(20, 0)}, (1, slice(None))),
        ((1, 20, 1, 16, 20), {"kv_start": ints(12)}, (0, slice(0, 12))),
        ((1, 40, 1, 16, 20), {"causal": False, "window": 4, "kv_len": ints(2)}, (0, slice(26, 40))),
        ((1, 20, 1, 16, 20), {"kv_start": ints(12), "sinks": leaf(SINKS[:1]), "softcap": 2.0}, (0, slice(0, 12))),
    ],
)
def test_a_query_without_keys_gives_zero(sizes, params, dead):
    results = assert_right(make(*sizes), **params)
    assert all(torch.isfinite(r).all() for r in results)
    assert (results[0][dead] == 0).all() and (results[1][dead] == 0).all()


def test_keys_outside_the_sequence_have_no_effect_and_zero_gradients():
    tensors = make(1, 40, 2, 16)
    params = {"causal": False, "kv_start": ints(3), "kv_len": ints(30)}
    clean = run("gpu", tensors, **params)
    with torch.no_grad():
        for t in tensors[1:]:
            t[:, :3], t[:, 33:] = float("nan"), float("inf")
    for a, b in zip(clean, run("gpu", tensors, **params), strict=True):
        assert torch.equal(a, b)
    assert not clean[2][:, 33:].any() and not clean[3][:, :3].any()


def test_causality_is_exact():
    q, k, v = (t.detach() for t in make(1, 70, 2, 16))
    with use_backend("gpu"):
        before = attention(q, k, v)
        for t in (q, k, v):
            t[:, 50:] += 1
        after = attention(q, k, v)
    assert torch.equal(before[:, :50], after[:, :50]) and not torch.equal(before[:, 50:], after[:, 50:])


def assert_repeats(times, tensors, **terms):
    first = run("gpu", tensors, **terms)
    for _ in range(times - 1):
        assert all(torch.equal(a, b) for a, b in zip(first, run("gpu", tensors, **terms), strict=True))


def test_two_runs_are_bit_equal():
    assert_repeats(2, make(1, 70, 4, 16, kv_heads=2, dtype=torch.bfloat16))


@pytest.mark.slow
@pytest.mark.skipif(not interpreted(), reason="a CUDA device runs test_250_runs_are_bit_equal_on_a_device")
def test_250_runs_are_bit_equal():
    """The interpreter runs programs one by one: this finds reads before writes, but no races."""
    bias = leaf(torch.randn(1, 1, 5, 5))
    assert_repeats(250, make(1, 5, 2, 16, kv_heads=1), bias=bias, alibi=leaf(SLOPES[:2]), dropout=0.5, seed=ints(3))


@pytest.mark.skipif(interpreted(), reason="needs a CUDA device")
@pytest.mark.parametrize("head_dim", [64, 128])
def test_250_runs_are_bit_equal_on_a_device(head_dim):
    tensors = make(2, 1025, 4, head_dim, kv_heads=2, dtype=torch.bfloat16)
    assert_repeats(250, tensors)
    bias = leaf(torch.randn(1, 1, 1025, 1025, device=DEVICE).bfloat16())
    assert_repeats(250, tensors, bias=bias, alibi=leaf(SLOPES), dropout=0.1, seed=ints(3))


def test_strides_do_not_change_the_bits():
    plain = make(2, 33, 2, 16)
    packed = torch.stack([t.detach() for t in plain], 3)  # (B, T, H, 3, D)
    sliced = [packed[:, :, :, n].requires_grad_() for n in range(3)]
    swapped = [leaf(t.transpose(1, 2).contiguous()).transpose(1, 2) for t in plain]
    expected = run("gpu", plain)
    for views in (sliced, swapped):
        for a, b in zip(expected, run("gpu", views), strict=True):
            assert torch.equal(a, b)
    with use_backend("gpu"):
        out = attention(*plain)
    (by_sum,) = torch.autograd.grad(out.sum(), plain[0], retain_graph=True)  # an expanded gradient, stride 0
    (by_ones,) = torch.autograd.grad(out, plain[0], torch.ones_like(out))
    assert torch.equal(by_sum, by_ones)


@pytest.mark.parametrize("batch, tokens, keys", [(0, 5, 5), (1, 0, 5), (1, 5, 0)])
def test_zero_sizes_give_zero_results(batch, tokens, keys):
    shapes = (batch, tokens, 2, 16), (batch, keys, 2, 16), (batch, keys, 2, 16)
    tensors = [leaf(torch.randn(shape, device=DEVICE)) for shape in shapes]
    for result, shape in zip(run("gpu", tensors), (shapes[0], *shapes), strict=True):
        assert result.shape == shape and not result.any()


def test_attention_qkv_gives_the_bits_of_attention():
    qkv = leaf(torch.randn(1, 33, 4 + 2 * 2, 16, device=DEVICE))
    up = torch.randn(1, 33, 4, 16, device=DEVICE)
    with use_backend("gpu"):
        packed, split = attention_qkv(qkv, n_head=4), attention(*qkv.split((4, 2, 2), 2))
    (packed_grad,), (split_grad,) = (torch.autograd.grad(y, qkv, up) for y in (packed, split))
    assert torch.equal(packed, split) and torch.equal(packed_grad, split_grad)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_large_logits_are_right(dtype):
    tensors = make(1, 66, 2, 32, dtype=dtype)
    assert_right(tensors, scale=30.0, alibi=torch.tensor([40.0, -40.0], device=DEVICE))


@pytest.mark.parametrize(("tokens", "keys"), [(1, 65), (34, 33), (65, 2)])
def test_odd_shapes_are_right(tokens, keys):
    assert_right(make(1, tokens, 2, 80, keys=keys))


def test_one_token_gives_its_value():
    tensors = make(2, 1, 4, 80, kv_heads=2)
    out, dq, dk, dv = run("gpu", tensors)
    assert torch.equal(out, tensors[2].repeat_interleave(2, 2)) and max(dq.abs().max(), dk.abs().max()) < 1e-5
    assert torch.isfinite(dv).all()


def test_dropout_mask_is_that_of_the_contract():
    """With weights of 1 / S and values of 1, out counts the weights that dropout keeps."""
    q, k, v = torch.zeros(2, 33, 3, 16, device=DEVICE), torch.zeros(2, 70, 3, 16, device=DEVICE), None
    v, seed = torch.ones_like(k), ints(-(2**62) + 5)
    with use_backend("gpu"):
        out = attention(q, k, v, causal=False, dropout=0.4, seed=seed)
    share = dropout_mask(seed, 0.4, 2, 3, 33, 70).float().mean(-1) / 0.6
    torch.testing.assert_close(out[..., 0].transpose(1, 2), share)


def test_dropout_follows_torchs_generator():
    """The same seed repeats, the next call differs, a checkpointed block equals the plain one."""
    tensors = make(1, 33, 2, 16)

    def block(*x):
        return attention(*x, dropout=0.5)

    def results_of(call):
        torch.manual_seed(3)
        out = call(*tensors)
        return [out, *torch.autograd.grad(out.square().sum(), tensors)]

    with use_backend("gpu"):
        plain, again, other = results_of(block), results_of(block), block(*tensors)
        recomputed = results_of(lambda *x: checkpoint(block, *x, use_reentrant=False))
    assert not torch.equal(plain[0], other)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(plain, again, recomputed, strict=True))


def test_seed_is_read_from_device_memory():
    """A new value in the same tensor gives a new mask, as in a replay of a CUDA graph."""
    q, k, v = (t.detach() for t in make(1, 33, 2, 16))
    seed, outputs = ints(1), []
    with use_backend("gpu"):
        for value in (1, 2, 1):
            outputs.append(attention(q, k, v, dropout=0.5, seed=seed.fill_(value)))
    assert torch.equal(outputs[0], outputs[2]) and not torch.equal(outputs[0], outputs[1])


@pytest.mark.skipif(interpreted(), reason="needs a CUDA device")
def test_two_graph_replays_use_different_dropout_masks():
    q, k, v = (t.detach() for t in make(1, 129, 2, 64, dtype=torch.bfloat16))
    attention(q, k, v, dropout=0.5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention(q, k, v, dropout=0.5)
    graph.replay()
    first = out.clone()
    graph.replay()
    assert not torch.equal(first, out)


def test_gradients_of_shared_bias_slopes_and_sinks_are_repeatable():
    bias = leaf(torch.randn(1, 1, 17, 17, device=DEVICE))
    assert_repeats(3, make(3, 17, 2, 16), bias=bias, alibi=leaf(SLOPES[:2]), sinks=leaf(SINKS[:2]))


def test_measured_slower_calls_are_declined_unless_forced(monkeypatch):
    tensors = make(1, 40, 2, 16, dtype=torch.bfloat16)
    row = gpu.key(tensors[0], rich=False)
    monkeypatch.setitem(gpu.SLOWER, row, Slower(baseline="cuDNN attention", min_keys=40, device="a test", date="never"))
    reason = "measured slower than torch's cuDNN attention on a test, never"
    assert gpu.declines(*tensors) == reason and gpu.declines(*(t[:, :39] for t in tensors)) is None
    assert gpu.declines(*tensors, dropout=0.1) is None and gpu.declines(*tensors, SLOPES[:2]) is None
    needs = (False,) * len(attention.tensor_names)
    bound = attention.bind(tensors, {})
    assert backends.module_objection(attention, gpu, *bound, needs) == reason
    assert backends.module_objection(attention, gpu, *bound, needs, "gpu") is None
    with use_backend("gpu"):
        assert attention.explain(*tensors)["gpu"] is None
    choices = [Choice("attention", "bfloat16", "eager", {"gpu": reason}), Choice("mlp", "bfloat16", "eager", {})]
    _, attention_line, mlp_line = Diagnosis(None, None, None, {}, choices)._ops()
    assert attention_line.endswith(f"runs torch's scaled_dot_product_attention; not gpu: {reason}")
    assert "torch" not in mlp_line


@pytest.mark.parametrize(
    "change, params, reason",
    [
        (lambda t: t.double(), {}, "takes float32, bfloat16 or float16, got torch.float64"),
        (lambda t: t.repeat(1, 1, 1, 17), {}, "takes head widths 1 to 256, got 272"),
        (lambda t: t, {"scale": 0.0}, "needs a scale above 0, got 0.0"),
    ],
)
def test_objects_with_a_reason(change, params, reason):
    tensors = [change(t.detach()) for t in make(1, 4, 2, 16)]
    with use_backend("gpu"), pytest.raises(NotImplementedError, match=reason):
        attention(*tensors, **params)
