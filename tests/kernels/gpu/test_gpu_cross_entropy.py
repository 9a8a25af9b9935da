"""Properties of the Triton linear cross-entropy: blocks, scales, frozen inputs, targets out of range.

Uses the interpreter if there is no GPU. Docstrings name mutations that a test caught if they are not obvious.
"""

import pytest
import torch

pytest.importorskip("triton")

from gpu_ops import DEVICE, assert_right, double, gpu

from peakgpt.bench.check import leaf, sample
from peakgpt.kernels.core.dispatch import OPS, use_backend

pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
def test_cross_entropy_is_right_in_several_blocks(reduction, dtype, monkeypatch):
    """Seven blocks of rows, three of the vocabulary, one target ignored."""
    monkeypatch.setattr(gpu("linear_cross_entropy"), "BLOCK_BYTES", {"memory": 3 * 192 * dtype.itemsize})
    monkeypatch.setattr(gpu("linear_cross_entropy"), "BLOCK_V", 64)
    x, w, target = sample("linear_cross_entropy", {"rows": 20, "width": 16, "vocab": 129}, dtype, DEVICE)
    target[3], target[4] = -100, 128
    assert_right("linear_cross_entropy", [x, w, target], dtype, reduction=reduction, prefer="memory")


def test_cross_entropy_sums_dw_over_blocks_in_float32(monkeypatch):
    """128 blocks add the same value: a bfloat16 sum would stop growing."""
    monkeypatch.setattr(gpu("linear_cross_entropy"), "BLOCK_BYTES", {"memory": 1})
    x, w = torch.ones(128, 4, device=DEVICE).bfloat16(), torch.zeros(4, 4, device=DEVICE).bfloat16()
    tensors = [leaf(x), leaf(w), torch.zeros(128, dtype=torch.long, device=DEVICE)]
    dw = assert_right("linear_cross_entropy", tensors, torch.bfloat16, reduction="sum", prefer="memory")[2]
    assert (dw[:, 0] / dw[1, 0]).tolist() == [-3.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("reduction", ("mean", "none"))
@pytest.mark.parametrize("frozen", (0, 1))
def test_cross_entropy_is_right_with_frozen_inputs(frozen, reduction):
    tensors = sample("linear_cross_entropy", {"rows": 9, "width": 16, "vocab": 9}, torch.float32, DEVICE)
    tensors[frozen].requires_grad_(False)
    assert_right("linear_cross_entropy", tensors, torch.float32, reduction=reduction)


def test_cross_entropy_is_right_for_strided_input_and_int32_targets():
    x, w, target = sample("linear_cross_entropy", {"rows": 12, "width": 16, "vocab": 33}, torch.float32, DEVICE)
    x = x.detach().view(3, 4, 16).transpose(0, 1).requires_grad_()
    assert_right("linear_cross_entropy", [x, w, target.view(4, 3).int()], torch.float32)


def test_cross_entropy_float16_mean_survives_loss_scaling():
    """Tokens that are not a target get 1 / 5000 / 64, a subnormal float16 until the loss scale multiplies it."""
    op = OPS["linear_cross_entropy"]
    x, w, target = sample("linear_cross_entropy", {"rows": 64, "width": 8, "vocab": 5000}, torch.float16, DEVICE)
    target.clamp_(max=9)
    _, truth = run_scaled("eager", op, double([x, w, target]), 4096.0)
    _, dw = run_scaled("gpu", op, [x, w, target], 4096.0)
    assert dw.dtype == torch.float16
    error, size = (dw.double() - truth)[10:].norm(), truth[10:].norm()
    assert error < 1e-3 * size


def test_cross_entropy_float16_gradients_are_zero_if_all_targets_are_ignored():
    op = OPS["linear_cross_entropy"]
    x, w, target = sample("linear_cross_entropy", {"rows": 4, "width": 8, "vocab": 9}, torch.float16, DEVICE)
    assert not any(g.any() for g in run_scaled("gpu", op, [x, w, torch.full_like(target, -100)], 1.0))


def run_scaled(backend, op, tensors, scale):
    with use_backend(backend):
        loss = op(*tensors)
    return torch.autograd.grad(loss * scale, tensors[:2])


def test_cross_entropy_gradient_scale_is_not_rounded_to_bfloat16():
    """loss / 3: a scale rounded to bfloat16 is 0.1 % off in every entry, so the mean of the errors shows it."""
    op = OPS["linear_cross_entropy"]
    tensors = sample("linear_cross_entropy", {"rows": 64, "width": 32, "vocab": 64}, torch.bfloat16, DEVICE)
    truth, ours = run_scaled("eager", op, double(tensors), 1 / 3), run_scaled("gpu", op, tensors, 1 / 3)
    for a, t in zip(ours, truth, strict=True):
        assert abs((a.double() * t).sum() / (t * t).sum() - 1) < 5e-4


def test_cross_entropy_target_out_of_range_gives_nan_for_its_token():
    sizes = {"rows": 4, "width": 8, "vocab": 9}
    x, w, target = sample("linear_cross_entropy", sizes, torch.float32, DEVICE, grad=False)
    target[1], target[2] = 9, -7
    loss = torch.empty(4, device=DEVICE)
    params = OPS["linear_cross_entropy"].bind((x, w, target), {"reduction": "none"})[1]
    gpu("linear_cross_entropy").forward((loss,), (), x, w, target, None, **params)
    assert loss.isnan().tolist() == [False, True, True, False]


@pytest.mark.parametrize("prefer", ("memory", "time"))
def test_cross_entropy_prefer_sets_the_number_of_blocks(prefer, monkeypatch):
    """Blocks of 3 rows for "memory", all 9 rows at once for "time"; the values are right in both."""
    module, shapes = gpu("linear_cross_entropy"), []
    monkeypatch.setattr(module, "BLOCK_BYTES", {"memory": 4 * 192 * 4, "time": 1 << 62})
    whole_mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, **kw: shapes.append(len(a)) or whole_mm(a, b, **kw))
    tensors = sample("linear_cross_entropy", {"rows": 9, "width": 16, "vocab": 129}, torch.float32, DEVICE)
    assert_right("linear_cross_entropy", tensors, torch.float32, prefer=prefer)
    assert set(shapes) == ({3} if prefer == "memory" else {9})


def test_cross_entropy_auto_uses_blocks_for_large_logits(monkeypatch):
    module = gpu("linear_cross_entropy")
    x, w = torch.ones(6, 4, device=DEVICE), torch.ones(33, 4, device=DEVICE)
    monkeypatch.setattr(module, "BLOCK_BYTES", {"memory": 2 * 64 * 4, "time": 1 << 62})
    for limit, blocks in ((6 * 64 * 4, 1), (6 * 64 * 4 - 1, 3)):
        monkeypatch.setattr(module, "AT_ONCE_BYTES", limit)
        assert len(list(module._blocks(x, w, None, None, "auto", None))) == blocks


@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_cross_entropy_is_right_with_every_term(dtype, reduction):
    sizes = {"rows": 9, "width": 16, "vocab": 129, "weighted": 1}
    tensors = sample("linear_cross_entropy", sizes, dtype, DEVICE)
    tensors[2][4] = -100
    params = {"reduction": reduction, "label_smoothing": 0.2, "z_loss": 0.05}
    assert_right("linear_cross_entropy", tensors, dtype, **params)
