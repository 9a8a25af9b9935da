"""The C++ attention on every instruction set: values and gradients against float64, and properties that hold bitwise.

Mutations that these tests catch: a missing mask, dv scaled by 1.01, the padding rows of an odd number of keys counted
in the softmax, a window one key too wide, dead keys read, the cap missing in the backward pass, ds without its slope, a
sink of another head.
"""

import pytest
import torch

from peakgpt.kernels.core.dispatch import load, use_backend
from peakgpt.kernels.ops.attention import attention, attention_qkv

_C = pytest.importorskip("peakgpt._C")

FLOOR = {torch.float32: 1e-6, torch.bfloat16: 2e-3}  # relative to the largest value; a few ulp, half an ulp
TERMS = ("alibi", "bias", "sinks")  # arguments with a gradient besides q, k and v

# B, T, S, H, K, D, parameters. A list becomes a tensor; bias is given by its first two sizes.
CASES = [
    (1, 63, 63, 2, 2, 64, {}),
    (2, 64, 64, 1, 1, 64, {}),
    (1, 65, 65, 3, 3, 64, {}),
    (1, 129, 129, 1, 1, 40, {}),
    (1, 193, 193, 1, 1, 64, {}),
    (1, 5, 5, 2, 2, 256, {}),
    (1, 4, 4, 2, 2, 8, {}),
    (1, 17, 17, 2, 2, 8, {"causal": False}),
    (1, 70, 131, 1, 1, 72, {"causal": False}),
    (1, 65, 130, 2, 2, 32, {}),
    (1, 130, 65, 2, 2, 32, {}),
    (3, 1, 71, 2, 2, 24, {}),
    (1, 1, 129, 4, 1, 160, {"scale": 0.1}),
    (2, 130, 130, 6, 2, 64, {}),
    (1, 67, 67, 4, 1, 128, {}),
    (1, 200, 200, 1, 1, 64, {"window": 1}),
    (1, 200, 200, 1, 1, 64, {"window": 65}),
    (1, 150, 150, 1, 1, 16, {"window": 70, "causal": False}),
    (1, 3, 90, 2, 1, 16, {"window": 9}),
    (1, 100, 100, 2, 1, 64, {"alibi": [0.5, 0.0625]}),
    (1, 2, 66, 2, 2, 64, {"alibi": [0.5, 0.0625]}),
    (2, 80, 80, 2, 2, 64, {"kv_start": [3, 0], "kv_len": [70, 80]}),
    (2, 70, 150, 2, 2, 64, {"kv_len": [129, 17], "causal": False}),
    (3, 1, 40, 2, 2, 64, {"kv_start": [5, 0, 39], "kv_len": [30, 1, 1]}),
    (2, 66, 66, 2, 2, 16, {"kv_start": [65, 10], "window": 33}),
    (1, 200, 200, 2, 1, 64, {"cu_seqlens": [0, 1, 18, 18, 100, 163, 200, 200]}),
    (1, 200, 200, 1, 1, 24, {"cu_seqlens": [0, 0, 65, 130, 200], "causal": False}),
    (1, 130, 130, 2, 2, 16, {"cu_seqlens": [0, 70, 130], "window": 33, "alibi": [0.5, 0.0625]}),
    (1, 130, 130, 1, 1, 16, {"cu_seqlens": [0, 7, 130], "kv_start": [3], "kv_len": [100], "causal": False}),
    (1, 4, 4, 2, 2, 16, {"cu_seqlens": [0, 1, 4]}),
    (2, 70, 70, 2, 2, 16, {"bias": (2, 2)}),
    (3, 65, 130, 4, 2, 24, {"bias": (1, 1)}),
    (2, 129, 17, 4, 1, 64, {"bias": (1, 4), "causal": False}),
    (2, 18, 140, 2, 2, 16, {"bias": (2, 1), "window": 70, "alibi": [0.5, 0.0625], "kv_len": [139, 80]}),
    (2, 4, 33, 4, 2, 32, {"bias": (1, 4)}),
    (1, 100, 100, 2, 1, 16, {"bias": (1, 2), "cu_seqlens": [0, 30, 100]}),
    (2, 129, 129, 4, 2, 64, {"dropout": 0.3, "seed": [7]}),
    (1, 70, 133, 1, 1, 24, {"dropout": 0.9, "seed": [-(2**63)], "causal": False}),
    (2, 3, 70, 2, 2, 16, {"dropout": 0.5, "seed": [2**40]}),
    (2, 90, 90, 2, 1, 16, {"dropout": 0.1, "seed": [3], "bias": (1, 1), "alibi": [0.5, 0.25], "window": 40}),
    (1, 90, 90, 2, 2, 16, {"dropout": 0.1, "seed": [4], "cu_seqlens": [0, 20, 90], "alibi": [0.5, 0.25]}),
    (1, 130, 130, 2, 2, 64, {"softcap": 1.5}),
    (2, 3, 70, 2, 1, 24, {"softcap": 1.5, "alibi": [0.5, 0.0625]}),
    (2, 100, 100, 2, 1, 64, {"sinks": [2.0, -0.5]}),
    (2, 4, 71, 2, 2, 32, {"sinks": [2.0, 0.5], "bias": (1, 2)}),
    (1, 67, 67, 2, 2, 8, {"sinks": [300.0, -torch.inf]}),
    (1, 150, 150, 2, 2, 16, {"softcap": 50.0, "sinks": [2.0, 3.0], "window": 70, "alibi": [0.5, 0.0625]}),
    (2, 66, 66, 2, 2, 16, {"softcap": 2.0, "sinks": [2.0, 3.0], "kv_start": [65, 10], "window": 33}),
    (1, 100, 100, 2, 1, 16, {"softcap": 2.0, "sinks": [2.0, 3.0], "bias": (1, 2), "cu_seqlens": [0, 30, 100]}),
    (2, 90, 90, 2, 1, 16, {"softcap": 2.0, "sinks": [2.0, 3.0], "dropout": 0.3, "seed": [3], "bias": (1, 1)}),
]
IDS = ["x".join(map(str, case[:6])) + "".join(f"-{name}" for name in case[6]) for case in CASES]


@pytest.fixture(autouse=True)
def compute_in_bfloat16():
    """Make torch compute in bfloat16. It uses float32 if the mask needs a gradient, but the baseline is bfloat16."""
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # also on CPU
    yield
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(False)


def draw(case, dtype, seed=0):
    """Return [q, k, v, upstream gradient] and the parameters, as tensors."""
    batch, tokens, keys, heads, kv_heads, width, params = case
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, tokens, heads, width), *[(batch, keys, kv_heads, width)] * 2, (batch, tokens, heads, width)
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    params = {n: torch.tensor(v) if isinstance(v, list) else v for n, v in params.items()}
    if "bias" in params:
        params["bias"] = torch.randn(*params["bias"], tokens, keys, generator=generator).to(dtype)
    return tensors, params


def run(backend, tensors, params):
    """Return out, then the gradients of q, k and v, and of alibi, bias and sinks if given."""
    *inputs, upstream = tensors
    leaves = [t.detach().requires_grad_() for t in inputs]
    terms = {n: params[n].detach().requires_grad_() for n in TERMS if n in params}
    with use_backend(backend):
        out = attention(*leaves, **params | terms)
    return [out.detach(), *torch.autograd.grad(out, [*leaves, *terms.values()], upstream)]


def widened(params):
    return {n: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for n, v in params.items()}


def same(first, second):
    """Whether two lists of tensors are bitwise equal."""
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", FLOOR, ids=str)
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_values_and_gradients_are_within_twice_torchs_error(isa, case, dtype):
    tensors, params = draw(case, dtype)
    truth = run("eager", [t.double() for t in tensors], widened(params))
    torchs, ours = run("eager", tensors, params), run("cpu", tensors, params)
    names = ["out", "dq", "dk", "dv", *(f"d{n}" for n in TERMS if n in params)]
    for name, a, b, t in zip(names, ours, torchs, truth, strict=True):
        assert a.dtype == b.dtype
        error, allowed = ((x.double() - t).abs().max().item() for x in (a, b))
        limit = 2 * allowed + FLOOR[dtype] * t.abs().max().item()
        assert error <= limit, f"{name}: error {error:.3e}, torch's {allowed:.3e}, limit {limit:.3e}"
    assert same(ours, run("cpu", tensors, params)), "not repeatable"


@pytest.mark.parametrize("dtype", FLOOR, ids=str)
def test_saved_lse_equals_float64(isa, dtype):
    (q, k, v, _), _ = draw((2, 70, 70, 4, 2, 32, {}), dtype)
    out, lse = torch.full_like(q, torch.nan), torch.full((2, 4, 70), torch.nan)
    load("cpu", "attention").attend(out, lse, q, k, v)
    scores = torch.einsum("bthd,bshd->bhts", q.double(), k.double().repeat_interleave(2, 2)) / 32**0.5
    truth = scores.masked_fill(torch.ones(70, 70).triu(1).bool(), -torch.inf).logsumexp(-1)
    torch.testing.assert_close(lse.double(), truth, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-4)


@pytest.mark.parametrize("dtype", FLOOR, ids=str)
@pytest.mark.parametrize("tokens", (3, 20))
def test_query_without_live_keys_gives_zeros_for_any_values_of_dead_keys(isa, dtype, tokens):
    """out is 0, lse is -inf and the gradients are 0, although the dead keys are NaN."""
    (q, k, v, upstream), _ = draw((2, tokens, 18, 2, 2, 16, {}), dtype)
    length = torch.tensor([0, 18 - tokens if tokens < 18 else 2])
    for b, n in enumerate(length):
        k[b, n:], v[b, n:] = torch.nan, torch.nan
    out, lse = torch.full_like(q, torch.nan), torch.full((2, 2, tokens), torch.nan)
    backend = load("cpu", "attention")
    backend.attend(out, lse, q, k, v, kv_len=length)
    grads = [torch.full_like(t, torch.nan) for t in (q, k, v)]
    backend.gradients(dict(zip(("dq", "dk", "dv"), grads, strict=True)), upstream, out, lse, q, k, v, kv_len=length)
    dead = max(0, tokens - 18)  # causal: the first queries are before all keys
    assert not out[0].any() and (lse[0] == -torch.inf).all()
    assert not out[1, :dead].any() and (lse[1, :, :dead] == -torch.inf).all() and lse[1, :, dead:].isfinite().all()
    assert all(not g[0].any() and g[1].isfinite().all() for g in grads)
    assert not grads[0][1, :dead].any()
    assert not grads[1][1, length[1] :].any() and not grads[2][1, length[1] :].any()
    assert out[1, dead:].any() and grads[2][1, 0].any()


@pytest.mark.parametrize("token", (1, 16, 63, 64, 65, 128))
def test_outputs_before_a_changed_token_are_bitwise_equal(isa, token):
    tensors, _ = draw((1, 130, 130, 2, 1, 64, {}), torch.bfloat16)
    before = run("cpu", tensors, {})[0]
    for t in tensors[:3]:
        t[:, token:] += 100
    after = run("cpu", tensors, {})[0]
    assert torch.equal(before[:, :token], after[:, :token])
    assert not torch.equal(before[:, token:], after[:, token:])


@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("dtype", FLOOR, ids=str)
def test_packed_documents_do_not_change_each_others_bits(isa, dtype, causal):
    """Values and gradients, also of documents in one tile of queries. The changed document is NaN."""
    bounds = [0, 16, 80, 144, 200]  # multiples of the vector width: no vector has tokens of two documents
    tensors, _ = draw((1, 200, 200, 2, 1, 32, {}), dtype)
    params = {"causal": causal, "cu_seqlens": torch.tensor(bounds)}
    before = run("cpu", tensors, params)
    for document in (1, 2):
        start, stop = bounds[document : document + 2]
        changed = [t.clone() for t in tensors]
        for t in changed:
            t[:, start:stop] = torch.nan
        after = run("cpu", changed, params)
        for a, b in zip(before, after, strict=True):
            assert torch.equal(a[:, :start], b[:, :start]) and torch.equal(a[:, stop:], b[:, stop:])
            assert b[:, start:stop].isnan().all()


def run_with_dropout(*tensors, backend="cpu", call=attention, **params):
    """Return out and the gradients of q, k and v with dropout. Without `seed` it comes from torch's generator."""
    *inputs, upstream = tensors
    leaves = [t.detach().requires_grad_() for t in inputs]
    with use_backend(backend):
        out = call(*leaves, dropout=0.25, **params)
        return [out, *torch.autograd.grad(out, leaves, upstream)]


def test_dropout_follows_torchs_generator_or_a_given_seed():
    """manual_seed repeats the mask, the next call has another mask, and a given seed does not advance the generator."""
    tensors, _ = draw((2, 70, 70, 2, 2, 16, {}), torch.float32)
    torch.manual_seed(3)
    first, second = run_with_dropout(*tensors), run_with_dropout(*tensors)
    torch.manual_seed(3)
    given = run_with_dropout(*tensors, seed=torch.tensor([3]))
    again = run_with_dropout(*tensors)
    assert same(first, again) and not same(first, second) and not same(first, given)
    assert same(given, run_with_dropout(*tensors, seed=torch.tensor([3], dtype=torch.int32)))


def test_checkpointed_block_recomputes_the_same_dropout_mask():
    tensors, _ = draw((2, 70, 70, 2, 2, 16, {}), torch.float32)

    def checkpointed(*leaves, **params):
        return torch.utils.checkpoint.checkpoint(attention, *leaves, use_reentrant=False, **params)

    torch.manual_seed(3)
    expected = run_with_dropout(*tensors)
    torch.manual_seed(3)
    assert same(run_with_dropout(*tensors, call=checkpointed), expected)


@pytest.mark.parametrize("width", (16, 12), ids=("cpu", "eager"))
def test_compiled_forward_and_backward_use_the_same_dropout_mask(width):
    """out is linear in v, so <dv, v> = <dout, out>. Width 12 runs the eager backend, which recomputes forward."""
    tensors, _ = draw((2, 70, 70, 2, 2, width, {}), torch.float64 if width == 12 else torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(lambda q, k, v: attention(q, k, v, dropout=0.25), fullgraph=True, backend="aot_eager")
    q, k, v, upstream = tensors
    v = v.requires_grad_()
    torch.manual_seed(3)
    out = compiled(q, k, v)
    (dv,) = torch.autograd.grad(out, v, upstream)
    torch.testing.assert_close((dv * v).sum(), (out * upstream).sum())
    if width == 16:
        torch.manual_seed(3)
        expected, _, _, expected_dv = run_with_dropout(*tensors)
        assert same([out, dv], [expected, expected_dv])


@pytest.mark.parametrize("dtype", FLOOR, ids=str)
def test_strides_of_inputs_and_upstream_gradient_do_not_change_the_bits(isa, dtype):
    """Views of a packed projection, (B, H, T, D) layout, an odd offset, a strided last axis; expanded gradients."""
    tensors, _ = draw((2, 70, 70, 2, 2, 24, {}), dtype)
    expected = run("cpu", tensors, {})
    *inputs, upstream = tensors
    packed = torch.cat(inputs, 2)
    for views in (
        packed.split(2, 2),
        [t.transpose(1, 2).contiguous().transpose(1, 2) for t in inputs],
        [torch.cat([t.new_zeros(2, 70, 2, 1), t], 3)[..., 1:] for t in inputs],
        [t.transpose(1, 3).contiguous().transpose(1, 3) for t in inputs],
    ):
        for dout in (upstream, upstream.transpose(1, 3).contiguous().transpose(1, 3)):
            assert same(run("cpu", [*views, dout], {}), expected)
    expanded = run("cpu", [*inputs, upstream.new_ones(1).expand_as(upstream)], {})
    assert same(expanded, run("cpu", [*inputs, torch.ones_like(upstream)], {}))


@pytest.mark.parametrize("dtype", FLOOR, ids=str)
@pytest.mark.parametrize("tokens", (3, 70))
def test_strides_and_dtype_of_the_bias_do_not_change_the_bits(isa, dtype, tokens):
    """Transposed, expanded over keys, or float32 with bfloat16 inputs. -inf masks keys, and all keys of one query."""
    tensors, params = draw((2, tokens, 75, 2, 1, 16, {"bias": (1, 2), "causal": False}), dtype)
    bias = params["bias"].clone()
    bias[0, 1, 1, 20:] = bias[0, 0, 2] = -torch.inf
    expected = run("cpu", tensors, {"bias": bias, "causal": False})
    assert (
        all(r.isfinite().all() for r in expected) and not expected[0][:, 2, 0].any() and not expected[4][0, 0, 2].any()
    )
    for same_bias in (bias.transpose(2, 3).contiguous().transpose(2, 3), bias.expand(4, -1, -1, -1)[2:3]):
        assert same(run("cpu", tensors, {"bias": same_bias, "causal": False}), expected)
    *results, gradient = run("cpu", tensors, {"bias": bias.float(), "causal": False})
    assert same([*results, gradient.to(dtype)], expected)
    column = bias[..., :1].expand_as(bias)
    assert same(
        run("cpu", tensors, {"bias": column, "causal": False}),
        run("cpu", tensors, {"bias": column.clone(), "causal": False}),
    )


@pytest.mark.parametrize("dtype", FLOOR, ids=str)
def test_attention_qkv_is_bitwise_equal_to_attention(isa, dtype):
    (q, k, v, upstream), _ = draw((2, 70, 70, 4, 2, 32, {}), dtype)
    expected = run("cpu", [q, k, v, upstream], {"window": 33})
    packed = torch.cat([q, k, v], 2).requires_grad_()
    with use_backend("cpu"):
        out = attention_qkv(packed, n_head=4, window=33)
    (gradient,) = torch.autograd.grad(out, packed, upstream)
    assert same([out, *gradient.split((4, 2, 2), 2)], expected)


THREAD_CASES = [
    (1, 150, 150, 1, 1, 64, {}),
    (1, 70, 200, 6, 3, 16, {"window": 100}),
    (1, 200, 200, 2, 1, 16, {"alibi": [0.5, 0.0625], "cu_seqlens": [0, 90, 200]}),
    (1, 150, 150, 2, 1, 16, {"dropout": 0.2, "seed": [5]}),
    (3, 150, 150, 4, 2, 16, {"softcap": 2.0, "sinks": [1.0, 2.0, 3.0, 4.0]}),
    *(
        (3, 150, 150, 4, 2, 16, {"bias": shape, "alibi": [0.5, 0.25, 0.125, 0.0625]})
        for shape in ((1, 1), (3, 1), (1, 4), (3, 4))
    ),
]


@pytest.mark.parametrize("dtype", FLOOR, ids=str)
@pytest.mark.parametrize("case", THREAD_CASES, ids=str)
def test_bits_do_not_depend_on_the_number_of_threads(case, dtype, threads):
    """Backward is one pass over whole heads on one thread, and two passes over pieces if threads outnumber heads."""
    tensors, params = draw(case, dtype)
    results = []
    for count in (1, 2, 4, 5):
        threads(count)
        results += [run("cpu", tensors, params) for _ in range(2)]
    assert all(same(results[0], other) for other in results[1:])


@pytest.mark.parametrize("required", ("q", "k", "v", "qv"))
def test_only_required_gradients_are_computed(required):
    tensors, _ = draw((1, 70, 70, 2, 2, 16, {}), torch.float32)
    *inputs, upstream = tensors
    full = run("cpu", tensors, {})[1:]
    leaves = [t.detach().requires_grad_(n in required) for n, t in zip("qkv", inputs, strict=True)]
    with use_backend("cpu"):
        attention(*leaves).backward(upstream)
    for name, leaf, gradient in zip("qkv", leaves, full, strict=True):
        assert torch.equal(leaf.grad, gradient) if name in required else leaf.grad is None


@pytest.mark.parametrize("sizes", ((0, 5, 5), (2, 0, 0), (2, 0, 5), (2, 5, 0)), ids=str)
def test_empty_batch_queries_or_keys_give_zeros(sizes):
    tensors, _ = draw((*sizes, 2, 2, 16, {}), torch.float32)
    results = run("cpu", tensors, {"causal": False})
    assert [r.shape for r in results] == [tensors[i].shape for i in (0, 0, 1, 2)]
    assert not any(r.any() for r in results)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.float16}, "got float16"),
        ({"dtype": torch.float64}, "got float64"),
        ({"width": 12}, "multiples of 8"),
        ({"width": 264}, "up to 256"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unsupported_dtype_or_width_raises_the_objection(change, message):
    change = dict(change)
    q = torch.zeros(1, 4, 1, change.pop("width", 16), dtype=change.pop("dtype", torch.float32))
    with use_backend("cpu"), pytest.raises(NotImplementedError, match=message):
        attention(q, q, q, **change)
