"""A bias of -inf masks a key on every backend: a query without a live key gives zero, forward and backward."""

import pytest
import torch

from peakgpt.kernels.core.dispatch import BACKENDS, use_backend
from peakgpt.kernels.ops.attention import attention

# T, S, K, sizes of the bias, parameters
CASES = [
    (9, 9, 2, (2, 2), {}),
    (9, 9, 2, (2, 1), {"causal": False}),
    (9, 9, 1, (1, 2), {"window": 4}),
    (5, 9, 2, (1, 1), {"window": 3, "causal": False}),
    (1, 17, 2, (2, 2), {"causal": False}),
    (17, 17, 2, (2, 1), {"alibi": torch.tensor([0.5, 0.25])}),
    (9, 9, 2, (2, 2), {"kv_start": torch.tensor([0, 3]), "kv_len": torch.tensor([7, 4])}),
    (9, 9, 2, (2, 2), {"dropout": 0.3, "seed": torch.tensor([3])}),
    (9, 9, 2, (2, 1), {"dropout": 0.3, "seed": torch.tensor([5]), "causal": False, "window": 3}),
    (9, 9, 2, (2, 2), {"softcap": 2.0}),
    (9, 9, 2, (2, 1), {"softcap": 2.0, "sinks": torch.tensor([1.0, 2.0]), "causal": False}),
    (3, 17, 2, (2, 2), {"sinks": torch.tensor([1.0, -torch.inf])}),
]


def holes(*shape):
    generator = torch.Generator().manual_seed(1)
    live = (torch.rand(shape, generator=generator) > 0.5) & (torch.rand(*shape[:-1], 1, generator=generator) > 0.3)
    live[..., 0, :] = False  # at least one query without a key
    return live


def run(backend, dtype, case, bias):
    queries, keys, kv_heads, _, params = case
    torch.manual_seed(0)
    sizes = (queries, 2), (keys, kv_heads), (keys, kv_heads)
    tensors = [torch.randn(2, n, heads, 16).to(dtype).requires_grad_() for n, heads in sizes]
    bias = bias.detach().clone().to(dtype).requires_grad_()
    with use_backend(backend):
        y = attention(*tensors, bias=bias, **params)
    upstream = torch.linspace(-1, 1, y.numel()).to(dtype).view(y.shape)
    return y.detach(), *torch.autograd.grad(y, (*tensors, bias), upstream)


# The interpreter of Triton is slow, and each parameter has a test of its own.
GPU = [("gpu", torch.float32, CASES[i]) for i in (1, 2, 6, 7, 10)]
OTHERS = [(b, d, case) for b in BACKENDS if b != "gpu" for d in (torch.float32, torch.bfloat16) for case in CASES]


@pytest.mark.parametrize(("backend", "dtype", "case"), GPU + OTHERS, ids=str)
def test_bias_of_minus_infinity_masks_and_a_query_without_keys_gives_zero(backend, dtype, case):
    queries, keys, _, sizes, _ = case
    torch.manual_seed(2)
    live = holes(*sizes, queries, keys)
    bias = torch.randn(live.shape).masked_fill(~live, float("-inf"))
    results = run(backend, dtype, case, bias)
    dead = ~live.any(-1)
    for tensor in results[:2]:  # y and dq
        rows = tensor.transpose(1, 2)[dead.expand(2, 2, queries)]
        assert rows.numel() and not rows.any()
    assert not results[4][~live].any()
    expected = run("eager", torch.float64, case, bias)
    for got, right in zip(results, expected, strict=True):
        limit = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(got.double(), right, rtol=limit, atol=limit * float(right.abs().max()))
    if sizes[0] == 2 and backend != "gpu":
        bias[1] = 0.0
        others = run(backend, dtype, case, bias)
        assert torch.equal(others[0][0], results[0][0]) and torch.equal(others[1][0], results[1][0])
