"""Time every op with pytest-benchmark: `pytest tests/bench/bench_ops.py`.

Use it to compare two saved runs of peakgpt. It times one call after the other. `peakgpt bench ops` interleaves the
calls with those of PyTorch.
"""

import pytest
import torch

from peakgpt.bench.op_cases import PASSES, OpCase, make_inputs
from peakgpt.kernels.core.dispatch import OPS
from peakgpt.kernels.ops import catalogue

CALLS = [(name, direction) for name in sorted(catalogue.__all__) for direction in OpCase(name).directions]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "direction"), CALLS, ids=lambda value: value)
def test_time_of_one_op(benchmark, name, direction, dtype):
    case, make = OpCase(name), PASSES[direction][0]
    call = make(OPS[name], make_inputs(case, torch.device("cpu"), dtype), case.arguments)
    benchmark(call)
