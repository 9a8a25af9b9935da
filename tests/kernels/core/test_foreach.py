"""One launch over many tensors equals one call for each tensor, on every backend."""

import pytest
import torch

from peakgpt.kernels.core.dispatch import use_backend
from peakgpt.kernels.core.foreach import Foreach
from peakgpt.kernels.ops.adamw import adamw
from peakgpt.kernels.ops.sum_of_squares import sum_of_squares

COUNTS = (1, 1000, 2048, 5001)  # below a block, a whole block, a tail of one element
RATES = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}


def parameters():
    torch.manual_seed(0)
    return [(torch.randn(n), torch.randn(n), None, torch.randn(n), torch.rand(n), torch.tensor(float(i)))
            for i, n in enumerate(COUNTS)]  # fmt: skip


@pytest.mark.parametrize("backend", ["eager", "cpu", "gpu"])
def test_adamw_of_many_tensors_equals_one_call_for_each(backend):
    together, alone = parameters(), parameters()
    with use_backend(backend):
        Foreach(adamw)(together, None, None, **RATES, max_norm=None)
    with use_backend("eager"):
        for tensors in alone:
            adamw(*tensors, **RATES)
    for got, expected in zip(together, alone, strict=True):
        for a, b in zip(got, expected, strict=True):
            assert a is b is None or torch.allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["eager", "cpu", "gpu"])
def test_sum_of_squares_of_many_tensors_has_every_element(backend):
    tensors, total = [torch.ones(n) for n in COUNTS], torch.tensor(3.0)
    with use_backend(backend):
        Foreach(sum_of_squares)([(t,) for t in tensors], total)
    assert total.item() == 3 + sum(COUNTS)
