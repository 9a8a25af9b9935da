"""Properties of the Triton norms: every tile row, wide rows, frozen inputs, and reasons to decline a call.

Uses the interpreter if there is no GPU. Docstrings name mutations that a test caught if they are not obvious.
"""

import pytest
import torch

pytest.importorskip("triton")

from gpu_ops import DEVICE, assert_right, gpu

from peakgpt.bench.check import leaf, sample
from peakgpt.kernels.core.dispatch import OPS, use_backend
from peakgpt.kernels.gpu import reduce

pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize(
    ("name", "width"),
    [*(("layernorm", c) for c in (1, 513, 1025, 2049, 4097)), *(("add_layernorm", c) for c in (513, 1025, 8193))],
)
def test_norm_is_right_for_every_tile_row(name, width):
    """Widths one past each row of the table; the last two compute dw and db in a separate kernel."""
    assert_right(name, sample(name, {"rows": 6, "width": width}, torch.float32, DEVICE), torch.float32)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", ("layernorm", "add_layernorm", "rmsnorm", "add_rmsnorm"))
def test_wide_norm_is_right_for_a_large_mean(name, dtype, monkeypatch):
    """Five blocks, the last of one column. The mean is 1e3 deviations: a sum of squares would lose digits."""
    for limit, value in (("MAX_BLOCK_C", 512), ("WIDE_BLOCK_C", 256)):
        monkeypatch.setattr(gpu("norm"), limit, value)
    tensors = sample(name, {"rows": 3, "width": 1025}, dtype, DEVICE)
    if dtype == torch.float32:
        tensors[0] = leaf(tensors[0].detach() + 1e3)
    assert_right(name, tensors, dtype)


@pytest.fixture
def wide_column_blocks(monkeypatch):
    """Sum over rows in blocks of 1024 columns: blocks of 32 or 64 columns take ten times as long in the interpreter."""
    monkeypatch.setattr(gpu("norm"), "DWDB_BLOCK_C", 1024)
    monkeypatch.setattr(reduce, "BLOCK_C", 1024)


def test_norm_is_right_for_rows_wider_than_16384(wide_column_blocks):
    assert_right("layernorm", sample("layernorm", {"rows": 2, "width": 16385}, torch.bfloat16, DEVICE), torch.bfloat16)


@pytest.mark.parametrize(("name", "width"), [("rmsnorm", 513), ("rmsnorm", 4100), ("add_rmsnorm", 2049)])
def test_rmsnorm_is_right_with_fused_and_separate_sums(name, width, wide_column_blocks):
    """There are more rows than programs."""
    assert_right(name, sample(name, {"rows": 37, "width": width}, torch.float32, DEVICE), torch.float32)


@pytest.mark.parametrize("frozen", range(2))
def test_rmsnorm_is_right_with_frozen_inputs(frozen):
    tensors = sample("rmsnorm", {"rows": 5, "width": 33}, torch.float16, DEVICE)
    tensors[frozen].requires_grad_(False)
    assert_right("rmsnorm", tensors, torch.float16)


def test_norm_is_right_for_more_rows_than_programs(wide_column_blocks):
    """Several blocks a program in both kernels that sum over rows; the last block is partial."""
    for rows, width in ((131, 8), (70, 4100)):
        tensors = sample("layernorm", {"rows": rows, "width": width}, torch.bfloat16, DEVICE)
        assert_right("layernorm", tensors, torch.bfloat16)


def test_add_layernorm_normalizes_the_rounded_sum():
    x, residual, w, b = sample("add_layernorm", {"rows": 5, "width": 33}, torch.bfloat16, DEVICE)
    with use_backend("gpu"):
        total, normed = OPS["add_layernorm"](x, residual, w, b)
        assert torch.equal(total, x + residual) and torch.equal(normed, OPS["layernorm"](total, w, b))


def test_column_sum_is_right_for_several_blocks_of_programs():
    """70 partial sums: two full blocks and a partial one."""
    partial = torch.randn(2, 70, 33, device=DEVICE)
    outs = torch.empty(2, 33, device=DEVICE)
    reduce.sum_partials(partial, *outs)
    torch.testing.assert_close(outs, partial.double().sum(1).float(), rtol=1e-5, atol=1e-5)


def test_norm_is_right_without_bias_and_with_float32_weights():
    x, w, _ = sample("layernorm", {"rows": 5, "width": 33}, torch.bfloat16, DEVICE)
    assert_right("layernorm", [x, leaf(w.float())], torch.bfloat16)


@pytest.mark.parametrize("frozen", range(3))
def test_norm_is_right_with_frozen_inputs(frozen):
    tensors = sample("layernorm", {"rows": 5, "width": 33}, torch.float32, DEVICE)
    tensors[frozen].requires_grad_(False)
    assert_right("layernorm", tensors, torch.float32)


@pytest.mark.parametrize("used", (0, 1))
def test_add_layernorm_gradients_are_right_if_one_result_is_used(used):
    op, tensors = OPS["add_layernorm"], sample("add_layernorm", {"rows": 5, "width": 33}, torch.float32, DEVICE)
    gradients = {}
    for backend in ("eager", "gpu"):
        with use_backend(backend):
            loss = (op(*tensors)[used] ** 3).sum()
        gradients[backend] = torch.autograd.grad(loss, tensors, allow_unused=True)
    for expected, ours in zip(gradients["eager"], gradients["gpu"], strict=True):
        torch.testing.assert_close(ours, torch.zeros_like(ours) if expected is None else expected, rtol=1e-4, atol=1e-4)


def test_add_layernorm_leaf_gradients_do_not_share_memory():
    """x and residual have equal gradients, but adding to one must not change the other."""
    op, tensors = OPS["add_layernorm"], sample("add_layernorm", {"rows": 5, "width": 33}, torch.float32, DEVICE)
    for _ in range(2):
        with use_backend("gpu"):
            torch.autograd.backward(sum((t * t).sum() for t in op(*tensors)))
    x, residual = tensors[:2]
    once = x.grad.clone()
    residual.grad.zero_()
    assert x.grad.data_ptr() != residual.grad.data_ptr() and torch.equal(x.grad, once)


def test_norm_objects_with_a_reason():
    x, w, b = sample("layernorm", {"rows": 2, "width": 16}, torch.bfloat16, DEVICE, grad=False)
    objection = gpu("layernorm").objection
    assert objection(x, w, b) is None
    assert "float64" in objection(x.double(), w.double(), None)
    assert "one dtype" in objection(x, w, b.float())
    assert "at least 1" in objection(x[:, :0], w[:0], None)
