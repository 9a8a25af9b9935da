"""The matrix product of csrc/gemm/gemm.cpp: exact on integers for all layouts, instruction sets, edges and threads.

Mutations that these tests catch: the second block of k stored instead of added, a column panel's tail written in full,
a K tail not zeroed, sums of a restarted at each block of k, the derivative evaluated at the product instead of at pre.
"""

import itertools
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from peakgpt.kernels.cpu.gemm import ACTIVATE, ADD, SLOPE, gemm

DTYPES = (torch.float32, torch.bfloat16)
POISON = 1234.0
# SMALL: around the register tile and the panels. LARGE: past each block (1024 rows, 3072 columns, 1024 or 2048 of k).
SMALL = list(itertools.product((1, 3, 4, 5, 8, 17), (1, 2, 31, 33), (1, 15, 47, 49)))
LARGE = [(1030, 37, 60), (20, 2100, 100), (2, 4100, 100), (9, 40, 3100), (1100, 1050, 130)]


def integers(rows, columns, dtype, transposed=False):
    """Random integers, unaligned, inside a buffer of NaN: exact in bfloat16, and sums of their products in float32."""
    shape = (columns, rows) if transposed else (rows, columns)
    buffer = torch.full((shape[0] + 1, shape[1] + 3), math.nan, dtype=dtype)
    view = buffer[:-1, 1:-2]
    view.copy_(torch.randint(-4, 5, shape))
    return view.t() if transposed else view


def padded(rows, columns, dtype):
    """Return an output inside a poisoned buffer, and a check that nothing around it was written."""
    buffer = torch.full((rows + 2, columns + 5), POISON, dtype=dtype)
    out = buffer[1:-1, 3:-2]
    out.fill_(math.nan)

    def assert_untouched():
        out.fill_(POISON)
        assert (buffer == POISON).all(), "wrote outside of the output"

    return out, assert_untouched


@pytest.mark.parametrize("layouts", list(itertools.product((False, True), repeat=2)), ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", (SMALL, LARGE), ids=("small", "large"))
def test_product_of_integers_is_exact(isa, sizes, dtype, layouts):
    for m, k, n in sizes if isa != "scalar" or sizes is SMALL else LARGE[:2]:
        a, b = integers(m, k, dtype, layouts[0]), integers(k, n, dtype, layouts[1])
        out, assert_untouched = padded(m, n, torch.float32)
        sums = torch.full((m + 1,), POISON)
        gemm(a, b, out, a_sums=sums[:m])
        truth = a.double() @ b.double()
        assert torch.equal(out.double(), truth), (m, k, n)
        assert torch.equal(sums[:m].double(), a.double().sum(1)) and sums[m] == POISON, (m, k, n)
        gemm(a, b, out, epilogue=ADD)
        assert torch.equal(out.double(), 2 * truth), (m, k, n)
        assert_untouched()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ("gelu_tanh", "gelu_erf", "relu"))
def test_epilogues_equal_torchs_activation_and_derivative(isa, activation, dtype):
    m, k, n = 13, 70, 53
    a, b = torch.randn(m, k).to(dtype) / 8, torch.randn(k, n).to(dtype)
    bias = torch.randn(n).to(dtype)
    act = {"relu": F.relu, "gelu_erf": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}[activation]
    tolerance = {torch.float32: {"rtol": 1e-5, "atol": 3e-6}, torch.bfloat16: {"rtol": 2**-7, "atol": 2e-6}}[dtype]
    product = a.double() @ b.double()

    out, assert_untouched = padded(m, n, dtype)
    pre = torch.empty(m, n, dtype=dtype)
    gemm(a, b, out, epilogue=ACTIVATE, bias=bias, activation=activation, pre=pre)
    torch.testing.assert_close(pre.double(), product + bias.double(), **tolerance)
    torch.testing.assert_close(out.double(), act(product + bias.double()), **tolerance)

    wide = pre.double().requires_grad_()
    (derivative,) = torch.autograd.grad(act(wide).sum(), wide)
    hidden = torch.empty_like(pre)
    gemm(a, b, out, epilogue=SLOPE, activation=activation, pre=pre, act=hidden)
    torch.testing.assert_close(out.double(), product * derivative, **tolerance)
    torch.testing.assert_close(hidden.double(), act(wide).detach(), **tolerance)
    assert_untouched()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinity_and_nan_stay_in_their_row_and_column(isa, dtype):
    """Fails if padding turns an infinity of one row or column into NaN elsewhere."""
    a, b = torch.ones(9, 5, dtype=dtype), torch.ones(5, 50, dtype=dtype)
    a[3, 1], b[2, 49] = math.inf, math.nan
    out = gemm(a, b, torch.empty(9, 50, dtype=dtype))
    assert out[:, 49].isnan().all() and (out[3, :49] == math.inf).all()
    assert (torch.cat([out[:3, :49], out[4:, :49]]) == 5).all()


def test_empty_operands_give_zeros():
    out = torch.full((3, 4), math.nan)
    assert (gemm(torch.empty(3, 0), torch.empty(0, 4), out) == 0).all()
    assert gemm(torch.empty(0, 2), torch.empty(2, 4), torch.empty(0, 4)).shape == (0, 4)


def split_by_threads(a, b, out):
    """A wrong product: each thread sums one part of k, so the result depends on the number of threads."""
    parts = torch.get_num_threads()
    for i, (left, right) in enumerate(zip(a.chunk(parts, 1), b.chunk(parts, 0), strict=True)):
        gemm(left, right, out, epilogue=ADD if i else 0)
    return out


def results_by_threads(threads, product, a, b):
    """The results of the product with 1 to 4 threads."""
    results = []
    for count in (1, 2, 3, 4):
        threads(count)
        results.append(product(a, b, torch.empty(a.shape[0], b.shape[1])))
    return results


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "k", "n"), [(100, 2100, 70), (5, 300, 1000), (1100, 64, 50)])
def test_bits_do_not_depend_on_the_number_of_threads(m, k, n, dtype, threads):
    torch.manual_seed(0)
    a, b = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
    first, *others = results_by_threads(threads, gemm, a, b)
    assert all(torch.equal(first, other) for other in others)
    first, *others = results_by_threads(threads, split_by_threads, a, b)
    assert not all(torch.equal(first, other) for other in others), "this test cannot see a split over threads"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_of_a_row_do_not_depend_on_the_batch(dtype):
    torch.manual_seed(0)
    a, b = torch.randn(1100, 2500).to(dtype), torch.randn(200, 2500).to(dtype).t()
    whole = gemm(a, b, torch.empty(1100, 200))
    for rows in (slice(0, 1), slice(1, 4), slice(5, 12), slice(30, 46), slice(60, 77), slice(1023, 1100)):
        assert torch.equal(gemm(a[rows], b, torch.empty(len(a[rows]), 200)), whole[rows])


GUARDED = """
import ctypes, mmap, os, torch
from peakgpt import _C
from peakgpt.kernels.cpu.gemm import gemm

page, libc, kept = mmap.PAGESIZE, ctypes.CDLL(None), []
for isa in _C.isas:
    _C.set_isa_cap(isa)
    for dtype in (torch.float32, torch.bfloat16):
        for m, k, n in ((1, 33, 5), (3, 1, 1), (9, 7, 19), (16, 41, 50), (30, 33, 5)):
            memory = mmap.mmap(-1, 8 * page)
            end = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + 7 * page
            assert libc.mprotect(ctypes.c_void_p(end), ctypes.c_size_t(page), 0) == 0
            w = torch.frombuffer(memory, dtype=dtype, count=n * k, offset=7 * page - n * k * dtype.itemsize)
            w.copy_(torch.randint(-4, 5, (n * k,)))
            a = torch.randint(-4, 5, (m, k)).to(dtype)
            for b in (w.view(n, k).t(), w.view(k, n)):
                assert torch.equal(gemm(a, b, torch.empty(m, n)).double(), a.double() @ b.double()), (isa, m, k, n)
            kept.append(memory)
print("read", len(kept), flush=True)
os._exit(0)  # freeing would touch the pages
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect as in Linux")
def test_no_byte_after_a_weight_is_read():
    """A weight that is mapped may end at the last page of its file. Mutation that makes it fail: whole panels read."""
    done = subprocess.run([sys.executable, "-c", GUARDED], capture_output=True, text=True, timeout=300)
    assert done.stdout.startswith("read "), (done.returncode, done.stderr[-2000:])
