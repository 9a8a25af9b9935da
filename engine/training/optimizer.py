"""AdamW on flat buffers: one op updates all parameters of a group at once; see flat_buffer.py.

A bfloat16 parameter is the high half of its float32 master (kernels/ops/adamw.py), so a value that is written to the
parameter changes the master too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peakgpt.engine.training.flat_buffer import MOMENTS, FlatBuffer
from peakgpt.kernels.ops.adamw import DTYPES, adamw, join
from peakgpt.kernels.ops.sum_of_squares import sum_of_squares

UNSUPPORTED = ("amsgrad", "maximize", "differentiable")
COPIED = ("max_norm", "grad_norm", "lr_scale", "_dtype")  # attributes that torch's __getstate__ leaves out


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
            ValueError: an option that is not supported or out of range, or a parameter that is sparse, not floating
                point, or float16: float16 needs loss scaling, and torch's scaler takes float32 parameters under
                autocast.
        """
        if dtype not in (None, *DTYPES):
            raise ValueError(f"AdamW: dtype is {dtype}, expected torch.float32 or torch.bfloat16")
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"AdamW: max_norm is {max_norm}, expected more than 0, or None")
        self.max_norm, self.grad_norm, self.lr_scale, self._dtype = max_norm, None, None, dtype
        self._buffers: list[tuple[dict[str, Any], FlatBuffer]] = []
        super().__init__(params, {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad,
            "maximize": maximize, "foreach": foreach, "capturable": capturable, "differentiable": differentiable,
            "fused": fused,
        })  # fmt: skip

    def __getstate__(self) -> dict[str, Any]:
        """Return everything but the flat buffers: copy.deepcopy and pickle do not keep views of one buffer together."""
        for _, buffer in self._buffers:
            buffer.gather_parameters()
        return {**super().__getstate__(), **{name: getattr(self, name) for name in COPIED}}

    @torch.no_grad()
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        entries, self._buffers = dict(self.state), []
        for group in self.param_groups:
            self._flatten(group)
        for _, buffer in self._buffers:
            buffer.load([entries[parameter] for parameter in buffer.parameters])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; missing options get the optimizer's values."""
        _add_param_group(self, param_group)
        group = self.param_groups[-1]
        try:
            _check(group)
        except ValueError:
            self.param_groups.pop()
            raise
        self._flatten(group)

    def _flatten(self, group: dict[str, Any]) -> None:
        by_kind: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
        for parameter in group["params"]:
            by_kind.setdefault((parameter.dtype, parameter.device), []).append(parameter)
        for parameters in by_kind.values():
            buffer = FlatBuffer(parameters, self._dtype)
            self._buffers.append((group, buffer))
            self.state.update(zip(parameters, buffer.states, strict=True))

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Update all parameters that have a gradient; return the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        calls = []
        for group, buffer in self._buffers:
            buffer.gather_parameters()
            buffer.gather_gradients()
            calls += [(group, buffer, *run) for run in buffer.runs()]
        if not calls:
            return loss
        self.grad_norm = None if self.max_norm is None else _norm([buffer.grad[span] for _, buffer, span, _ in calls])
        for group, buffer, span, step in calls:
            adamw(
                buffer.param[span], buffer.grad[span], None if buffer.remainder is None else buffer.remainder[span],
                buffer.exp_avg[span], buffer.exp_avg_sq[span], step,
                *(t if t is None else t.to(step.device, step.dtype) for t in (self.grad_norm, self.lr_scale)),
                lr=float(group["lr"]), beta1=group["betas"][0], beta2=group["betas"][1], eps=group["eps"],
                weight_decay=group["weight_decay"], max_norm=self.max_norm,
            )  # fmt: skip
            torch.autograd.graph.increment_version(buffer.parameters)  # tells autograd that the parameters changed
        return loss

    @torch.no_grad()
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zero the gradients in place.

        A parameter whose gradient is None keeps None: zeros count as a gradient once a gradient clipper scales them.

        Args:
            set_to_none: as in torch, the next step skips a parameter that gets no gradient before it. Its gradient
                reads as zeros until then.
        """
        for _, buffer in self._buffers:
            buffer.zero_grad(set_to_none)

    def gradients(self) -> dict[Tensor, Tensor]:
        """Return the parameters' gradients that are views of the flat buffers, for `accumulate_into`."""
        return {p: grad for _, buffer in self._buffers for p, grad in buffer.gradients()}

    def master(self, parameter: Tensor) -> Tensor:
        """Return a parameter's float32 master; the parameter itself if it has none.

        Raises:
            ValueError: the tensor is not a parameter of this optimizer.
        """
        if parameter not in self.state:
            raise ValueError(f"AdamW: got a tensor of shape {tuple(parameter.shape)}, expected one of its parameters")
        remainder = self.state[parameter].get("remainder")
        return parameter.detach() if remainder is None else join(parameter.detach(), remainder)

    def master_weights(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the model's state dict with float32 masters instead of bfloat16 parameters, for a checkpoint."""
        state = dict(model.state_dict())
        for name, parameter in model.named_parameters():
            if parameter in self.state:
                state[name] = self.master(parameter)
        return state

    def state_dict(self) -> dict[str, Any]:
        """Return the state in torch.optim.AdamW's format; a bfloat16 parameter has a `remainder` in addition."""
        packed = super().state_dict()
        # A copy per parameter: torch.optim.AdamW would increment a shared counter once for each parameter.
        packed["state"] = {i: {**state, "step": state["step"].clone()} for i, state in packed["state"].items()}
        return packed

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state of this class or of torch.optim.AdamW.

        Raises:
            ValueError: groups, shapes or entries do not fit, or the state uses an option that is not supported.
        """
        groups, states = state_dict["param_groups"], state_dict["state"]
        got, expected = ([len(g["params"]) for g in gs] for gs in (groups, self.param_groups))
        if got != expected:
            raise ValueError(f"AdamW: the state has groups of {got} parameters, expected {expected}")
        entries: dict[Tensor, Mapping[str, Any]] = {}
        for group, saved in zip(self.param_groups, groups, strict=True):
            _check({**group, **saved, "params": group["params"]})
            for i, parameter in zip(saved["params"], group["params"], strict=True):
                entries[parameter] = _checked_state(i, states.get(i), parameter)
        for group, saved in zip(self.param_groups, groups, strict=True):
            group.update({k: v for k, v in saved.items() if k not in ("params", "param_names")})
        for _, buffer in self._buffers:
            buffer.load([entries[parameter] for parameter in buffer.parameters])


# __wrapped__: without torch's guard against torch.compile, which imports torch._dynamo and costs 150 MiB.
_add_param_group = getattr(torch.optim.Optimizer.add_param_group, "__wrapped__", torch.optim.Optimizer.add_param_group)


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return two parameter groups: matrices and embeddings decay, vectors (biases, norms) do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _norm(gradients: list[Tensor]) -> Tensor:
    """Return the global norm of all gradients, () in float32 or wider, without a device sync."""
    first = gradients[0]
    totals: dict[torch.device, Tensor] = {}
    for gradient in gradients:
        wide = torch.promote_types(gradient.dtype, torch.float32)
        total = totals.setdefault(gradient.device, torch.zeros((), dtype=wide, device=gradient.device))
        sum_of_squares(gradient, total)
    return torch.stack([total.to(first.device) for total in totals.values()]).sum().sqrt()


def _check(group: Mapping[str, Any]) -> None:
    """Raise ValueError unless the options are in range and a flat buffer can contain the parameters."""
    for name in UNSUPPORTED:
        if group.get(name):
            raise ValueError(f"AdamW: {name} is {group[name]}, expected False: it is not supported")
    if not group.get("decoupled_weight_decay", True):
        raise ValueError("AdamW: decoupled_weight_decay is False, expected True: this is AdamW, not Adam")
    for name in ("lr", "eps", "weight_decay"):
        if not group[name] >= 0:
            raise ValueError(f"AdamW: {name} is {group[name]}, expected at least 0")
    if len(group["betas"]) != 2 or not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"AdamW: betas are {group['betas']}, expected two values in 0 <= beta < 1")
    for parameter in group["params"]:
        if parameter.dtype not in DTYPES or parameter.layout != torch.strided:
            raise ValueError(
                f"AdamW: got a parameter of dtype {parameter.dtype} and layout {parameter.layout}, "
                "expected a dense one in float32, bfloat16 or float64"
            )


def _checked_state(i: int, entry: Mapping[str, Any] | None, parameter: Tensor) -> Mapping[str, Any]:
    """Return entry i of a state dict, empty if the parameter never had a gradient.

    Raises:
        ValueError: the entry is not AdamW's, or does not fit the parameter.
    """
    if not entry:
        return {}
    missing = [name for name in ("step", *MOMENTS) if name not in entry]
    if missing:
        raise ValueError(f"AdamW: state {i} has {', '.join(entry)}, expected step, exp_avg and exp_avg_sq")
    for name in (*MOMENTS, *(name for name in ("remainder", "master") if name in entry)):
        if entry[name].shape != parameter.shape:
            raise ValueError(
                f"AdamW: {name} of state {i} has shape {tuple(entry[name].shape)}, expected {tuple(parameter.shape)}"
            )
    if "remainder" in entry and entry["remainder"].dtype != torch.int16:
        raise ValueError(f"AdamW: remainder of state {i} has dtype {entry['remainder'].dtype}, expected torch.int16")
    return entry
