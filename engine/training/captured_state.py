"""What a captured training step depends on besides values in device memory.

A replay runs no Python. So a step that would call code of others must not be replayed, and a step whose modules,
parameters or settings have changed must be captured again.
"""

from __future__ import annotations

import operator
import threading
from typing import Any

import torch
from torch import nn
from torch.optim import optimizer as torch_optimizer

from peakgpt.engine.model.plain import FORWARDS, change_of, has_own_call, walk
from peakgpt.engine.training.gradient_memory import has_hooks

# torch adds to these and never replaces them.
_pre_hooks, _post_hooks = torch_optimizer._global_optimizer_pre_hooks, torch_optimizer._global_optimizer_post_hooks


class Identities(list):
    """Objects that are equal to others if they are the same ones. It keeps them alive, so no id is used twice."""

    def __eq__(self, others: object) -> bool:
        return isinstance(others, Identities) and len(self) == len(others) and all(map(operator.is_, self, others))

    __hash__ = None


def runs_other_code(model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> bool:
    """Return whether a replay would leave out code of others: hooks, a dispatch mode, or on a CPU a module of others.

    A user captures a CUDA graph knowing its limits; a CPU has none, so a model there may read or change any value on
    the host. Only peakgpt's own modules are known not to.
    """
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks or _pre_hooks or _post_hooks:
        return True
    if torch._C._len_torch_dispatch_stack() or any(has_hooks(p) for g in optimizer.param_groups for p in g["params"]):
        return True
    return change_of(model) is not None if device.type == "cpu" else any(map(has_own_call, walk(model)))


def settings_of(device: torch.device) -> tuple[Any, ...]:
    """Return the settings of torch that change what a step computes, and the thread, whose workspaces it uses."""
    autocast = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
    modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled()
    dtype, is_deterministic = torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()
    return autocast, modes, dtype, is_deterministic, torch.get_num_threads(), threading.get_ident()


def model_state(model: nn.Module) -> tuple[Any, ...]:
    """Return the modules of a model, with all that their forward reads besides values of tensors."""
    modules = walk(model)
    tensors, attributes = Identities(), Identities()
    for module in modules:  # list.extend, because this runs before each step
        tensors.extend(module._parameters.values())
        tensors.extend(module._buffers.values())
        if type(module) in FORWARDS:
            attributes.extend(module.__dict__.values())
    addresses = [(tensor.data_ptr(), tensor.requires_grad) for tensor in tensors if tensor is not None]
    training = [module.training for module in modules]  # of modules of others, too, in a CUDA graph
    return training, addresses, Identities(modules), tensors, attributes
