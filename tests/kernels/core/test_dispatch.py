"""The choice of a backend, forced backends, and the errors of invalid calls."""

import math

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from peakgpt.kernels.core.dispatch import BACKENDS, forced_backend, use_backend
from peakgpt.kernels.ops import catalogue
from peakgpt.kernels.ops.attention import attention
from peakgpt.kernels.ops.attention_math import live_pairs
from peakgpt.kernels.ops.linear_cross_entropy import linear_cross_entropy
from peakgpt.kernels.ops.norm import layernorm

X, W = torch.randn(3, 8), torch.randn(8)


def heads(count):
    return torch.randn(1, 4, count, 8)


def attend(**options):
    return attention(heads(2), heads(2), heads(2), **options)


def loss(target, **params):
    return linear_cross_entropy(X, torch.randn(5, 8), torch.tensor(target), **params)


def embed(ids, wpe):
    return catalogue.embedding(ids, torch.randn(5, 8), wpe)


def test_forced_backend_that_objects_raises_its_reason():
    with (
        use_backend("cpu"),
        pytest.raises(NotImplementedError, match=r"layernorm: backend 'cpu' is forced but objects: .*float64"),
    ):
        layernorm(X.double(), W.double())


def test_use_backend_ends_with_its_block_after_an_error():
    with pytest.raises(RuntimeError), use_backend("cpu"):
        raise RuntimeError
    assert forced_backend() is None
    assert layernorm(X.double(), W.double()).dtype == torch.float64  # a forced cpu backend would object


def test_explain_lists_backends_in_order_and_eager_never_objects():
    reasons = layernorm.explain(X.double(), W.double())
    assert tuple(reasons) == tuple(BACKENDS) == ("gpu", "cpu", "eager")
    assert reasons["eager"] is None and "float64" in reasons["cpu"]


def test_gpu_objects_to_cpu_tensors_unless_forced():
    assert layernorm.explain(X, W)["gpu"] in (
        "no CUDA device",
        "takes cuda tensors, got cpu",
        "no gpu kernel for layernorm yet",
    )


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: use_backend("tpu").__enter__(), ValueError, r"unknown backend: got 'tpu', expected one of gpu, cpu, "),
        (lambda: layernorm(X, torch.randn(9)), ValueError, r"w has shape \(9,\), expected \(8\)"),
        (lambda: layernorm(X, W.bfloat16()), ValueError, r"w has dtype torch.bfloat16, expected x's dtype torch.fl"),
        (lambda: layernorm(X.long(), W), ValueError, r"x has dtype torch.int64, expected a floating dtype"),
        (lambda: layernorm(X, W.to("meta")), ValueError, r"w is on meta, expected x's device cpu"),
        (lambda: layernorm(torch.tensor(1.0), W), ValueError, r"x has shape \(\), expected at least one axis"),
        (lambda: layernorm([1.0], W), TypeError, r"x is list, expected a Tensor"),
        (lambda: layernorm(X, None), TypeError, r"w is NoneType, expected a Tensor"),
        (lambda: layernorm(X, W, epsilon=1), TypeError, r"unexpected keyword argument 'epsilon'"),
        (lambda: layernorm(X), TypeError, r"missing a required argument: 'w'"),
        (lambda: attention(heads(3), heads(3), heads(2)), ValueError, r"v has shape"),
        (lambda: attention(heads(3), heads(2), heads(2)), ValueError, r"3 query heads over 2 key heads"),
        (lambda: attention(heads(2), heads(2), heads(2), window=0), ValueError, r"window is 0, expected"),
        (lambda: attend(alibi=torch.ones(2, device="meta")), ValueError, r"alibi is on meta, expected q's device cpu"),
        (lambda: attend(alibi=torch.ones(2).long()), ValueError, r"alibi has dtype torch.int64, expected q's dtype"),
        (lambda: attend(sinks=torch.ones(2).long()), ValueError, r"sinks has dtype torch.int64, expected a floating"),
        (lambda: attend(sinks=torch.ones(2, device="meta")), ValueError, r"sinks is on meta, expected cpu"),
        (lambda: attend(sinks=torch.ones(3)), ValueError, r"sinks has shape \(3,\), expected \(2\)"),
        (lambda: attend(softcap=-1.0), ValueError, r"softcap is -1.0, expected a finite number above 0"),
        (lambda: attend(softcap=math.inf), ValueError, r"softcap is inf, expected a finite number above 0"),
        (lambda: attend(bias=torch.ones(1, 1, 4, 4).bool()), ValueError, r"bias has dtype torch.bool, expected q's"),
        (lambda: attend(bias=torch.ones(1, 2, 4, 5)), ValueError, r"bias has shape \(1, 2, 4, 5\), expected"),
        (lambda: attend(kv_start=torch.ones(1)), ValueError, r"kv_start has dtype torch.float32, expected int64 or"),
        (lambda: attend(kv_len=torch.ones(1).int().to("meta")), ValueError, r"kv_len is on meta, expected cpu"),
        (lambda: attend(cu_seqlens=torch.tensor([4])), ValueError, r"\(1,\), expected at least 2 entries"),
        (lambda: attend(cu_seqlens=torch.tensor([0, 5])), ValueError, r"is \[0, 5\], expected to ascend from 0 to 4"),
        (lambda: attend(cu_seqlens=torch.tensor([0, 3, 2, 4])), ValueError, r"expected to ascend from 0 to 4"),
        (lambda: attend(masked=True), TypeError, r"^attention: got .* 'masked', expected q, k, v, "),
        (lambda: loss([0, 5, 1]), ValueError, r"values 0 to 5, expected 0 to 4"),
        (lambda: loss([0.0, 1.0, 1.0]), ValueError, r"dtype torch.float32, expected int64"),
        (lambda: loss([0, 1, 1], reduction="avg"), ValueError, r"reduction is 'avg'"),
        (lambda: embed(torch.zeros(1, 4).long(), torch.randn(3, 8)), ValueError, r"positions 0 to 3"),
    ],
)  # fmt: skip
def test_invalid_calls_raise_an_error_with_got_and_expected(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("name", ["embedding", "linear_cross_entropy"])
def test_compiled_code_checks_the_range_of_ids(name):
    """Fails if only the direct call checks values: tracing has no values, so C++ would write outside of its buffer."""
    bad, table = torch.tensor([[0, 9]]), torch.randn(5, 8)

    def call(ids, x):
        return embed(ids, None) if name == "embedding" else linear_cross_entropy(x, table, ids)

    torch._dynamo.reset()
    with pytest.raises(ValueError, match="values 0 to 9, expected 0 to 4"):
        torch.compile(call, backend="aot_eager")(bad, torch.randn(1, 2, 8))


@pytest.mark.parametrize("trainable", (True, False))
def test_compiled_code_chooses_the_same_backend_as_a_direct_call(trainable):
    """Fails if an objection reads requires_grad of a tensor: in compiled code it is always False."""
    q, slopes = torch.randn(1, 70, 2, 8, requires_grad=True), torch.tensor([0.5, 0.25], requires_grad=trainable)
    differentiated = [q, slopes] if trainable else [q]
    torch._dynamo.reset()
    results = []
    for call in (attention, torch.compile(attention, fullgraph=True, backend="aot_eager")):
        y = call(q, q, q, alibi=slopes)
        results.append([y, *torch.autograd.grad(y.square().sum(), differentiated)])
    for direct, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, direct, rtol=1e-5, atol=1e-6)


def test_backward_of_the_library_op_does_not_overwrite_saved_tensors():
    """Fails if it does: a library op may not change or return one of its inputs."""
    x, w = (torch.randn(n, 8, requires_grad=True) for n in (3, 5))
    with FlopCounterMode(display=False):  # a dispatch mode selects the library op
        value = loss_of(x, w)
    saved = [t for t in value.grad_fn.saved_tensors if t.shape == w.shape]
    before = {t.data_ptr() for t in saved}
    value.backward()
    assert len(saved) == 2 and w.grad.data_ptr() not in before


def loss_of(x, w):
    return linear_cross_entropy(x, w, torch.tensor([0, 4, 1]))


def test_backward_gives_no_gradient_if_a_later_function_returns_none():
    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return None

    x, w = X.clone().requires_grad_(), W.clone().requires_grad_()
    (Stop.apply(layernorm(x, w)).sum() + x.sum()).backward()
    assert torch.equal(x.grad, torch.ones_like(x)) and w.grad is None


def test_torch_func_and_forward_mode_run_the_eager_function():
    """Fails if a backend runs. Backends support neither, and the tangent would be lost without an error."""
    tangent, eager = torch.randn_like(X), layernorm.eager
    with forward_ad.dual_level():
        got = forward_ad.unpack_dual(layernorm(forward_ad.make_dual(X, tangent), W)).tangent
        expected = forward_ad.unpack_dual(eager(forward_ad.make_dual(X, tangent), W)).tangent
    torch.testing.assert_close(got, expected)
    got, expected = (torch.func.grad(lambda x, f=f: f(x, W).pow(3).sum())(X) for f in (layernorm, eager))
    torch.testing.assert_close(got, expected)
    with use_backend("cpu"), pytest.raises(NotImplementedError, match=r"forced under a transform of torch\.func"):
        torch.func.grad(lambda x: layernorm(x, W).sum())(X)


def test_meta_tensors_are_supported():
    assert layernorm(X.to("meta"), W.to("meta")).device.type == "meta"


def test_query_without_live_keys_gives_zero_and_zero_gradient():
    q, k, v = (torch.randn(2, 3, 1, 8, dtype=torch.float64, requires_grad=True) for _ in "qkv")
    with use_backend("eager"):
        y = attention(q, k, v, kv_start=torch.tensor([0, 2]), kv_len=torch.tensor([3, 1]))
    grads = torch.autograd.grad(y.sum(), (q, k, v))
    assert (y[1, :2] == 0).all() and (y[1, 2] != 0).all()
    assert all(torch.isfinite(g).all() for g in grads) and (grads[0][1, :2] == 0).all()


def test_packed_documents_do_not_attend_to_each_other():
    q, k, v = (torch.randn(1, 7, 2, 8) for _ in "qkv")
    packed = attention(q, k, v, cu_seqlens=torch.tensor([0, 3, 7], dtype=torch.int32))
    separate = [attention(q[:, s], k[:, s], v[:, s]) for s in (slice(0, 3), slice(3, 7))]
    torch.testing.assert_close(packed, torch.cat(separate, 1))


@pytest.mark.parametrize(
    ("queries", "keys", "causal", "window"),
    [(4, 4, True, None), (3, 5, True, 2), (5, 3, True, None), (2, 7, False, None)],
)
def test_live_pairs_equals_the_sum_of_the_mask(queries, keys, causal, window):
    from peakgpt.kernels.ops.attention_math import live_mask

    mask = live_mask(torch.empty(1, queries, 1, 1), torch.empty(1, keys, 1, 1), causal, window)
    assert live_pairs(queries, keys, causal, window) == (queries * keys if mask is None else int(mask.sum()))
