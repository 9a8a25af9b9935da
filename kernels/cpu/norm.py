"""LayerNorm, RMSNorm and their residual forms on the CPU: csrc/ops/norm.cpp, one pass over each row.

RMSNorm is LayerNorm without the mean and the bias. The residual forms normalize x + residual and return the sum too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peakgpt.kernels.cpu.ext import _C, DTYPES, dtype_objection, rows, threads
from peakgpt.kernels.ops.norm import default_eps


class Norm:
    """The backend functions of one op."""

    def __init__(self, *, mean: bool, residual: bool):
        """
        Args:
            mean: LayerNorm, with tensors (x, w, b) and saved tensors (mu, r); else RMSNorm, with (x, w) and (r).
            residual: a residual follows x, and the sum comes before the norm in the outputs.
        """
        self.mean, self.residual = mean, residual

    def objection(self, x: Tensor, *tensors: Tensor | None, **_) -> str | None:
        w, b = self._parameters(tensors)
        if b is not None and b.dtype != w.dtype:
            return f"takes w and b of one dtype, got {w.dtype} and {b.dtype}"
        return dtype_objection(x, w)

    def forward(self, outputs, saved, x, *tensors, eps, offset=0.0):
        w, b = self._parameters(tensors)
        x, residual = rows(x), rows(tensors[0]) if self.residual else None
        _C.norm_forward(
            dtype=DTYPES[x.dtype],
            w_dtype=DTYPES[w.dtype],
            rows=x.shape[0],
            width=x.shape[1],
            x=x,
            x_stride=x.stride(0),
            w=w,
            y=outputs[-1],
            r=saved[-1],
            eps=default_eps(x.dtype, eps),
            offset=offset,
            b=b,
            residual=residual,
            residual_stride=0 if residual is None else residual.stride(0),
            sum=outputs[0] if self.residual else None,
            mu=saved[0] if self.mean else None,
            threads=threads(),
        )

    def backward(self, grads, inputs, outputs, saved, needs, *, eps, offset=0.0, into=None):
        w, _ = self._parameters(inputs[1:])
        need_x, need_residual, need_w, need_b = self._needs(needs)
        x = outputs[0] if self.residual else inputs[0]
        shape, x = x.shape, rows(x)
        dy = torch.zeros_like(x) if grads[-1] is None else rows(grads[-1])
        dsum = rows(grads[0]) if self.residual and grads[0] is not None else None
        dx = torch.empty_like(x, memory_format=torch.contiguous_format) if need_x or need_residual else None
        into_w, into_b = (None, None) if into is None else self._parameters(into[1:])
        dw, db = (
            buffer if buffer is not None else torch.empty_like(w) if need else None
            for need, buffer in ((need_w, into_w), (need_b, into_b))
        )
        _C.norm_backward(
            dtype=DTYPES[x.dtype],
            w_dtype=DTYPES[w.dtype],
            rows=x.shape[0],
            width=x.shape[1],
            dy=dy,
            dy_stride=dy.stride(0),
            x=x,
            x_stride=x.stride(0),
            w=w,
            r=saved[-1],
            offset=offset,
            dsum=dsum,
            dsum_stride=0 if dsum is None else dsum.stride(0),
            mu=saved[0] if self.mean else None,
            dx=dx,
            dw=dw,
            db=db,
            add_dw=into_w is not None,
            add_db=into_b is not None,
            threads=threads(),
        )
        dx = dx if dx is None else dx.view(shape)
        inputs_grads = (dx if need_x else None, dx if need_residual else None) if self.residual else (dx,)
        return *inputs_grads, dw, *((db,) if self.mean else ())

    def _parameters(self, tensors) -> tuple[Tensor, Tensor | None]:
        """(w, b) of the tensors after x."""
        parameters = tensors[1:] if self.residual else tensors
        return parameters if self.mean else (parameters[0], None)

    def _needs(self, needs) -> tuple[bool, bool, bool, bool]:
        """Whether gradients of x, residual, w and b are needed."""
        x, *rest = needs
        residual = rest.pop(0) if self.residual else False
        return x, residual, rest[0], rest[1] if self.mean else False
