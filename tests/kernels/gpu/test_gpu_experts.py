"""The Triton kernels of experts: sorting without the host, tokens that do not depend on their batch, all tiles.

Mutations that these tests detect: a tile that stores rows of the next expert; a rank without the earlier choices of the
same expert; an offset that counts its own expert.
"""

import pytest
import torch

pytest.importorskip("triton")

from gpu_ops import DEVICE, assert_right

from peakgpt.bench.check import sample
from peakgpt.kernels.core.dispatch import OPS, use_backend
from peakgpt.kernels.gpu.experts import choices, grouped_gemm

pytestmark = pytest.mark.usefixtures("poison")
SIZES = {"rows": 40, "width": 17, "hidden": 20, "experts": 5, "choices": 2}


@pytest.mark.parametrize("limit", (0, choices.SORT_LIMIT))
@pytest.mark.parametrize(("count", "experts"), ((1, 3), (129, 5), (70, 66)))
def test_choices_are_sorted_as_by_a_stable_sort(limit, count, experts, monkeypatch):
    monkeypatch.setattr(choices, "SORT_LIMIT", limit)
    torch.manual_seed(count)
    ids = torch.randint(experts, (count,), device=DEVICE)
    order, position = torch.empty(2, count, dtype=torch.int64, device=DEVICE)
    offsets = torch.empty(experts + 1, dtype=torch.int64, device=DEVICE)
    choices.sort_choices(ids, order, position, offsets)
    assert torch.equal(order, ids.sort(stable=True).indices)
    assert torch.equal(order[position], torch.arange(count, device=DEVICE))
    assert torch.equal(offsets.diff(), torch.bincount(ids, minlength=experts)) and offsets[0] == 0


@pytest.mark.parametrize("few", (True, False))
def test_a_token_does_not_depend_on_its_batch(few, monkeypatch):
    """With tiles of 16 rows and of many: experts have up to 60 rows, so that tiles end inside and between experts."""
    monkeypatch.setattr(grouped_gemm, "is_few", lambda rows, experts: few)
    x, ids, weights, *parameters = sample("experts", {**SIZES, "experts": 2}, torch.bfloat16, DEVICE, grad=False)
    with use_backend("gpu"):
        y = OPS["experts"](x, ids, weights, *parameters)
        part = OPS["experts"](x[7:24], ids[7:24], weights[7:24], *parameters)
    assert torch.equal(y[7:24], part)
    with use_backend("eager"):
        torch.testing.assert_close(y, OPS["experts"](x, ids, weights, *parameters), rtol=2e-2, atol=2e-2)


def test_float16_passes_the_error_rule():
    assert_right("experts", sample("experts", {**SIZES, "rows": 9}, torch.float16, DEVICE), torch.float16)
