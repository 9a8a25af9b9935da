"""Kernels of other libraries with the arguments of our ops: contenders of `bench ops` on a GPU, some also on a CPU."""

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
COMPILED = ("layernorm", "add_layernorm", "mlp", "linear_cross_entropy")
CHUNK = 1 << 22  # elements; torch's fused AdamW takes a list of parameters, and a model has hundreds


def peers(op: Op, device: torch.device) -> dict[str, Call]:
    """Return the peers of an op that this machine has.

    Returns:
        name -> function with the arguments of the op. It raises if it cannot take a call, as cuDNN does on old GPUs.
    """
    calls = PEERS.get(op.name, lambda device: {})(device)
    if device.type == "cuda" and op.name in COMPILED:
        calls["compile"] = _compiled(op)
    return calls


def _compiled(op: Op) -> Call:
    # The pass "backward" runs many times over one autograd graph, which donated buffers do not allow.
    functorch.donated_buffer = False
    torch._dynamo.reset()  # dynamo compiles at most eight sizes of a function
    return torch.compile(op.eager, dynamic=False)


def _attention(device: torch.device) -> dict[str, Call]:
    on_device = SDPA if device.type == "cuda" else {"sdpa flash": SDPBackend.FLASH_ATTENTION}
    return {name: functools.partial(_sdpa, backend) for name, backend in on_device.items()}


def _sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True) -> Tensor:
    with sdpa_kernel(backend):
        y = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=causal)
    return y.transpose(1, 2)


def _mlp(device: torch.device) -> dict[str, Call]:
    """cuBLASLt, and both strategies of kernels/gpu/gemm/mlp.py, which otherwise chooses one of them by its table."""
    if device.type != "cuda":
        return {}
    ours = {f"peakgpt {strategy}": functools.partial(_mlp_by, strategy) for strategy in ("fused", "library")}
    return {"cublaslt epilogue": _epilogue_mlp, **ours}


def _mlp_by(strategy: str, *tensors: Tensor | None) -> Tensor:
    from peakgpt.kernels.gpu.gemm import mlp

    if torch.is_grad_enabled():
        return _MLPByStrategy.apply(strategy, *tensors)
    with mlp.use_strategy(strategy), use_backend("gpu"):
        return OPS["mlp"](*tensors)


class _MLPByStrategy(torch.autograd.Function):
    """The MLP by one strategy in forward and backward: autograd runs backward after the forward context has ended."""

    @staticmethod
    def forward(ctx, strategy, *tensors):
        from peakgpt.kernels.gpu.gemm import mlp

        leaves = [t if t is None else t.detach().requires_grad_(t.requires_grad) for t in tensors]
        with mlp.use_strategy(strategy), use_backend("gpu"), torch.enable_grad():
            ctx.result = OPS["mlp"](*leaves)
        ctx.strategy, ctx.leaves = strategy, leaves
        return ctx.result.detach()

    @staticmethod
    def backward(ctx, dy):
        from peakgpt.kernels.gpu.gemm import mlp

        inputs = [t for t in ctx.leaves if t is not None and t.requires_grad]
        with mlp.use_strategy(ctx.strategy), use_backend("gpu"):
            grads = iter(torch.autograd.grad(ctx.result, inputs, dy, retain_graph=True))
        return None, *(next(grads) if t is not None and t.requires_grad else None for t in ctx.leaves)


def _epilogue_mlp(x, w_up, b_up, w_down, b_down) -> Tensor:
    """Fuse GELU (tanh on CUDA) into the epilogue of the first GEMM. The pre-activation is not saved: no gradient."""
    if torch.is_grad_enabled():
        raise Unsupported("torch._addmm_activation has no gradient")
    return F.linear(torch._addmm_activation(b_up, x, w_up.t(), use_gelu=True), w_down, b_down)


def _linear_cross_entropy(device: torch.device) -> dict[str, Call]:
    calls = {}
    # Not on a CPU: there its chunks take 5.5 s, and all rows at once 0.63 s (1024 x 768 x 50304, bf16, 2-core Zen 4,
    # 2026-11).
    if device.type == "cuda" and hasattr(F, "linear_cross_entropy"):
        chunked = getattr(torch.nn, "LinearCrossEntropyOptions", None)  # without options it stores all logits
        options = {"options": chunked()} if chunked else {}
        calls["torch linear_cross_entropy"] = functools.partial(F.linear_cross_entropy, **options)
    if _has_liger(device):
        from liger_kernel.transformers import functional as liger

        calls["liger"] = liger.liger_fused_linear_cross_entropy
    return calls


def _layernorm(device: torch.device) -> dict[str, Call]:
    if not _has_liger(device):
        return {}
    from liger_kernel.transformers import functional as liger

    return {"liger": lambda x, w, b: liger.liger_layer_norm(x, w, b, 1e-5)}


def _has_liger(device: torch.device) -> bool:
    return device.type == "cuda" and importlib.util.find_spec("liger_kernel") is not None


def _fused_adamw(param, grad, remainder, exp_avg, exp_avg_sq, step, norm=None, *, lr: float) -> None:
    """Run the kernel of torch.optim.AdamW(fused=True). It has no master weights: compare it with our float32 update."""
    if remainder is not None:
        raise Unsupported("torch's fused AdamW keeps no float32 master")
    step += 1
    parts = [list(t.split(CHUNK)) for t in (param, grad, exp_avg, exp_avg_sq)]
    torch._fused_adamw_(*parts, [], [step] * len(parts[0]), lr=lr, beta1=0.9, beta2=0.999, weight_decay=0.01,
                        eps=1e-8, amsgrad=False, maximize=False)  # fmt: skip


PEERS: dict[str, Callable[[torch.device], dict[str, Call]]] = {
    "attention": _attention,
    "layernorm": _layernorm,
    "mlp": _mlp,
    "linear_cross_entropy": _linear_cross_entropy,
}

# For ops that change their tensors: the kernel of torch that a user would run.
IN_PLACE: dict[str, dict[str, Call]] = {"adamw": {"torch fused": _fused_adamw}}
