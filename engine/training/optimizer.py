"""AdamW: one op updates all parameters of a group at once, each in the memory that it has.

The optimizer never moves a parameter or a gradient and shares no memory between its tensors. So a parameter may be
replaced (`p.data = x`), resized, shared with other processes, flattened or saved by any library between two steps.

A bfloat16 parameter is the high half of its float32 master (kernels/ops/adamw.py), so a value that is written to the
parameter changes the master too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from peakgpt.engine.model.lora import has_adapters
from peakgpt.engine.training.optimizer_state import (
    ADAMW,
    Moments,
    check_entry,
    loaded_entry,
    master_of,
    split_pieces,
    update_tensors,
)
from peakgpt.kernels.core.dispatch import Op
from peakgpt.kernels.core.foreach import Foreach
from peakgpt.kernels.ops.adamw import DTYPES, adamw
from peakgpt.kernels.ops.sum_of_squares import sum_of_squares

UNSUPPORTED = ("amsgrad", "maximize", "differentiable")
COPIED = ("max_norm", "grad_norm", "lr_scale", "_dtype")  # attributes that torch's __getstate__ leaves out

# Of tensors that one launch updates: index of the group, dtype, device, and what else they must have in common.
Key = tuple[int, torch.dtype, torch.device, Any]
Calls = dict[Key, list[tuple["Tensor | None", ...]]]


class AdamW(torch.optim.Optimizer):
    """torch.optim.AdamW in one pass over memory, with float32 masters and clipping to a global norm inside.

    A step whose gradient norm is not finite changes nothing; this is decided on the device.

    Attributes:
        lr_scale: None, or a float32 tensor () that multiplies every group's lr. It is read on the device, so a CUDA
            graph follows a schedule.
        grad_norm: after a step, the norm of all gradients before clipping, a tensor () on the device; None without
            max_norm.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        max_norm: float | None = None,
        dtype: torch.dtype | None = None,
    ):
        """
        Args:
            params: parameters, or groups of parameters, in float32 or bfloat16.
            lr, betas, eps, weight_decay: as in torch.optim.AdamW, for each group.
            foreach, capturable, fused: accepted for compatibility; the one implementation is all three.
            amsgrad, maximize, differentiable: not supported.
            max_norm: gradients are clipped to this global norm over all groups.
            dtype: the parameters are cast to this dtype; their old values become the float32 master.
        Raises:
            ValueError: an option that is not supported or out of range, or a parameter that is sparse, a tensor
                subclass such as DTensor, not floating point, or float16: float16 needs loss scaling, and torch's scaler
                takes float32 parameters under autocast.
        """
        if dtype not in (None, *DTYPES):
            raise ValueError(f"{self._name}: dtype is {dtype}, expected torch.float32 or torch.bfloat16")
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"{self._name}: max_norm is {max_norm}, expected more than 0, or None")
        self.max_norm, self.grad_norm, self.lr_scale, self._dtype = max_norm, None, None, dtype
        self._launches: dict[Key, tuple[Foreach, Foreach]] = {}
        super().__init__(params, {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad,
            "maximize": maximize, "foreach": foreach, "capturable": capturable, "differentiable": differentiable,
            "fused": fused,
        })  # fmt: skip

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{name: getattr(self, name) for name in COPIED}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._launches = {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; missing options get the optimizer's values."""
        _add_param_group(self, param_group)
        group = self.param_groups[-1]
        try:
            _check(self._name, group)
        except ValueError:
            self.param_groups.pop()
            raise
        for parameter in group["params"]:
            if self._dtype not in (None, parameter.dtype):
                self._cast(parameter, self._dtype)

    @torch.no_grad()
    def _cast(self, parameter: nn.Parameter, dtype: torch.dtype) -> None:
        """Cast a parameter; its state keeps the low half of a float32 value that becomes bfloat16."""
        grad, parameter.grad = parameter.grad, None  # a parameter that has a gradient cannot change its dtype
        if dtype == torch.bfloat16:
            parameter.data, self.state[parameter]["remainder"] = split_pieces(parameter.detach())
        else:
            parameter.data = parameter.data.to(dtype)
        parameter.grad = None if grad is None else grad.to(dtype)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Update all parameters that have a gradient; return the closure's loss.

        Raises:
            ValueError: an option that is not supported, or a gradient or parameter that no longer fits.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        calls: Calls = {}
        updated: list[tuple[nn.Parameter, Tensor]] = []
        for index, group in enumerate(self.param_groups):
            if group.get("amsgrad") or group.get("maximize") or group.get("differentiable"):  # set later
                _check(self._name, group)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    updated.append((parameter, self._add_calls(calls, index, parameter)))
        if not calls:
            return loss
        self.grad_norm = None if self.max_norm is None else self._norm(calls)
        for key, tensors in calls.items():
            group, state = self.param_groups[key[0]], tensors[0][-1]
            shared = (t if t is None else t.to(state.device, state.dtype) for t in (self.grad_norm, self.lr_scale))
            self._launch(key)[1](tensors, *shared, **self._options(group), max_norm=self.max_norm)
        for parameter, tensor in updated:
            if tensor is not parameter and tensor.data_ptr() != parameter.data_ptr():
                parameter.copy_(tensor.view(parameter.shape))  # its elements have gaps, so the op got a copy
        torch.autograd.graph.increment_version([parameter for parameter, _ in updated])  # tells autograd
        return loss

    @property
    def _name(self) -> str:
        """The optimizer in error messages."""
        return type(self).__name__

    # ---- what an optimizer with other groups overrides ----

    def _add_calls(self, calls: Calls, index: int, parameter: nn.Parameter) -> Tensor:
        """Add the tensors of the op's calls that update a parameter.

        Returns:
            The tensor that they write: the parameter's memory, or a copy.
        """
        tensors = update_tensors(parameter, self.state[parameter])
        calls.setdefault((index, parameter.dtype, parameter.device, None), []).append(tensors)
        return tensors[0]

    def _op(self, group: Mapping[str, Any]) -> Op[..., Any]:
        return adamw

    def _moments(self, group: Mapping[str, Any]) -> Moments:
        return ADAMW

    def _options(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """Return the parameters of the op for a group."""
        return {"lr": float(group["lr"]), "beta1": float(group["betas"][0]), "beta2": float(group["betas"][1]),
                "eps": float(group["eps"]), "weight_decay": float(group["weight_decay"])}  # fmt: skip

    def _norm(self, calls: Calls) -> Tensor:
        """Return the global norm of all gradients, () in float32 or wider, without a device sync."""
        totals: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        for key, tensors in calls.items():
            _, dtype, device, _ = key
            wide = torch.promote_types(dtype, torch.float32)
            total = totals.setdefault((device, wide), torch.zeros((), dtype=wide, device=device))
            self._launch(key)[0]([(grad,) for _, grad, *_ in tensors], total)
        first, *others = totals.values()
        return torch.stack([first, *(total.to(first.device, first.dtype) for total in others)]).sum().sqrt()

    def _launch(self, key: Key) -> tuple[Foreach, Foreach]:
        if key not in self._launches:
            self._launches[key] = Foreach(sum_of_squares), Foreach(self._op(self.param_groups[key[0]]))
        return self._launches[key]

    def captured_state(self) -> list[Any]:
        """Return what a captured step depends on: max_norm, and tables of addresses. A new table is not equal."""
        return [self.max_norm, *(launch.prepared for pair in self._launches.values() for launch in pair)]

    def master(self, parameter: Tensor) -> Tensor:
        """Return a parameter's float32 master; the parameter itself if it has none.

        Raises:
            ValueError: the tensor is not a parameter of this optimizer.
        """
        if not any(parameter is own for group in self.param_groups for own in group["params"]):
            raise ValueError(f"{self._name}: got a tensor of shape {tuple(parameter.shape)}, expected a parameter")
        return master_of(parameter, self.state.get(parameter, {}))

    def named_masters(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Yield the model's state dict with float32 masters instead of bfloat16 parameters, each made on request.

        Of a model with adapters only the tensors that train: the others never change.
        """
        owned, only_trained = {p for group in self.param_groups for p in group["params"]}, has_adapters(model)
        parameters = {n: p for n, p in model.named_parameters(remove_duplicate=False) if p in owned}
        for name, tensor in model.state_dict().items():
            parameter = parameters.get(name)
            if parameter is not None:
                yield name, master_of(parameter, self.state.get(parameter, {}))
            elif not only_trained:
                yield name, tensor

    def master_weights(self, model: nn.Module) -> dict[str, Tensor]:
        """Return all of `named_masters`, for a checkpoint."""
        return dict(self.named_masters(model))

    @torch.no_grad()
    def load_master_weights(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        """Load what `named_masters` yields: parameters get their values back, and bfloat16 ones their masters.

        Raises:
            RuntimeError: a tensor is missing, unexpected or of another shape.
        """
        model.load_state_dict(weights, strict=not has_adapters(model))
        owned = {p for group in self.param_groups for p in group["params"]}
        for name, parameter in model.named_parameters():
            if parameter in owned and parameter.dtype == torch.bfloat16:
                high, self.state[parameter]["remainder"] = split_pieces(weights[name].to(parameter.device))
                parameter.copy_(high)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of all parameters and the options of all groups; tensors are not copied."""
        return _state_dict(self)

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state of this class or of torch.optim.AdamW.

        Raises:
            ValueError: groups, shapes or entries do not fit, or the state uses an option that is not supported.
        """
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        groups, states = state_dict["param_groups"], state_dict["state"]
        got, expected = ([len(g["params"]) for g in gs] for gs in (groups, self.param_groups))
        if got != expected:
            raise ValueError(f"{self._name}: the state has groups of {got} parameters, expected {expected}")
        entries: dict[Tensor, Mapping[str, Any]] = {}
        for group, saved in zip(self.param_groups, groups, strict=True):
            _check(self._name, {**group, **saved, "params": group["params"]})
            for i, parameter in zip(saved["params"], group["params"], strict=True):
                entries[parameter] = check_entry(i, states.get(i), parameter, self._moments(group))
        for group, saved in zip(self.param_groups, groups, strict=True):
            group.update({k: copy.deepcopy(v) for k, v in saved.items() if k not in ("params", "param_names")})
        for group in self.param_groups:
            for parameter in group["params"]:
                remainder = self.state.pop(parameter, {}).get("remainder")
                state = loaded_entry(entries[parameter], remainder, parameter, self._moments(group))
                if state:
                    self.state[parameter] = state
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)


# __wrapped__: without torch's guard against torch.compile, which imports torch._dynamo and costs 150 MiB.
_add_param_group = getattr(torch.optim.Optimizer.add_param_group, "__wrapped__", torch.optim.Optimizer.add_param_group)
_state_dict = getattr(torch.optim.Optimizer.state_dict, "__wrapped__", torch.optim.Optimizer.state_dict)


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return two parameter groups: matrices and embeddings decay, biases and norms do not.

    Frozen parameters are in them too: the optimizer casts them and keeps their masters, and they have no gradient. A
    model with adapters keeps no masters of its frozen weights: a run saves its adapter alone.
    """
    only_trained = has_adapters(model)
    owned = ((n, p) for n, p in model.named_parameters() if p.requires_grad or (p.dtype in DTYPES and not only_trained))
    decays = {p: p.dim() >= 2 and not n.endswith("bias") for n, p in owned}
    groups = [
        {"params": [p for p in decays if decays[p]], "weight_decay": weight_decay},
        {"params": [p for p in decays if not decays[p]], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _check(name: str, group: Mapping[str, Any]) -> None:
    """Raise ValueError unless the options are in range and the op takes the parameters."""
    for option in UNSUPPORTED:
        if group.get(option):
            raise ValueError(f"{name}: {option} is {group[option]}, expected False: it is not supported")
    if not group.get("decoupled_weight_decay", True):
        raise ValueError(f"{name}: decoupled_weight_decay is False, expected True: Adam without it is not supported")
    for option in ("lr", "eps", "weight_decay"):
        if not group[option] >= 0:
            raise ValueError(f"{name}: {option} is {group[option]}, expected at least 0")
    if len(group["betas"]) != 2 or not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"{name}: betas are {group['betas']}, expected two values in 0 <= beta < 1")
    for parameter in group["params"]:
        if is_traceable_wrapper_subclass(parameter):
            raise ValueError(
                f"{name}: got a parameter of type {type(parameter).__name__}, expected a plain tensor: "
                "tensor subclasses, such as the DTensors of FSDP2 and tensor parallelism, need torch.optim.AdamW"
            )
        if parameter.dtype not in DTYPES or parameter.layout != torch.strided:
            raise ValueError(
                f"{name}: got a parameter of dtype {parameter.dtype} and layout {parameter.layout}, "
                "expected a dense one in float32, bfloat16 or float64"
            )
