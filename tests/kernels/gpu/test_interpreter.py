"""The interpreter, corrected by the package and made strict by tests/helpers, versus torch; unpatched Triton fails."""

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled, not interpreted, here")


@triton.jit
def cast_copy(x_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + i, tl.load(x_ptr + i).to(y_ptr.dtype.element_ty))


@triton.jit
def matmul(a_ptr, b_ptr, y_ptr, N: tl.constexpr, PRECISION: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    tl.store(y_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at), input_precision=PRECISION))


@triton.jit
def add(x_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    tl.store(y_ptr + i, x + x)


@triton.jit
def total(x_ptr, y_ptr, N: tl.constexpr):
    tl.store(y_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, N)), axis=0))


@triton.jit
def load_past_end(x_ptr, y_ptr, live, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < live).to(tl.float32))


def test_casts_round_to_nearest_even():
    edges = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1.00390625, 1.01171875, 3.4e38, 1e-39])
    x = torch.cat([edges, torch.randn(1024 - len(edges))])
    down, up = torch.empty(1024, dtype=torch.bfloat16), torch.empty(1024)
    cast_copy[(1,)](x_ptr=x, y_ptr=down, N=1024)
    torch.testing.assert_close(down, x.bfloat16(), rtol=0, atol=0, equal_nan=True)
    cast_copy[(1,)](x_ptr=down, y_ptr=up, N=1024)
    torch.testing.assert_close(up, down.float(), rtol=0, atol=0, equal_nan=True)


def test_bf16_dot_multiplies_values_not_bit_patterns():
    a, b = (torch.randn(32, 32).bfloat16() for _ in range(2))
    y = torch.empty(32, 32)
    matmul[(1,)](a_ptr=a, b_ptr=b, y_ptr=y, N=32, PRECISION="ieee")
    torch.testing.assert_close(y, a.float() @ b.float())


@pytest.mark.parametrize("precision, low, high", [("ieee", 0.0, 1e-6), ("tf32", 1e-5, 1e-2)])
def test_dot_uses_input_precision(precision, low, high):
    a, b = torch.randn(32, 32), torch.randn(32, 32)
    y = torch.empty(32, 32)
    matmul[(1,)](a_ptr=a, b_ptr=b, y_ptr=y, N=32, PRECISION=precision)
    exact = a.double() @ b.double()
    assert low <= ((y - exact).norm() / exact.norm()).item() <= high


@pytest.mark.parametrize("kernel", [add, total])
def test_bf16_arithmetic_raises(kernel):
    x = torch.randn(16).bfloat16()
    with pytest.raises(Exception, match="cast to float32 first"):
        kernel[(1,)](x_ptr=x, y_ptr=torch.empty_like(x), N=16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_masked_load_without_other_gives_nan(dtype):
    y = torch.zeros(16)
    load_past_end[(1,)](x_ptr=torch.ones(16, dtype=dtype), y_ptr=y, live=9, N=16)
    assert (y[:9] == 1).all() and y[9:].isnan().all()
