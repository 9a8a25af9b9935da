"""The error rule of ops, for the tests and for `bench device`.

    |ours - truth| <= 2 |torch's - truth| + floor * |truth|        largest values of each result

`truth` is the eager function of the contract in float64, `torch's` the same function in the dtype of the op. The rule
holds for every output, every gradient under random upstream gradients, and every tensor that the op mutates. More than
300 lines: half of them are the table of cases.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peakgpt.kernels.core.dispatch import BACKENDS, OPS, Op, use_backend
from peakgpt.kernels.ops import catalogue  # noqa: F401  fills OPS
from peakgpt.kernels.ops.adamw import join

# Relative to the largest value: a few ulp of float32, half an ulp of the others.
FLOOR = {torch.float32: 1e-6, torch.bfloat16: 2e-3, torch.float16: 2.5e-4}

# (op, sizes of its sample, parameters); lengths and widths around the block sizes
CASES = [
    ("layernorm", {"rows": 5, "width": 129}, {}),
    ("layernorm", {"rows": 1, "width": 1025}, {"eps": 1e-3}),
    ("layernorm", {"rows": 70, "width": 8}, {}),
    ("layernorm", {"rows": 0, "width": 16}, {}),
    ("add_layernorm", {"rows": 5, "width": 129}, {}),
    ("add_layernorm", {"rows": 66, "width": 64}, {}),
    ("rmsnorm", {"rows": 5, "width": 129}, {}),
    ("rmsnorm", {"rows": 1, "width": 1025}, {"eps": 1e-3}),
    ("rmsnorm", {"rows": 0, "width": 16}, {}),
    ("rmsnorm", {"rows": 5, "width": 129}, {"offset": 1.0}),
    ("add_rmsnorm", {"rows": 5, "width": 129}, {}),
    ("add_rmsnorm", {"rows": 66, "width": 64}, {}),
    ("add_rmsnorm", {"rows": 5, "width": 65}, {"offset": 1.0}),
    ("mlp", {"rows": 33, "width": 48, "hidden": 129}, {}),
    ("mlp", {"rows": 5, "width": 16, "hidden": 64}, {"activation": "gelu_erf"}),
    ("mlp", {"rows": 5, "width": 16, "hidden": 64}, {"activation": "relu"}),
    ("mlp", {"rows": 5, "width": 16, "hidden": 65}, {"recompute": True}),
    ("mlp", {"rows": 0, "width": 16, "hidden": 64}, {}),
    ("gated_mlp", {"rows": 33, "width": 48, "hidden": 129}, {}),
    ("gated_mlp", {"rows": 5, "width": 16, "hidden": 64}, {"activation": "gelu_tanh"}),
    ("gated_mlp", {"rows": 5, "width": 16, "hidden": 64}, {"activation": "gelu_erf"}),
    ("gated_mlp", {"rows": 5, "width": 16, "hidden": 64}, {"activation": "relu"}),
    ("gated_mlp", {"rows": 5, "width": 16, "hidden": 65, "spread": 8}, {"activation": "clamped_swiglu"}),
    ("gated_mlp", {"rows": 5, "width": 16, "hidden": 64}, {"recompute": True}),
    ("gated_mlp", {"rows": 0, "width": 16, "hidden": 64}, {}),
    ("experts", {"rows": 19, "width": 48, "hidden": 129, "experts": 5, "choices": 2}, {}),
    ("experts", {"rows": 9, "width": 65, "hidden": 17, "experts": 17, "choices": 3, "biased": 1}, {}),
    ("experts", {"rows": 40, "width": 24, "hidden": 33, "experts": 3, "choices": 1}, {"activation": "gelu_erf"}),
    (
        "experts",
        {"rows": 21, "width": 16, "hidden": 40, "experts": 4, "choices": 4, "gated": 0, "biased": 1},
        {"activation": "gelu_tanh"},
    ),
    (
        "experts",
        {"rows": 21, "width": 16, "hidden": 40, "experts": 4, "choices": 2, "gated": 0},
        {"activation": "relu", "recompute": True},
    ),
    ("experts", {"rows": 21, "width": 16, "hidden": 40, "experts": 4, "choices": 2, "biased": 1}, {"recompute": True}),
    (
        "experts",
        {"rows": 19, "width": 48, "hidden": 65, "experts": 5, "choices": 2, "biased": 1, "spread": 8},
        {"activation": "clamped_swiglu"},
    ),
    ("experts", {"rows": 0, "width": 16, "hidden": 8, "experts": 3, "choices": 2}, {}),
    ("linear", {"rows": 33, "width": 65, "out": 129}, {}),
    ("linear", {"rows": 1, "width": 7, "out": 3}, {}),
    ("linear", {"rows": 0, "width": 16, "out": 8}, {}),
    ("linear", {"rows": 1, "width": 272, "out": 65}, {}),
    ("linear", {"rows": 16, "width": 64, "out": 129}, {}),
    ("linear", {"rows": 17, "width": 64, "out": 129}, {}),
    ("linear_lora", {"rows": 33, "width": 65, "out": 129, "rank": 3}, {"scale": 2.0}),
    ("linear_lora", {"rows": 5, "width": 16, "out": 40, "rank": 8, "dropout": True}, {"scale": 0.5}),
    ("linear_lora", {"rows": 17, "width": 64, "out": 130, "rank": 2, "parts": 3, "taken": 130},
     {"scale": 2.0, "rows": (0, 65, 65, 97, 97, 130)}),
    ("linear_lora", {"rows": 3, "width": 24, "out": 40, "rank": 5, "taken": 16, "dropout": True},
     {"scale": 1.0, "rows": (8, 24)}),
    ("linear_lora", {"rows": 0, "width": 16, "out": 8, "rank": 2}, {"scale": 1.0}),
    ("linear_q8", {"rows": 33, "width": 65, "out": 129}, {}),
    ("linear_q8", {"rows": 1, "width": 300, "out": 3}, {"activation": "gelu_tanh"}),
    ("linear_q8", {"rows": 0, "width": 16, "out": 8}, {}),
    ("linear_q8", {"rows": 3, "width": 40, "out": 33}, {"activation": "clamped_swiglu"}),
    ("linear_q4", {"rows": 3, "width": 64, "out": 33}, {"activation": "clamped_up"}),
    ("linear_q4", {"rows": 33, "width": 65, "out": 129}, {}),
    ("linear_q4", {"rows": 1, "width": 300, "out": 3, "group": 32}, {"group": 32, "activation": "silu"}),
    ("linear_q4", {"rows": 17, "width": 50, "out": 2500}, {"activation": "gelu_erf"}),
    ("linear_grouped", {"rows": 33, "width": 65, "out": 129}, {"levels": "unsigned"}),
    ("linear_grouped", {"rows": 9, "width": 300, "out": 70, "bits": 8, "offset": False, "group": 16},
     {"bits": 8, "group": 16}),
    ("linear_grouped", {"rows": 1, "width": 300, "out": 3, "offset": False}, {"levels": "fp4", "activation": "silu"}),
    ("linear_grouped", {"rows": 17, "width": 72, "out": 33, "offset": False}, {"activation": "clamped_up"}),
    ("linear_grouped", {"rows": 2, "width": 65, "out": 70, "bits": 8}, {"bits": 8}),
    ("linear_grouped", {"rows": 11, "width": 200, "out": 70, "bits": 8, "group": 64, "offset": False,
                        "bf16_scales": True}, {"bits": 8, "group": 64}),
    ("linear_grouped", {"rows": 0, "width": 40, "out": 17, "order": True}, {"activation": "relu"}),
    ("linear_grouped", {"rows": 6, "width": 83, "out": 20, "group": 24, "order": True},
     {"group": 24, "activation": "clamped_swiglu"}),
    ("linear_grouped", {"rows": 5, "width": 200, "out": 70, "group": 128, "zeros": True, "order": True},
     {"group": 128, "zero_points": True}),
    ("linear_grouped", {"rows": 1, "width": 129, "out": 33, "bits": 8, "group": 64, "zeros": True},
     {"bits": 8, "group": 64, "zero_points": True}),
    ("linear_cross_entropy", {"rows": 33, "width": 48, "vocab": 1025}, {}),
    ("linear_cross_entropy", {"rows": 33, "width": 48, "vocab": 129}, {"reduction": "sum"}),
    ("linear_cross_entropy", {"rows": 17, "width": 48, "vocab": 129}, {"reduction": "none"}),
    ("linear_cross_entropy", {"rows": 17, "width": 48, "vocab": 64}, {"ignore_index": 3}),
    *(
        (
            "linear_cross_entropy",
            {"rows": 17, "width": 48, "vocab": 1025, "weighted": 1},
            {"reduction": reduction, "label_smoothing": 0.1, "z_loss": 1e-2, "prefer": prefer},
        )
        for reduction, prefer in (("mean", "memory"), ("sum", "time"), ("none", "auto"))
    ),
    ("linear_cross_entropy", {"rows": 17, "width": 48, "vocab": 129}, {"z_loss": 1e-2}),
    ("linear_cross_entropy", {"rows": 17, "width": 48, "vocab": 129}, {"softcap": 2.0}),
    *(
        (
            "linear_cross_entropy",
            {"rows": 9, "width": 48, "vocab": 129, "weighted": 1, "spread": spread},
            {"reduction": reduction, "label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 30.0},
        )
        for spread, reduction in ((1, "mean"), (1, "sum"), (1, "none"), (100, "none"))
    ),
    *(
        (
            "linear_cross_entropy",
            {"rows": 17, "width": 48, "vocab": 129, "spread": spread, "level": level},
            {"reduction": reduction, **terms},
        )
        for spread, level in ((100, 0), (1000, 0), (1, 100), (1, 1000))
        for reduction, terms in (("mean", {}), ("none", {}), ("none", {"label_smoothing": 0.1, "z_loss": 1e-2}))
    ),
    ("linear_cross_entropy", {"rows": 0, "width": 48, "vocab": 129}, {"reduction": "sum"}),
    ("embedding", {"batch": 3, "tokens": 9, "vocab": 33, "width": 65}, {}),
    ("embedding", {"batch": 2, "tokens": 70, "vocab": 3, "width": 64}, {}),
    ("embedding", {"batch": 2, "tokens": 9, "vocab": 33, "width": 65, "positions": 5}, {}),
    ("muon", {"rows": 65, "columns": 129}, {"lr": 1.0}),
    ("muon", {"rows": 129, "columns": 33}, {"lr": 1.0, "adjust_lr_fn": "original", "nesterov": False}),
    ("muon", {"rows": 1, "columns": 17}, {"lr": 1.0, "momentum": 0.5, "ns_steps": 3}),
    ("muon", {"rows": 300, "columns": 257}, {"lr": 1.0, "ns_coefficients": (2.0, -1.5, 0.5)}),
    ("muon", {"rows": 0, "columns": 16}, {"lr": 1.0}),
    ("dropout", {"rows": 5, "width": 129}, {"p": 0.25}),
    ("dropout", {"rows": 0, "width": 16}, {"p": 0.5}),
    ("rotary", {"batch": 2, "tokens": 5, "heads": 3, "head_dim": 48, "pairs": 17}, {"heads": 2}),
    ("rotary", {"batch": 1, "tokens": 9, "heads": 3, "head_dim": 16, "pairs": 8}, {"heads": 3}),
    ("rotary", {"batch": 2, "tokens": 5, "heads": 3, "head_dim": 48, "pairs": 17}, {"heads": 2, "interleaved": True}),
    ("rotary", {"batch": 0, "tokens": 5, "heads": 3, "head_dim": 16, "pairs": 8}, {"heads": 2}),
    # Norms of each head (1) or of all heads together (2), without rotary, with pairs of halves and of neighbours.
    ("qk_norm", {"batch": 2, "tokens": 5, "heads": 3, "head_dim": 33, "kv_heads": 1}, {"n_head": 3, "offset": 1.0}),
    ("qk_norm", {"batch": 1, "tokens": 7, "heads": 2, "head_dim": 48, "pairs": 17}, {"n_head": 2, "eps": 1e-3}),
    (
        "qk_norm",
        {"batch": 2, "tokens": 5, "heads": 5, "head_dim": 16, "kv_heads": 2, "pairs": 8, "norms": 2},
        {"n_head": 5, "offset": 1.0},
    ),
    (
        "qk_norm",
        {"batch": 1, "tokens": 9, "heads": 2, "head_dim": 24, "kv_heads": 1, "pairs": 5, "norms": 2},
        {"n_head": 2, "interleaved": True},
    ),
    ("qk_norm", {"batch": 1, "tokens": 3, "heads": 1, "head_dim": 3}, {"n_head": 1}),
    ("qk_norm", {"batch": 0, "tokens": 3, "heads": 2, "head_dim": 16, "pairs": 4}, {"n_head": 2}),
    ("attention", {"batch": 2, "tokens": 65, "heads": 2, "head_dim": 16}, {}),
    ("attention", {"batch": 1, "tokens": 129, "heads": 1, "head_dim": 64}, {}),
    ("attention", {"batch": 1, "tokens": 33, "heads": 2, "head_dim": 80}, {"causal": False}),
    ("attention", {"batch": 1, "tokens": 5, "heads": 4, "head_dim": 16, "keys": 70, "kv_heads": 2}, {}),
    ("attention", {"batch": 1, "tokens": 6, "heads": 2, "head_dim": 16, "keys": 5}, {}),
    ("attention", {"batch": 2, "tokens": 1, "heads": 2, "head_dim": 32, "keys": 67, "kv_heads": 1}, {"scale": 0.3}),
    ("attention", {"batch": 1, "tokens": 80, "heads": 2, "head_dim": 16}, {"window": 17}),
    ("attention", {"batch": 1, "tokens": 66, "heads": 2, "head_dim": 32}, {"softcap": 2.0}),
    ("attention", {"batch": 2, "tokens": 70, "heads": 4, "head_dim": 16, "kv_heads": 2, "sinks": 1}, {}),
    (
        "attention",
        {"batch": 1, "tokens": 67, "heads": 2, "head_dim": 24, "kv_heads": 1, "slopes": 1, "sinks": 1},
        {"softcap": 3.0, "window": 9},
    ),
    ("attention", {"batch": 3, "tokens": 41, "heads": 2, "head_dim": 16, "padded": 11, "sinks": 1}, {"softcap": 50.0}),
    (
        "attention",
        {"batch": 1, "tokens": 69, "heads": 2, "head_dim": 16, "documents": 3, "sinks": 1},
        {"softcap": 2.0, "causal": False},
    ),
    (
        "attention",
        {"batch": 2, "tokens": 3, "heads": 4, "head_dim": 32, "keys": 67, "kv_heads": 2, "slopes": 1, "sinks": 1},
        {"softcap": 2.0},
    ),
    ("attention_decode", {"batch": 3, "heads": 4, "head_dim": 16, "keys": 70, "kv_heads": 2}, {}),
    (
        "attention_decode",
        {"batch": 2, "queries": 5, "heads": 2, "head_dim": 80, "keys": 33, "block": 33},
        {"window": 9},
    ),
    ("attention_decode", {"batch": 3, "heads": 4, "head_dim": 16, "keys": 270, "kv_heads": 2, "bits": 8}, {}),
    (
        "attention_decode",
        {"batch": 3, "heads": 4, "head_dim": 16, "keys": 70, "kv_heads": 2, "slopes": 1, "sinks": 1},
        {"softcap": 2.0, "window": 40},
    ),
    (
        "attention_decode",
        {"batch": 2, "queries": 5, "heads": 2, "head_dim": 24, "keys": 300, "bits": 8, "sinks": 1},
        {"softcap": 3.0},
    ),
    ("cache_store", {"tokens": 32, "heads": 3, "head_dim": 17}, {}),
    ("cache_store", {"tokens": 9, "heads": 2, "head_dim": 64, "bits": 8}, {}),
    ("attention_qkv", {"batch": 2, "tokens": 65, "heads": 2, "head_dim": 32}, {"n_head": 2}),
    (
        "attention_qkv",
        {"batch": 1, "tokens": 33, "heads": 4, "head_dim": 16, "kv_heads": 2},
        {"n_head": 4, "window": 9},
    ),
    # With rotary: groups and one key head, all of a head or a share of it, pairs of halves and of neighbours.
    ("attention_qkv", {"batch": 1, "tokens": 67, "heads": 2, "head_dim": 24, "kv_heads": 1, "pairs": 5}, {"n_head": 2}),
    ("attention_qkv", {"batch": 1, "tokens": 21, "heads": 2, "head_dim": 96, "pairs": 12}, {"n_head": 2}),
    ("attention_qkv", {"batch": 1, "tokens": 17, "heads": 1, "head_dim": 256, "pairs": 128}, {"n_head": 1}),
    ("attention_qkv", {"batch": 1, "tokens": 5, "heads": 1, "head_dim": 16, "pairs": 0}, {"n_head": 1}),
    (
        "attention_qkv",
        {"batch": 1, "tokens": 33, "heads": 4, "head_dim": 24, "kv_heads": 2, "pairs": 12},
        {"n_head": 4, "interleaved": True, "window": 9},
    ),
    (
        "attention_qkv",
        {"batch": 2, "tokens": 9, "heads": 1, "head_dim": 96, "pairs": 7},
        {"n_head": 1, "interleaved": True},
    ),
    ("attention_qkv", {"batch": 1, "tokens": 131, "heads": 2, "head_dim": 16, "documents": 3}, {"n_head": 2}),
    (
        "attention_qkv",
        {"batch": 1, "tokens": 67, "heads": 2, "head_dim": 24, "kv_heads": 1, "pairs": 5, "documents": 4},
        {"n_head": 2, "window": 9},
    ),
    (
        "attention_qkv",
        {"batch": 1, "tokens": 70, "heads": 2, "head_dim": 16, "documents": 3, "sinks": 1},
        {"n_head": 2},
    ),
    (
        "attention_qkv",
        {"batch": 1, "tokens": 33, "heads": 4, "head_dim": 24, "kv_heads": 2, "pairs": 12, "sinks": 1},
        {"n_head": 4, "window": 9, "softcap": 2.0},
    ),
    ("attention_qkv", {"batch": 2, "tokens": 33, "heads": 4, "head_dim": 16, "kv_heads": 2, "norms": 1}, {"n_head": 4}),
    (
        "attention_qkv",
        {"batch": 1, "tokens": 67, "heads": 2, "head_dim": 24, "kv_heads": 1, "pairs": 5, "norms": 1},
        {"n_head": 2, "norm_offset": 1.0, "norm_eps": 1e-3},
    ),
    (
        "attention_qkv",
        {"batch": 1, "tokens": 33, "heads": 4, "head_dim": 24, "kv_heads": 2, "pairs": 12, "norms": 2},
        {"n_head": 4, "interleaved": True, "window": 9},
    ),
    (
        "attention_qkv",
        {"batch": 1, "tokens": 41, "heads": 2, "head_dim": 32, "pairs": 16, "norms": 2, "documents": 3},
        {"n_head": 2},
    ),
]

# Sizes of real models, for hardware that is fast enough in float64.
LARGE_CASES = [
    ("layernorm", {"rows": 4096, "width": 1600}, {}),
    ("add_layernorm", {"rows": 4096, "width": 768}, {}),
    ("rmsnorm", {"rows": 4096, "width": 2048}, {}),
    ("add_rmsnorm", {"rows": 4096, "width": 2048}, {}),
    ("mlp", {"rows": 1024, "width": 768, "hidden": 3072}, {}),
    ("gated_mlp", {"rows": 1024, "width": 768, "hidden": 2048}, {}),
    ("experts", {"rows": 512, "width": 768, "hidden": 512, "experts": 16, "choices": 4}, {}),
    ("linear", {"rows": 1100, "width": 2100, "out": 3100}, {}),
    ("linear_cross_entropy", {"rows": 1024, "width": 768, "vocab": 50257}, {}),
    ("linear_lora", {"rows": 1024, "width": 768, "out": 2304, "rank": 16}, {"scale": 2.0}),
    ("linear_grouped", {"rows": 512, "width": 768, "out": 3072}, {"levels": "unsigned"}),
    ("linear_q8", {"rows": 512, "width": 768, "out": 3072}, {}),
    ("linear_q4", {"rows": 512, "width": 768, "out": 3072}, {}),
    ("embedding", {"batch": 4, "tokens": 256, "vocab": 50257, "width": 768}, {}),
    ("dropout", {"rows": 1024, "width": 768}, {"p": 0.1}),
    ("rotary", {"batch": 4, "tokens": 256, "heads": 48, "head_dim": 256, "pairs": 32}, {"heads": 32}),
    ("qk_norm", {"batch": 4, "tokens": 256, "heads": 16, "head_dim": 128, "kv_heads": 8, "pairs": 64}, {"n_head": 16}),
    ("attention", {"batch": 2, "tokens": 1025, "heads": 4, "head_dim": 64}, {}),
    ("attention", {"batch": 1, "tokens": 1000, "heads": 2, "head_dim": 128}, {}),
    ("attention", {"batch": 1, "tokens": 1000, "heads": 2, "head_dim": 256, "kv_heads": 1}, {"softcap": 50.0}),
    ("attention_decode", {"batch": 8, "heads": 32, "head_dim": 128, "keys": 2049, "kv_heads": 8}, {}),
    (
        "attention_decode",
        {"batch": 8, "heads": 32, "head_dim": 128, "keys": 2049, "kv_heads": 8, "bits": 8},
        {},
    ),
    ("cache_store", {"tokens": 1024, "heads": 8, "head_dim": 128, "bits": 8}, {}),
    ("attention_qkv", {"batch": 4, "tokens": 256, "heads": 12, "head_dim": 64}, {"n_head": 12}),
    ("attention_qkv", {"batch": 2, "tokens": 1025, "heads": 8, "head_dim": 64, "pairs": 8}, {"n_head": 8}),
    (
        "attention_qkv",
        {"batch": 1, "tokens": 1000, "heads": 4, "head_dim": 256, "kv_heads": 2, "pairs": 32},
        {"n_head": 4, "interleaved": True},
    ),
    (
        "attention_qkv",
        {"batch": 1, "tokens": 1000, "heads": 8, "head_dim": 64, "kv_heads": 1, "pairs": 32, "sinks": 1},
        {"n_head": 8, "window": 128},
    ),
    (
        "attention_qkv",
        {"batch": 2, "tokens": 1000, "heads": 8, "head_dim": 128, "kv_heads": 4, "pairs": 64, "norms": 1},
        {"n_head": 8},
    ),
    ("adamw", {"count": (1 << 20) + 1}, {"lr": 1e-2, "weight_decay": 0.1}),
    ("muon", {"rows": 768, "columns": 3072}, {"lr": 1.0}),
    ("sum_of_squares", {"count": (1 << 20) + 1}, {}),
]

# Floating-point inputs without a gradient, by op.
TABLES = ("cos", "sin")
CONSTANT = {"rotary": TABLES, "qk_norm": TABLES, "attention_qkv": TABLES, "linear_cross_entropy": ("weight",),
            "linear_q8": ("scale",), "linear_q4": ("scale",), "linear_grouped": ("scale", "offset")}  # fmt: skip


def sample(
    name: str, sizes: Mapping[str, int | None], dtype: torch.dtype, device: torch.device | str = "cpu", *,
    grad: bool = True,
) -> list[Tensor | None]:  # fmt: skip
    """Return the inputs of a call, the same each time; floating-point ones require a gradient if the op has one."""
    grad = grad and OPS[name].gradient
    torch.manual_seed(len(name) + sum(v for v in sizes.values() if v))
    tensors = OPS[name].sample(**sizes, dtype=dtype, device=device)
    constant = CONSTANT.get(name, ())
    return [
        leaf(t) if grad and t is not None and t.is_floating_point() and n not in constant else t
        for n, t in zip(OPS[name].tensor_names, tensors, strict=False)
    ]


def leaf(tensor: Tensor) -> Tensor:
    """Return a copy that requires a gradient."""
    return tensor.detach().clone().requires_grad_()


def double(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return the tensors in float64."""
    return [
        t.detach().double().requires_grad_(t.requires_grad) if t is not None and t.is_floating_point() else t
        for t in tensors
    ]


def named(op: Op, tensors: Sequence[Tensor | None]) -> dict[str, Tensor | None]:
    """Return the tensors of a call by their names: some of them are keyword-only."""
    return dict(zip(op.tensor_names, tensors, strict=False))


def run(backend: str, op: Callable[..., Any], tensors: Sequence[Tensor | None], params: Mapping[str, Any]):
    """Return outputs and input gradients; random upstream gradients are the same for every backend."""
    with use_backend(backend):
        results = op(**named(op, tensors), **params) if isinstance(op, Op) else op(*tensors, **params)
    results = results if isinstance(results, tuple) else (results,)
    generator = torch.Generator().manual_seed(7)
    ups = [torch.randn(r.shape, generator=generator, dtype=torch.float64).to(r) for r in results]
    wanted = [t for t in tensors if t is not None and t.requires_grad]
    return [*results, *(torch.autograd.grad(results, wanted, ups) if wanted else ())]


def run_mutating(backend: str, op: Op, tensors: Sequence[Tensor | None], params: Mapping[str, Any]) -> list[Tensor]:
    """Run an in-place op on copies and return the tensors that it mutates."""
    copies = [None if t is None else t.detach().clone() for t in tensors]
    with use_backend(backend):
        op(*copies, **params)
    named = zip(op.tensor_names, whole(op, copies), strict=False)
    return [t for name, t in named if name in op.mutates and t is not None]


def whole(op: Op, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return the tensors with split master weights joined, because the rule is for one rounding, not two."""
    named = dict(zip(op.tensor_names, tensors, strict=False))
    if named.get("remainder") is not None:
        named |= {"param": join(named["param"], named["remainder"]), "remainder": None}
    return list(named.values())


@dataclass(frozen=True)
class Verdict:
    """Largest absolute error of one result against float64, torch's own error, and the limit."""

    error: float
    torch_error: float
    limit: float
    finite: bool

    @property
    def passed(self) -> bool:
        return self.finite and self.error <= self.limit

    def __str__(self) -> str:
        finite = "" if self.finite else ", not finite"
        return f"error {self.error:.3e}, torch's {self.torch_error:.3e}, limit {self.limit:.3e}{finite}"


def judge(
    ours: Sequence[Tensor], torchs: Sequence[Tensor], truth: Sequence[Tensor], dtype: torch.dtype
) -> list[Verdict]:
    """Apply the rule to each result.

    Raises:
        ValueError: a shape differs from the truth's, or a dtype from torch's.
    """
    verdicts = []
    for i, (a, b, t) in enumerate(zip(ours, torchs, truth, strict=True)):
        if a.shape != t.shape or a.dtype != b.dtype:
            raise ValueError(f"result {i}: got {tuple(a.shape)} {a.dtype}, expected {tuple(t.shape)} {b.dtype}")
        error, allowed, largest = (
            x.abs().max().item() if x.numel() else 0.0 for x in (a.double() - t, b.double() - t, t)
        )
        finite = bool(torch.isfinite(a).all() or not torch.isfinite(t).all())
        verdicts.append(Verdict(error, allowed, 2 * allowed + FLOOR[dtype] * largest, finite))
    return verdicts


@dataclass(frozen=True, kw_only=True)
class Check:
    """One case of one backend; the errors are those of the result with the largest error relative to its limit."""

    op: str
    case: dict[str, Any]
    backend: str
    device: str
    dtype: str
    passed: bool
    error: float | None
    torch_error: float | None
    limit: float | None
    message: str = ""


def backends(op: Op, tensors: Sequence[Tensor | None], params: Mapping[str, Any]) -> list[str]:
    """Return the backends of this device that accept the call when forced; a slower backend counts too."""
    found = []
    for name, home in BACKENDS.items():
        with use_backend(name):
            if home == tensors[0].device.type and op.explain(**named(op, tensors), **params)[name] is None:
                found.append(name)
    return found


def check(
    name: str, sizes: Mapping[str, int | None], params: Mapping[str, Any], dtype: torch.dtype,
    device: torch.device | str,
) -> list[Check]:  # fmt: skip
    """Check one case on every backend that accepts it, and that two runs give the same bits."""
    op = OPS[name]
    tensors = sample(name, sizes, dtype, device, grad=op.gradient)
    go = run_mutating if op.mutates else run
    truth, torchs = go("eager", op, double(whole(op, tensors)), params), go("eager", op, tensors, params)
    checks = []
    for backend in backends(op, tensors, params):
        ours = go(backend, op, tensors, params)
        verdicts = judge(ours, torchs, truth, dtype)
        worst = max(verdicts, key=lambda v: (not v.passed, v.error / v.limit if v.limit else 0.0))
        faults = [f"result {i}: {v}" for i, v in enumerate(verdicts) if not v.passed]
        if not all(torch.equal(a, b) for a, b in zip(ours, go(backend, op, tensors, params), strict=True)):
            faults.append("a second run gave other bits")
        checks.append(
            Check(
                op=name, case={**sizes, **params}, backend=backend, device=str(device),
                dtype=str(dtype).removeprefix("torch."), passed=not faults, error=_number(worst.error),
                torch_error=_number(worst.torch_error), limit=_number(worst.limit), message="; ".join(faults),
            )
        )  # fmt: skip
    return checks


def _number(value: float) -> float | None:
    """Return None instead of NaN and infinity, which JSON does not have."""
    return value if abs(value) < float("inf") else None
