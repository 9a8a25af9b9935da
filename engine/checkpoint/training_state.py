"""The state that a training run resumes from, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peakgpt.engine.checkpoint.folder import TRAINING_STATE, replace_files
from peakgpt.engine.checkpoint.safetensors_io import read_safetensors, write_safetensors
from peakgpt.engine.checkpoint.tensor_check import check_tensors


def save_training_state(
    folder: Path | str, model: nn.Module, optimizer: torch.optim.Optimizer, values: Mapping[str, Any]
) -> None:
    """Write training_state.safetensors: weights, optimizer state, random state and the caller's values.

    Args:
        folder: created if missing.
        model: its state dict is written in the dtype that it is trained in.
        optimizer: its state and the options of its groups.
        values: other state of the run as JSON, such as the number of steps and the position in the data.
    Raises:
        OSError: the folder cannot be written; the old state is still there.
    """
    packed = optimizer.state_dict()
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors |= {f"optimizer.{i}.{k}": t for i, entry in packed["state"].items() for k, t in entry.items()}
    tensors |= {f"random.{i}": state for i, state in enumerate(_random_states())}
    text = json.dumps({"values": dict(values), "param_groups": packed["param_groups"]})
    replace_files(Path(folder), lambda stage: write_safetensors(stage / TRAINING_STATE, tensors, {"training": text}))


def load_training_state(folder: Path | str, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Load a saved state into a model, its optimizer and torch's random generators.

    Returns:
        The `values` given to `save_training_state`.
    Raises:
        ValueError: the file is missing or damaged, or belongs to another model or optimizer.
    """
    path = Path(folder, TRAINING_STATE)
    tensors, metadata = read_safetensors(path)
    if "training" not in metadata:
        raise ValueError(f"{path}: got no training state in it, expected one written by save_training_state")
    saved = json.loads(metadata["training"])
    weights = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
    check_tensors(path, weights, {name: tensor.shape for name, tensor in model.state_dict().items()})
    states: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        kind, *rest = name.split(".")
        if kind == "optimizer":
            parameter, key = rest
            states.setdefault(int(parameter), {})[key] = tensor
    # JSON has no tuples.
    groups = [{**group, "betas": tuple(group["betas"])} for group in saved["param_groups"]]
    model.load_state_dict(weights)
    optimizer.load_state_dict({"state": states, "param_groups": groups})
    count = sum(name.startswith("random.") for name in tensors)
    _set_random_states([tensors[f"random.{i}"] for i in range(count)])
    return saved["values"]


def _random_states() -> list[Tensor]:
    """Return the state of the CPU's generator, then of each CUDA device's."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else ())]


def _set_random_states(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if torch.cuda.is_available() and len(states) == torch.cuda.device_count() + 1:
        torch.cuda.set_rng_state_all(states[1:])
