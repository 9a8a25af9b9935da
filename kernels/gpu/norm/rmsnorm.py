"""RMSNorm in Triton."""

from peakgpt.kernels.gpu.norm.norm import Norm

_op = Norm(centered=False, residual=False)
objection = _op.objection
forward = _op.forward
backward = _op.backward
aot_cases = _op.aot_cases
