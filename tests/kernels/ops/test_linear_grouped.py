"""linear_grouped: zero points, the order of inputs, groups that are NaN, and bits that depend on the own row only."""

import pytest
import torch

from peakgpt.kernels.core.dispatch import use_backend
from peakgpt.kernels.ops.linear_grouped import linear_grouped
from peakgpt.kernels.ops.linear_quantized import ACTIVATIONS
from peakgpt.kernels.ops.quantize import dequantize_grouped, pack_grouped, round_inputs

BACKENDS = ("eager", "cpu", "gpu")
OUT, WIDTH, GROUP = 37, 200, 64


def weight(bits):
    """Return q, scale and zero points of a random weight, with the lowest level."""
    torch.manual_seed(bits)
    if bits == 8:
        q = torch.randint(-128, 128, (OUT, WIDTH)).to(torch.int8)
        q[:, :9] = -128
    else:
        q = torch.randint(0, 256, (OUT, WIDTH // 2), dtype=torch.uint8)
    groups = OUT, -(-WIDTH // GROUP)
    return q, torch.rand(groups).add(0.5).half(), torch.randint(-(1 << bits - 1), 1 << bits - 1, groups).half()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", (8, 4))
def test_the_order_and_the_zero_points_are_those_of_the_formula(bits, backend):
    q, scale, zero = weight(bits)
    order = torch.randperm(WIDTH)
    x = torch.randn(5, WIDTH)
    levels = q.double() if bits == 8 else torch.stack((q & 15, q >> 4), -1).flatten(1).double() - 8
    spread = [part.double().repeat_interleave(GROUP, 1)[:, :WIDTH] for part in (scale, zero)]
    exact = (levels - spread[1]) * spread[0]
    assert torch.equal(dequantize_grouped(q, scale, zero, WIDTH, GROUP, zero_points=True).double(), exact)
    expected = round_inputs(x[:, order], GROUP).double() @ exact.T
    with use_backend(backend):
        got = linear_grouped(x, *pack_grouped(q, scale, zero), order=order.int(), out=OUT, bits=bits, group=GROUP,
                             zero_points=True)  # fmt: skip
    assert (got - expected).norm() < 1e-6 * expected.norm()


@pytest.mark.parametrize("backend", ("cpu", "gpu"))
def test_a_row_has_the_same_bits_with_any_other_rows_and_nan_stays_in_its_row(backend):
    packed = pack_grouped(*weight(4))
    x = torch.randn(19, WIDTH)
    x[3, 150], x[5, 2] = float("nan"), float("-inf")
    with use_backend(backend):
        call = lambda x: linear_grouped(x, *packed, out=OUT, group=GROUP, zero_points=True)  # noqa: E731
        whole = call(x)
        assert whole[[3, 5]].isnan().all() and whole[[*range(3), 4, *range(6, 19)]].isfinite().all()
        for rows in ([0], [18], [6, 7]):
            assert torch.equal(call(x[rows]), whole[rows])


def test_bad_orders_and_missing_zero_points_are_named_in_the_error():
    w, scale, zero = pack_grouped(*weight(4))
    x, order = torch.randn(1, WIDTH), torch.arange(WIDTH, dtype=torch.int32)
    for options, message in (
        ({"order": order[1:]}, r"order has shape \(199,\), expected \(200\)"),
        ({"order": order.long()}, "order is torch.int64 on cpu, expected int32"),
        ({"order": order + 1}, "order has 1 to 200, expected 0 to 199"),
        ({"order": order - 1}, "order has -1 to 198, expected 0 to 199"),
    ):
        with pytest.raises(ValueError, match=message), use_backend("cpu"):
            linear_grouped(x, w, scale, zero, out=OUT, group=GROUP, **options)
    with pytest.raises(ValueError, match="zero_points is True without an offset"):
        linear_grouped(x, w, scale, out=OUT, group=GROUP, zero_points=True)


@pytest.mark.parametrize("bits", (8, 4))
def test_all_rows_have_the_values_of_the_formula_on_every_instruction_set(isa, bits):
    """A set with 16 registers multiplies 8 rows in two tiles. Mutation that makes it fail: the sums of x of the first
    tile are taken for the second one.
    """  # fmt: skip
    q, scale, zero = weight(bits)
    packed, exact = pack_grouped(q, scale, zero), dequantize_grouped(q, scale, zero, WIDTH, GROUP, zero_points=True)
    for rows in (1, 3, 8, 21, 40):
        x = torch.randn(rows, WIDTH)
        expected = round_inputs(x, GROUP).double() @ exact.double().T
        with use_backend("cpu"):
            got = linear_grouped(x, *packed, out=OUT, bits=bits, group=GROUP, zero_points=True)
        assert (got - expected).norm() < 1e-6 * expected.norm(), rows


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_stays_nan_after_every_activation(isa, activation):
    """Mutation that makes it fail: min(x, limit) instead of min(limit, x), which is the limit for NaN."""
    x = torch.randn(3, WIDTH)
    x[1, 7] = float("nan")
    with use_backend("cpu"):
        got = linear_grouped(x, *pack_grouped(*weight(4)), out=OUT, group=GROUP, zero_points=True,
                             activation=activation)  # fmt: skip
    assert got[1].isnan().all() and got[[0, 2]].isfinite().all()
