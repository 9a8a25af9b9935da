"""AdamW on flat buffers: parameters, gradients and moments of a group lie end to end, and one op updates them all.

Parameters become views of one buffer a dtype and device, their gradients views of another. What torch lets people do
between two steps is met at the next one: gradients that were set to None or replaced, parameters that were written to
or replaced. A bfloat16 parameter is half of its float32 master (kernels/ops/adamw.py), so what is written to it counts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peakgpt.kernels.ops.adamw import DTYPES, adamw, join, split
from peakgpt.kernels.ops.sum_of_squares import sum_of_squares

ALIGN = 64  # elements: each parameter starts on a cache line, and on the 16 bytes that vector loads and TMA ask for
PIECE = 1 << 18  # elements
UNSUPPORTED = ("amsgrad", "maximize", "differentiable")
CARRIED = ("max_norm", "grad_norm", "rate", "_dtype")  # with copies of an optimizer, beside what torch takes
MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamW(torch.optim.Optimizer):
    """torch.optim.AdamW in one pass over memory, with float32 masters and clipping to a global norm inside.

    `rate`, where set to a float32 tensor (), multiplies every group's lr and is read on the device: a schedule that a
    captured step follows. After a step, `grad_norm` is the norm of all gradients before clipping, a tensor on the
    device (None without max_norm). A step whose norm is not finite changes nothing, decided on the device.
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
            params: parameters, or groups of them, float32 or bfloat16, each on one device.
            lr, betas, eps, weight_decay: as in torch.optim.AdamW, also by group.
            foreach, capturable, fused: taken as torch takes them; there is one implementation, and it is all three.
            amsgrad, maximize, differentiable: not supported.
            max_norm: gradients are scaled down to this global norm over all groups.
            dtype: the parameters are turned into this dtype, and what they were is the float32 master.
        Raises:
            ValueError: an option that is not supported or out of range, or a parameter that is not dense and floating,
                or float16: it needs loss scaling, and torch's scaler takes float32 parameters under autocast.
        """
        if dtype not in (None, *DTYPES):
            raise ValueError(f"AdamW: dtype is {dtype}, expected torch.float32 or torch.bfloat16")
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"AdamW: max_norm is {max_norm}, expected more than 0, or None")
        self.max_norm, self.grad_norm, self.rate, self._dtype = max_norm, None, None, dtype
        self._flats: list[tuple[dict[str, Any], _Flat]] = []
        super().__init__(params, {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad,
            "maximize": maximize, "foreach": foreach, "capturable": capturable, "differentiable": differentiable,
            "fused": fused,
        })  # fmt: skip

    def __getstate__(self) -> dict[str, Any]:
        """For copy.deepcopy and pickle: all but the flat buffers, since neither keeps views of one buffer together."""
        for _, flat in self._flats:
            flat.gather_parameters()
        return {**super().__getstate__(), **{name: getattr(self, name) for name in CARRIED}}

    @torch.no_grad()
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        entries, self._flats = dict(self.state), []
        for group in self.param_groups:
            self._flatten(group)
        for _, flat in self._flats:
            flat.load([entries[parameter] for parameter in flat.parameters])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with its own options where given."""
        _add_param_group(self, param_group)
        group = self.param_groups[-1]
        try:
            _check(group)
        except ValueError:
            self.param_groups.pop()
            raise
        self._flatten(group)

    def _flatten(self, group: dict[str, Any]) -> None:
        kinds: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
        for parameter in group["params"]:
            kinds.setdefault((parameter.dtype, parameter.device), []).append(parameter)
        for parameters in kinds.values():
            flat = _Flat(parameters, self._dtype)
            self._flats.append((group, flat))
            self.state.update(zip(parameters, flat.states, strict=True))

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Update all parameters that have a gradient; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        calls = []
        for group, flat in self._flats:
            flat.gather_parameters()
            flat.gather_gradients()
            calls += [(group, flat, *run) for run in flat.runs()]
        if not calls:
            return loss
        self.grad_norm = None if self.max_norm is None else _norm([flat.grad[span] for _, flat, span, _ in calls])
        for group, flat, span, step in calls:
            adamw(
                flat.param[span], flat.grad[span], None if flat.remainder is None else flat.remainder[span],
                flat.exp_avg[span], flat.exp_avg_sq[span], step,
                *(t if t is None else t.to(step.device, step.dtype) for t in (self.grad_norm, self.rate)),
                lr=float(group["lr"]), beta1=group["betas"][0], beta2=group["betas"][1], eps=group["eps"],
                weight_decay=group["weight_decay"], max_norm=self.max_norm,
            )  # fmt: skip
            torch.autograd.graph.increment_version(flat.parameters)  # autograd must know that they changed
        return loss

    @torch.no_grad()
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zero the flat gradients, in place either way.

        Args:
            set_to_none: as in torch: a parameter that then gets no gradient is skipped by the next step.
        Where a parameter has no gradient, it has None from here on: a clipper that scaled zeros would make it seem to.
        """
        for _, flat in self._flats:
            flat.zero_grad(set_to_none)

    def gradients(self) -> dict[Tensor, Tensor]:
        """The flat buffer's views that are parameters' gradients now, by parameter: sinks for `accumulate_into`."""
        return {p: home for _, flat in self._flats for p, home in flat.gradients()}

    def master(self, parameter: Tensor) -> Tensor:
        """The parameter as the optimizer keeps it: its float32 master put together, or itself where it has none.

        Raises:
            ValueError: not one of this optimizer's parameters.
        """
        if parameter not in self.state:
            raise ValueError(f"AdamW: got a tensor of shape {tuple(parameter.shape)}, expected one of its parameters")
        remainder = self.state[parameter].get("remainder")
        return parameter.detach() if remainder is None else join(parameter.detach(), remainder)

    def master_weights(self, model: nn.Module) -> dict[str, Tensor]:
        """The model's state dict with masters in place of low-precision parameters; what a checkpoint should hold."""
        state = dict(model.state_dict())
        for name, parameter in model.named_parameters():
            if parameter in self.state:
                state[name] = self.master(parameter)
        return state

    def state_dict(self) -> dict[str, Any]:
        """The state in torch.optim.AdamW's format, which loads it; a bfloat16 parameter has a remainder more."""
        packed = super().state_dict()
        # Our parameters share one counter; torch, loading it, would add to a shared one once for each of them.
        packed["state"] = {i: {**state, "step": state["step"].clone()} for i, state in packed["state"].items()}
        return packed

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state of this class or of torch.optim.AdamW.

        Raises:
            ValueError: groups, shapes or entries do not fit, or the state is of an unsupported kind.
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
        for _, flat in self._flats:
            flat.load([entries[parameter] for parameter in flat.parameters])


class _Flat:
    """The parameters of one group, dtype and device, end to end, with gradients, remainders and moments alike."""

    def __init__(self, parameters: list[nn.Parameter], dtype: torch.dtype | None):
        first = parameters[0]
        dtype = dtype or first.dtype
        wide = torch.promote_types(dtype, torch.float32)
        self.parameters = parameters
        self.spans, end = [], 0
        for parameter in parameters:
            self.spans.append(slice(end, end + parameter.numel()))
            end += -(-parameter.numel() // ALIGN) * ALIGN
        self.param = torch.zeros(end, dtype=dtype, device=first.device)
        self.remainder = None if dtype == wide else torch.zeros_like(self.param, dtype=torch.int16)
        # One counter for all that have always been updated together; `runs` splits it.
        step = torch.zeros((), dtype=wide, device=first.device)
        self.states: list[dict[str, Tensor]] = [{"step": step} for _ in parameters]
        self.homes = self._views(self.param)
        if self.remainder is not None:
            self._keep("remainder", self.remainder)
        for i in range(len(parameters)):
            self._adopt(i)
        # Only now: what the parameters held before is free again.
        self.grad = torch.zeros_like(self.param)
        self.exp_avg = torch.zeros(end, dtype=wide, device=first.device)
        self.exp_avg_sq = torch.zeros_like(self.exp_avg)
        self._keep("exp_avg", self.exp_avg)
        self._keep("exp_avg_sq", self.exp_avg_sq)
        # .data: a view shares its base's version counter, and each gradient needs one of its own.
        self.grad_homes = [view.data for view in self._views(self.grad)]
        self.received = [p.requires_grad for p in parameters]  # whether it had a gradient in the last step
        self.zeroed = [-1] * len(parameters)  # version of a gradient that zero_grad made as good as None, or -1

    def _views(self, buffer: Tensor) -> list[Tensor]:
        return [buffer[span].view(p.shape) for span, p in zip(self.spans, self.parameters, strict=True)]

    def _keep(self, name: str, buffer: Tensor) -> None:
        for state, view in zip(self.states, self._views(buffer), strict=True):
            state[name] = view

    @torch.no_grad()
    def _adopt(self, i: int) -> None:
        """Take over parameter i's present value, and make it a view of the buffer."""
        parameter = self.parameters[i]
        self._write(i, parameter.detach())
        grad, parameter.grad = parameter.grad, None  # a parameter may not change dtype under its gradient
        parameter.data = self.homes[i]
        parameter.grad = None if grad is None else grad.to(parameter.dtype)

    def _write(self, i: int, master: Tensor) -> None:
        """Make this parameter i's master."""
        if self.remainder is None:
            self.homes[i].copy_(master)
            return
        # In pieces: splitting takes several times the piece.
        halves, wholes = (self.homes[i], self.states[i]["remainder"]), master.reshape(-1).split(PIECE)
        for *kept, whole in zip(*(half.view(-1).split(PIECE) for half in halves), wholes, strict=True):
            for half, new in zip(kept, split(whole.float()), strict=True):
                half.copy_(new)

    def gather_parameters(self) -> None:
        """Bring home the parameters that were replaced since the last step."""
        for i, (parameter, home) in enumerate(zip(self.parameters, self.homes, strict=True)):
            if parameter.dtype != home.dtype or parameter.device != home.device:
                raise ValueError(
                    f"AdamW: a parameter is now {parameter.dtype} on {parameter.device}, expected {home.dtype} on "
                    f"{home.device} as when the optimizer was built"
                )
            if parameter.data_ptr() != home.data_ptr():
                self._adopt(i)

    def gather_gradients(self) -> None:
        """Bring home the gradients that were replaced since the last step."""
        for i, (parameter, grad_home) in enumerate(zip(self.parameters, self.grad_homes, strict=True)):
            grad = parameter.grad
            if grad is None or _same_place(grad, grad_home):
                continue
            if grad.layout != torch.strided:
                raise ValueError(f"AdamW: got a gradient of layout {grad.layout}, expected a dense one")
            parameter.grad = grad_home.copy_(grad)
            self.zeroed[i] = -1

    def gradients(self) -> Iterator[tuple[Tensor, Tensor]]:
        for parameter, home in zip(self.parameters, self.grad_homes, strict=True):
            if parameter.requires_grad and parameter.grad is not None and _same_place(parameter.grad, home):
                yield parameter, parameter.grad

    def _live(self, i: int) -> bool:
        """Whether parameter i has a gradient: not None, and written to since zero_grad(set_to_none=True)."""
        grad = self.parameters[i].grad
        return grad is not None and grad._version != self.zeroed[i]

    def runs(self) -> list[tuple[slice, Tensor]]:
        """Stretches of parameters that have a gradient and count steps alike, each with its counter.

        A counter that a second stretch also uses, or one without gradients, is split: each is to move alone.
        """
        found, used = [], set()
        self.received = [self._live(i) for i in range(len(self.parameters))]
        for (live, _), members in itertools.groupby(
            range(len(self.parameters)), lambda i: (self.received[i], id(self.states[i]["step"]))
        ):
            first, *rest = members
            step = self.states[first]["step"]
            if id(step) in used:
                step = step.clone()
                for i in (first, *rest):
                    self.states[i]["step"] = step
            used.add(id(step))
            if live:
                last = rest[-1] if rest else first
                found.append((slice(self.spans[first].start, self.spans[last].stop), step))
        return found

    def zero_grad(self, set_to_none: bool) -> None:
        """Zero the buffer, and make its views the gradients again of the parameters that may get one."""
        live = [self._live(i) for i in range(len(self.parameters))]
        self.grad.zero_()
        for i, (parameter, home) in enumerate(zip(self.parameters, self.grad_homes, strict=True)):
            if not (live[i] or self.received[i]):
                parameter.grad = None
                continue
            if parameter.grad is None or not _same_place(parameter.grad, home):
                parameter.grad = home
            self.zeroed[i] = -1 if live[i] and not set_to_none else parameter.grad._version

    def load(self, entries: list[Mapping[str, Any]]) -> None:
        """Take over one state a parameter; an empty one starts from zero."""
        self.gather_parameters()
        counters: dict[float, Tensor] = {}
        for i, (state, entry) in enumerate(zip(self.states, entries, strict=True)):
            count = float(entry.get("step", 0))
            state["step"] = counters.setdefault(count, torch.full_like(state["step"], count))
            for name in MOMENTS:
                state[name].copy_(entry[name]) if entry else state[name].zero_()
            if "remainder" in state and "remainder" in entry:
                state["remainder"].copy_(entry["remainder"])
            elif "remainder" in state and "master" in entry:  # saved before masters were split
                self._write(i, entry["master"])


# Without torch's guard against being compiled, which imports torch._dynamo: 150 MiB for good.
_add_param_group = getattr(torch.optim.Optimizer.add_param_group, "__wrapped__", torch.optim.Optimizer.add_param_group)


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two parameter groups: matrices and embeddings, which decay, and vectors (biases, norms), which do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _same_place(tensor: Tensor, home: Tensor) -> bool:
    return tensor.layout == torch.strided and tensor.data_ptr() == home.data_ptr() and tensor.stride() == home.stride()


def _norm(gradients: list[Tensor]) -> Tensor:
    """Global norm, in float32 or wider, without a device sync."""
    first = gradients[0]
    totals: dict[torch.device, Tensor] = {}
    for gradient in gradients:
        wide = torch.promote_types(gradient.dtype, torch.float32)
        total = totals.setdefault(gradient.device, torch.zeros((), dtype=wide, device=gradient.device))
        sum_of_squares(gradient, total)
    return torch.stack([total.to(first.device) for total in totals.values()]).sum().sqrt()


def _check(group: Mapping[str, Any]) -> None:
    """Options within their ranges, and parameters that a flat buffer can hold."""
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
    """Entry i of a state dict, if it is AdamW's and fits the parameter; empty where it never had a gradient."""
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
