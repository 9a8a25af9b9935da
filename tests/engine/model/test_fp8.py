"""FP8 products, emulated on a CPU: scales, rounding, gradients, and a training run compared with bfloat16."""

import pytest
import torch

from peakgpt.bench.fp8 import compare_losses
from peakgpt.engine.gpt import GPT
from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.model.fp8 import BACKWARD, FORWARD, fp8_linear, quantize, set_fp8
from peakgpt.engine.training.train_config import TrainConfig

SIZES = {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 16, "vocab_size": 64}


@pytest.mark.parametrize(("dtype", "digits", "largest"), [(FORWARD, 3, 448.0), (BACKWARD, 2, 57344.0)], ids=str)
def test_quantize_uses_the_whole_range_and_keeps_the_significant_bits(dtype, digits, largest):
    torch.manual_seed(0)
    t = 1e-6 * torch.randn(999)
    q, scale = quantize(t, dtype)
    assert q.float().abs().max() == largest and scale == t.abs().max() / largest
    back, large = q.float() * scale, t.abs() > 1e-2 * t.abs().max()
    assert ((back - t).abs() / t.abs())[large].max() <= 2.0 ** -(digits + 1) * 1.001


def test_quantize_of_zeros_has_scale_one_and_nan_stays_nan():
    q, scale = quantize(torch.zeros(5), FORWARD)
    assert scale == 1.0 and not q.float().any()
    q, scale = quantize(torch.tensor([1.0, float("nan")]), FORWARD)
    assert (q.float() * scale).isnan().any()


def wide(t, dtype):
    """Return the quantized t in float64."""
    q, scale = quantize(t, dtype)
    return q.double() * scale.double()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_forward_and_gradients_are_products_of_rounded_operands(dtype):
    """Mutations that make it fail: a missing scale, or an output gradient in the format of forward."""
    torch.manual_seed(1)
    x, w, b = torch.randn(2, 16, 32, dtype=dtype), torch.randn(48, 32, dtype=dtype), torch.randn(48, dtype=dtype)
    leaves = [t.requires_grad_() for t in (x, w, b)]
    dy = 1e-3 * torch.randn(2, 16, 48, dtype=dtype)
    y = fp8_linear(x, w, b)
    dx, dw, db = torch.autograd.grad(y, leaves, dy)
    q_x, q_w, q_dy = (wide(t.detach().flatten(0, -2), f) for t, f in ((x, FORWARD), (w, FORWARD), (dy, BACKWARD)))
    rounding = {torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    pairs = [(y, q_x @ q_w.t() + b.double()), (dx, q_dy @ q_w), (dw, q_dy.t() @ q_x), (db, dy.double().sum((0, 1)))]
    for ours, truth in pairs:
        error = (ours.double().reshape(truth.shape) - truth).norm() / truth.norm()
        assert error < rounding
    plain = torch.nn.functional.linear(x.double(), w.double(), b.double())
    assert 1e-3 < (y.double() - plain).norm() / plain.norm() < 0.1, "the operands have 8 bits"


def test_sizes_that_are_not_multiples_of_16_run_in_full_precision():
    x, w = torch.randn(5, 32), torch.randn(48, 32)
    torch.testing.assert_close(fp8_linear(x, w), x @ w.t())


def test_8_bits_are_used_in_training_mode_only():
    torch.manual_seed(0)
    model, ids = GPT(GPTConfig(**SIZES)), torch.randint(64, (2, 16))
    plain = model(ids)
    set_fp8(model, True)
    assert not torch.equal(model(ids), plain)
    assert torch.equal(model.eval()(ids), plain)
    set_fp8(model.train(), False)
    assert torch.equal(model(ids), plain)


def test_set_fp8_names_the_parameter_whose_size_does_not_fit():
    with pytest.raises(ValueError, match=r"fp8: transformer.wte.weight has shape \(67, 32\), expected multiples of 16"):
        set_fp8(GPT(GPTConfig(**{**SIZES, "vocab_size": 67})), True)


def test_fp8_training_loss_is_near_that_of_bfloat16():
    recipe = TrainConfig(batch=4, tokens=16, lr=3e-3, dtype=torch.bfloat16)
    losses = compare_losses(GPTConfig(**SIZES), recipe, 30, torch.device("cpu"))
    bf16, fp8 = losses["peakgpt"], losses["peakgpt, fp8"]
    assert bf16[-1] < bf16[0] - 0.3
    assert fp8[-1] == pytest.approx(bf16[-1], abs=0.1) and fp8 != bf16
