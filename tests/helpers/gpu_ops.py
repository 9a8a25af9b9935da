"""The check of a Triton op versus torch: error rule, and equal bits in two runs. Uses the interpreter without a GPU."""

import torch

from peakgpt.bench.check import judge, run, run_mutating, whole
from peakgpt.kernels.core.dispatch import OPS, load

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def double(tensors):
    """Return the tensors in float64 with the same requires_grad."""
    return [
        t if t is None or not t.is_floating_point() else t.detach().double().requires_grad_(t.requires_grad)
        for t in tensors
    ]


def assert_right(name, tensors, dtype, **params):
    """Check the error rule and that a second run gives the same bits; return the results."""
    op = OPS[name]
    go = run_mutating if op.mutates else run
    torchs, truth = go("eager", op, tensors, params), go("eager", op, double(whole(op, tensors)), params)
    ours, again = go("gpu", op, tensors, params), go("gpu", op, tensors, params)
    for i, verdict in enumerate(judge(ours, torchs, truth, dtype)):
        assert verdict.passed, f"result {i}: {verdict}"
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True)), "not repeatable"
    return ours


def gpu(name):
    module = load("gpu", name)
    assert not isinstance(module, str), module
    return module
