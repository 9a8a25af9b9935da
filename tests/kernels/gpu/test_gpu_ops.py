"""The Triton ops pass the error rule in float16. test_ops.py checks the other dtypes.

Uses the interpreter if there is no GPU. Docstrings name mutations that a test caught if they are not obvious.
"""

import pytest
import torch

pytest.importorskip("triton")

from gpu_ops import DEVICE, assert_right

from peakgpt.bench.check import sample

pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize(
    ("name", "sizes", "params"),
    [
        ("layernorm", {"rows": 5, "width": 129}, {}),
        ("add_layernorm", {"rows": 5, "width": 129}, {}),
        ("mlp", {"rows": 9, "width": 16, "hidden": 129}, {}),
        ("linear_cross_entropy", {"rows": 9, "width": 16, "vocab": 129}, {}),
        ("linear_cross_entropy", {"rows": 9, "width": 16, "vocab": 129}, {"reduction": "none"}),
        ("embedding", {"batch": 2, "tokens": 9, "vocab": 5, "width": 65}, {}),
    ],
)
def test_float16_passes_the_error_rule(name, sizes, params):
    tensors = sample(name, sizes, torch.float16, DEVICE)
    assert_right(name, tensors, torch.float16, **params)
