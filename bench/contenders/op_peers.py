"""Kernels of other projects with the arguments of our ops: peers of `bench ops` and `bench device`."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._functorch import config as functorch
from torch.nn.attention import SDPBackend, sdpa_kernel

from peakgpt.bench.run_results import Unsupported
from peakgpt.kernels.core.dispatch import OPS, Op, use_backend

Call = Callable[..., Any]

SDPA = {"sdpa cudnn": SDPBackend.CUDNN_ATTENTION, "sdpa flash": SDPBackend.FLASH_ATTENTION,
        "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION}  # fmt: skip
# Compiling all ops would take longer than the time of `bench device`.
COMPILED_ON_GPU = ("layernorm", "add_layernorm", "mlp", "linear_cross_entropy")
CHUNK = 1 << 22  # elements; torch's fused AdamW takes a list of parameters, and a model has hundreds


def peers(op: Op, device: torch.device) -> dict[str, Call]:
    """Return the peers of an op on a device.

    Returns:
        name -> function with the arguments of the op. It raises if it does not support a call (cuDNN on old GPUs).
    """
    found = OTHERS.get(op.name, lambda device: {})(device)
    if not op.mutates and (device.type == "cpu" or op.name in COMPILED_ON_GPU):
        found["compile"] = _compiled(op)
    return found


def _compiled(op: Op) -> Call:
    @functools.cache
    def compiled() -> Call:
        # A backward timed alone runs many times on one graph, which donated buffers do not allow.
        functorch.donated_buffer = False
        torch._dynamo.reset()  # otherwise torch.compile stops at the eighth size of an op
        return torch.compile(op.eager, dynamic=False)

    return lambda *tensors, **params: compiled()(*tensors, **params)  # the names of peers are read without compiling


def _attention(device: torch.device) -> dict[str, Call]:
    on_device = SDPA if device.type == "cuda" else {"sdpa flash": SDPBackend.FLASH_ATTENTION}
    return {name: functools.partial(_sdpa, backend) for name, backend in on_device.items()}


def _sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True) -> Tensor:
    with sdpa_kernel(backend):
        y = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=causal)
    return y.transpose(1, 2)


def _mlp(device: torch.device) -> dict[str, Call]:
    """Include both of our strategies, between which the table of kernels/gpu/gemm/mlp.py chooses."""
    if device.type != "cuda":
        return {}
    ours = {f"peakgpt {way}": functools.partial(_mlp_way, way) for way in ("fused", "library")}
    return {"cublaslt epilogue": _epilogue_mlp, **ours}


def _mlp_way(way: str, *tensors: Tensor | None) -> Tensor:
    from peakgpt.kernels.gpu.gemm import mlp

    if torch.is_grad_enabled():
        return _WholeWay.apply(way, *tensors)
    with mlp.use_strategy(way), use_backend("gpu"):
        return OPS["mlp"](*tensors)


class _WholeWay(torch.autograd.Function):
    """Apply a strategy in forward and backward; backward runs after the `with` block of the forward has ended."""

    @staticmethod
    def forward(ctx, way, *tensors):
        from peakgpt.kernels.gpu.gemm import mlp

        leaves = [t if t is None else t.detach().requires_grad_(t.requires_grad) for t in tensors]
        with mlp.use_strategy(way), use_backend("gpu"), torch.enable_grad():
            ctx.result = OPS["mlp"](*leaves)
        ctx.way, ctx.leaves = way, leaves
        return ctx.result.detach()

    @staticmethod
    def backward(ctx, dy):
        from peakgpt.kernels.gpu.gemm import mlp

        wanted = [t for t in ctx.leaves if t is not None and t.requires_grad]
        with mlp.use_strategy(ctx.way), use_backend("gpu"):
            found = iter(torch.autograd.grad(ctx.result, wanted, dy, retain_graph=True))
        return None, *(next(found) if t is not None and t.requires_grad else None for t in ctx.leaves)


def _epilogue_mlp(x, w_up, b_up, w_down, b_down) -> Tensor:
    """GELU (tanh on CUDA) in the epilogue of the first GEMM. It saves no pre-activation, so it has no gradient."""
    if torch.is_grad_enabled():
        raise Unsupported("torch._addmm_activation has no gradient")
    return F.linear(torch._addmm_activation(b_up, x, w_up.t(), use_gelu=True), w_down, b_down)


def _linear_cross_entropy(device: torch.device) -> dict[str, Call]:
    found = {}
    # On a CPU it takes 5.5 s in chunks and 0.63 s unchunked (1024 x 768 x 50304, bf16, 2-core Zen 4, 2026-11).
    if device.type == "cuda" and hasattr(F, "linear_cross_entropy"):
        chunked = getattr(torch.nn, "LinearCrossEntropyOptions", None)  # without options it is F.linear plus the loss
        options = {"options": chunked()} if chunked else {}
        found["torch linear_cross_entropy"] = functools.partial(F.linear_cross_entropy, **options)
    if _has_liger(device):
        from liger_kernel.transformers import functional as liger

        found["liger"] = liger.liger_fused_linear_cross_entropy
    return found


def _layernorm(device: torch.device) -> dict[str, Call]:
    if not _has_liger(device):
        return {}
    from liger_kernel.transformers import functional as liger

    return {"liger": lambda x, w, b: liger.liger_layer_norm(x, w, b, 1e-5)}


def _has_liger(device: torch.device) -> bool:
    return device.type == "cuda" and importlib.util.find_spec("liger_kernel") is not None


def _fused_adamw(param, grad, remainder, exp_avg, exp_avg_sq, step, norm=None, *, lr: float) -> None:
    """The kernel of torch.optim.AdamW(fused=True). It has no master weights: a peer of our float32 update only."""
    if remainder is not None:
        raise Unsupported("torch's fused AdamW keeps no float32 master")
    step += 1
    parts = [list(t.split(CHUNK)) for t in (param, grad, exp_avg, exp_avg_sq)]
    torch._fused_adamw_(*parts, [], [step] * len(parts[0]), lr=lr, beta1=0.9, beta2=0.999, weight_decay=0.01,
                        eps=1e-8, amsgrad=False, maximize=False)  # fmt: skip


OTHERS: dict[str, Callable[[torch.device], dict[str, Call]]] = {
    "attention": _attention,
    "layernorm": _layernorm,
    "mlp": _mlp,
    "linear_cross_entropy": _linear_cross_entropy,
}

# Replacements of in-place ops in torch.
IN_PLACE: dict[str, dict[str, Call]] = {"adamw": {"torch fused": _fused_adamw}}
