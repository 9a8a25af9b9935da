"""Properties of the Triton AdamW: bias correction, skipped updates, empty parameters.

Uses the interpreter if there is no GPU. Docstrings name mutations that a test caught if they are not obvious.
"""

import math

import pytest
import torch

pytest.importorskip("triton")

from gpu_ops import DEVICE, double, gpu

from peakgpt.bench.check import run_mutating, sample, whole
from peakgpt.kernels.core.dispatch import OPS, use_backend

pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize("step", (0.0, 1.0, 498.0, 1e5))
@pytest.mark.parametrize("betas", ((0.9, 0.999), (0.9, 0.95), (0.0, 0.99999)))
def test_adamw_bias_correction_has_float32_accuracy(step, betas):
    """1 - 0.99999^1 as a float32 subtraction has a relative error of 1e-3."""
    param, grad, _, m, v, _, _ = sample("adamw", {"count": 65}, torch.float32, DEVICE, grad=False)
    counted = torch.full((), step, device=DEVICE)
    truth = torch.nn.Parameter(param.double())
    reference = torch.optim.AdamW([truth], lr=1e-1, betas=betas)
    reference.state[truth] = {"step": counted.clone().cpu(), "exp_avg": m.double(), "exp_avg_sq": v.double()}
    truth.grad = grad.double()
    reference.step()
    with use_backend("gpu"):
        OPS["adamw"](param, grad, None, m, v, counted, lr=1e-1, beta1=betas[0], beta2=betas[1])
    moved = (truth.detach() - param.double()).abs().max() / truth.detach().abs().max()
    assert moved < 3e-7 and counted.item() == step + 1.0


@pytest.mark.parametrize("norm", (math.nan, math.inf, -math.inf))
def test_adamw_skips_the_update_if_the_norm_is_not_finite(norm):
    tensors = sample("adamw", {"count": 1030}, torch.bfloat16, DEVICE, grad=False)
    tensors[-1] = torch.full((), norm, device=DEVICE)
    after = run_mutating("gpu", OPS["adamw"], tensors, {"lr": 1e-2, "max_norm": 1.0})
    param, _, _, *rest = whole(OPS["adamw"], tensors[:-1])
    assert all(torch.equal(a, b) for a, b in zip(after, (param, *rest), strict=True))


def test_adamw_of_zero_parameters_counts_the_step():
    tensors = sample("adamw", {"count": 0}, torch.float32, DEVICE, grad=False)
    assert run_mutating("gpu", OPS["adamw"], tensors, {"lr": 1e-2})[-1].item() == 4.0


def test_adamw_objects_to_float64():
    param, grad, remainder, *rest = sample("adamw", {"count": 5}, torch.bfloat16, DEVICE, grad=False)
    objection = gpu("adamw").objection
    assert objection(param, grad, remainder, *rest) is None
    assert "float64" in objection(*double([param, grad, None, *rest]))
