"""The documented way to run Triton kernels without a GPU, `TRITON_INTERPRET=1 python ...`, in a plain process."""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled, not interpreted, here")

# One process for all ops: the error rule of the op tests, on the first case of each, in bfloat16, which Triton's own
# interpreter gets wrong. The op tests run the same kernels in float32 too.
CODE = """
import torch
from peakgpt.bench.check import CASES, judge, double, run, run_mutating, sample, whole
from peakgpt.kernels.core.dispatch import OPS, use_backend
first = {case[0]: case for case in reversed(CASES)}
first["adamw"], first["sum_of_squares"] = ("adamw", {"count": 37}, {"lr": 0.5}), ("sum_of_squares", {"count": 37}, {})
for name, sizes, params in first.values():
    op, go = OPS[name], run_mutating if OPS[name].mutates else run
    tensors = sample(name, sizes, torch.bfloat16)
    with use_backend("gpu"):
        reason = op.explain(*tensors, **params)["gpu"]
    if reason is not None:
        print(name, reason)
        continue
    truth, torchs = go("eager", op, double(whole(op, tensors)), params), go("eager", op, tensors, params)
    ours = go("gpu", op, tensors, params)
    print(name, "right" if all(v.passed for v in judge(ours, torchs, truth, torch.bfloat16)) else "wrong")
"""


def test_every_op_runs_in_a_plain_process_with_triton_interpret():
    """Fails without kernels/gpu/interpreter.py: attention raises, and bfloat16 is computed on bit patterns."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    results = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert len(results) >= 17
    missing = {"linear_q8": "no gpu kernel for linear_q8 yet"}
    assert {name: text for name, text in results.items() if text != "right"} == missing
