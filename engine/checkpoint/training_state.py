"""The state that a training run resumes from, bit for bit.

The file's metadata have the JSON of the caller's values and the optimizer's options under "training", a digest of each
tensor (safetensors_io.py), and under "digest" the SHA-256 of all of it: of the JSON, and of the names, dtypes, shapes
and digests of the tensors. Files of version 0.1.0 have no "digest".
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peakgpt.engine.checkpoint.folder import TRAINING_STATE, replace_files
from peakgpt.engine.checkpoint.safetensors_io import DIGEST, read_safetensors, tensor_digests, write_safetensors
from peakgpt.engine.checkpoint.tensor_check import check_tensors

TEXT, SEAL = "training", "digest"  # keys of the metadata


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
        ValueError: `values` or an option of the optimizer is not JSON, such as NaN.
    """
    packed = optimizer.state_dict()
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors |= {f"optimizer.{i}.{k}": t for i, entry in packed["state"].items() for k, t in entry.items()}
    tensors |= {f"random.{i}": state for i, state in enumerate(_random_states())}
    text = json.dumps({"values": dict(values), "param_groups": packed["param_groups"]}, allow_nan=False)
    digests = tensor_digests(tensors)
    metadata = {TEXT: text, SEAL: _seal(text, tensors, digests)}
    replace_files(Path(folder), lambda stage: write_safetensors(stage / TRAINING_STATE, tensors, metadata, digests))


def load_training_state(folder: Path | str, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Load a saved state into a model, its optimizer and torch's random generators.

    Returns:
        The `values` given to `save_training_state`.
    Raises:
        ValueError: the file is missing or damaged, or belongs to another model or optimizer.
    """
    path = Path(folder, TRAINING_STATE)
    tensors, metadata = read_safetensors(path)
    if TEXT not in metadata:
        raise ValueError(f"{path}: got no training state in it, expected one written by save_training_state")
    digests = {name: metadata.get(f"{DIGEST}.{name}", "") for name in tensors}
    known = {TEXT, *(f"{DIGEST}.{name}" for name in tensors)}
    whole = SEAL not in metadata or metadata[SEAL] == _seal(metadata[TEXT], tensors, digests)
    if metadata.keys() - {SEAL} != known or not whole:
        raise ValueError(f"{path}: got another digest than it was written with: the file is damaged")
    weights = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
    check_tensors(path, weights, {name: tensor.shape for name, tensor in model.state_dict().items()})
    try:
        saved = json.loads(metadata[TEXT])
        states: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            kind, *rest = name.split(".")
            if kind == "optimizer":
                parameter, key = rest
                states.setdefault(int(parameter), {})[key] = tensor
        # JSON has no tuples.
        groups = [{**group, "betas": tuple(group["betas"])} for group in saved["param_groups"]]
        count = sum(name.startswith("random.") for name in tensors)
        random = [tensors[f"random.{i}"] for i in range(count)]
        values = dict(saved["values"])
        model.load_state_dict(weights)
        optimizer.load_state_dict({"state": states, "param_groups": groups})
        _set_random_states(random)
    except Exception as error:  # a file without a digest over everything may be damaged in any way
        raise ValueError(f"{path}: {error!r}, expected a state of this model and optimizer") from None
    return values


def _seal(text: str, tensors: Mapping[str, Tensor], digests: Mapping[str, str]) -> str:
    """Return the SHA-256 (hex) of the JSON and of each tensor's name, dtype, shape and digest."""
    rows = sorted((name, str(t.dtype), list(t.shape), digests[name]) for name, t in tensors.items())
    return hashlib.sha256(json.dumps([text, rows]).encode()).hexdigest()


def _random_states() -> list[Tensor]:
    """Return the state of the CPU's generator, then of each CUDA device's."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else ())]


def _set_random_states(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if torch.cuda.is_available() and len(states) == torch.cuda.device_count() + 1:
        torch.cuda.set_rng_state_all(states[1:])
