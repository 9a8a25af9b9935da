"""Muon for the matrices of a model's blocks, AdamW for everything else, in one optimizer.

Muon is for matrices that multiply activations. It makes their update orthogonal, so no direction dominates the update.
Embeddings, the head, norms and biases stay with AdamW, as in Jordan et al. 2024, kellerjordan.github.io/posts/muon, and
in Liu et al. 2025, "Muon is Scalable for LLM Training", arXiv:2502.16982. Math: kernels/ops/muon.py.

The rows of queries, keys and values in a fused weight, and the experts in a stack, are matrices of their own: the
singular values of the whole would mix what they compute. Jordan's post reports that Q, K and V work better apart.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from peakgpt.engine.model.attention import CausalSelfAttention
from peakgpt.engine.model.experts import ExpertLinear
from peakgpt.engine.model.lora import cast_frozen, has_adapters
from peakgpt.engine.training.layer_depths import depths, split_by_depth
from peakgpt.engine.training.optimizer import AdamW, Calls, decay_groups
from peakgpt.engine.training.optimizer_state import MUON, Moments, matrix_tensors
from peakgpt.engine.training.train_config import TrainConfig
from peakgpt.kernels.core.dispatch import Op
from peakgpt.kernels.ops.adamw import DTYPES
from peakgpt.kernels.ops.muon import muon

OPTIONS = ("momentum", "nesterov", "ns_coefficients", "ns_steps", "adjust_lr_fn")
IN_A_BLOCK = re.compile(r"(^|\.)\d+\.")  # the name of a module in a list of modules


class Muon(AdamW):
    """AdamW whose groups with use_muon are updated by Muon; their parameters are matrices, or stacks of matrices.

    Such a group has all OPTIONS, as in torch.optim.Muon, and `split_rows`: None, or the number of rows of each matrix
    that a parameter fuses.
    """

    def _add_calls(self, calls: Calls, index: int, parameter: nn.Parameter) -> Tensor:
        group = self.param_groups[index]
        if not group.get("use_muon"):
            return super()._add_calls(calls, index, parameter)
        tensors = matrix_tensors(parameter, self.state[parameter])
        rows = group["split_rows"] or parameter.shape[-2:-1]
        params, *others = (None if t is None else _matrices(t, rows) for t in tensors)
        for matrices in zip(params, *(other or [None] * len(params) for other in others), strict=True):
            key = index, parameter.dtype, parameter.device, matrices[0].shape
            calls.setdefault(key, []).append(matrices)
        return tensors[0]

    def _op(self, group: Mapping[str, Any]) -> Op[..., Any]:
        return muon if group.get("use_muon") else super()._op(group)

    def _moments(self, group: Mapping[str, Any]) -> Moments:
        return MUON if group.get("use_muon") else super()._moments(group)

    def _options(self, group: Mapping[str, Any]) -> dict[str, Any]:
        if not group.get("use_muon"):
            return super()._options(group)
        return {"lr": float(group["lr"]), "weight_decay": float(group["weight_decay"]),
                **{name: group[name] for name in OPTIONS}}  # fmt: skip


def _matrices(tensor: Tensor, rows: tuple[int, ...]) -> list[Tensor]:
    """Return the matrices of a contiguous tensor, each contiguous."""
    stack = tensor.view(-1, *tensor.shape[-2:])
    return [part for matrix in stack.unbind() for part in matrix.split(rows)]


def make_optimizer(model: nn.Module, config: TrainConfig) -> AdamW:
    """Build the optimizer of a training; parameters are cast to config.dtype."""
    options = {"lr": config.lr, "betas": config.betas, "eps": config.eps, "max_norm": config.max_norm,
               "dtype": config.dtype}  # fmt: skip
    if has_adapters(model):
        if config.optimizer != "adamw":
            raise ValueError(f"optimizer is {config.optimizer} for a model with adapters, expected adamw")
        cast_frozen(model, config.dtype)
    groups = decay_groups(model, config.weight_decay)
    if config.optimizer == "adamw":
        return AdamW(_with_rates(model, config, groups), **options)
    matrices = block_matrices(model)
    if not matrices:
        raise ValueError("optimizer is muon: got a model without linear layers in blocks, expected adamw")
    by_rows: dict[tuple[int, ...] | None, list[Tensor]] = {}
    for parameter, rows in matrices.items():
        by_rows.setdefault(rows, []).append(parameter)
    shared = {"use_muon": True, "weight_decay": config.weight_decay, "lr": config.matrix_lr or config.lr,
              **{name: getattr(config, name) for name in OPTIONS}}  # fmt: skip
    muon_groups = [{**shared, "params": parameters, "split_rows": rows} for rows, parameters in by_rows.items()]
    others = [{**group, "params": [p for p in group["params"] if p not in matrices]} for group in groups]
    groups = [*muon_groups, *(group for group in others if group["params"])]
    return Muon(_with_rates(model, config, groups), **options)


def _with_rates(model: nn.Module, config: TrainConfig, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give each layer its learning rate, if they differ."""
    decay = config.layerwise_lr_decay
    return groups if decay == 1.0 else split_by_depth(groups, depths(model), config.lr, decay)


def block_matrices(model: nn.Module) -> dict[Tensor, tuple[int, ...] | None]:
    """Return the weights of linear layers in blocks, frozen or not, and the rows that each one fuses."""
    fused = {module.c_attn: fused_rows(module) for module in model.modules() if isinstance(module, CausalSelfAttention)}
    return {
        module.weight: fused.get(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | ExpertLinear) and IN_A_BLOCK.search(name) and module.weight.dtype in DTYPES
    }


def fused_rows(attention: CausalSelfAttention) -> tuple[int, int, int]:
    """Return the rows of queries, keys and values in the weight of c_attn."""
    kv_rows = attention.n_kv_head * attention.head_dim
    return attention.n_head * attention.head_dim, kv_rows, kv_rows
