"""Residual addition and LayerNorm in one pass, in Triton."""

from peakgpt.kernels.gpu.norm.norm import Norm

_op = Norm(centered=True, residual=True)
objection = _op.objection
forward = _op.forward
backward = _op.backward
aot_cases = _op.aot_cases
