"""The state of a training run beside its weights: nested dicts, lists and tuples of tensors, numbers and strings.

The tensors become those of a safetensors file, each named by its path, such as trainer.optimizer.state.0.exp_avg. The
structure becomes JSON in the file's metadata, in which a container is {kind: items}:

    {"step": 3, "betas": (0.9, t)}  ->  {"dict": [["step", 3], ["betas", {"tuple": [0.9, {"tensor": "betas.1"}]}]]}

Reading gives back the same types and the same bits, so keys may be integers, and numbers may be infinite.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from peakgpt.engine.checkpoint.safetensors_io import read_safetensors, write_safetensors

STRUCTURE = "training"  # key of the metadata


def split_tensors(state: Any) -> tuple[dict[str, Tensor], Any]:
    """Split a nested state into its tensors, by path, and its structure as JSON.

    Raises:
        ValueError: the state has a value of another type, or two tensors with the same path.
    """
    tensors: dict[str, Tensor] = {}

    def encode(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            if path in tensors:
                raise ValueError(f"training state: got two tensors {path}, expected different keys")
            tensors[path] = value
            return {"tensor": path}
        if isinstance(value, Mapping):
            return {"dict": [[key, encode(item, f"{path}.{key}".lstrip("."))] for key, item in value.items()]}
        if isinstance(value, (list, tuple)):
            kind = "tuple" if isinstance(value, tuple) else "list"
            return {kind: [encode(item, f"{path}.{i}") for i, item in enumerate(value)]}
        if isinstance(value, float) and not math.isfinite(value):
            return {"float": str(value)}
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise ValueError(f"training state: {path} is a {type(value).__name__}, expected a tensor, number or string")

    return tensors, encode(state, "")


def join_tensors(tensors: Mapping[str, Tensor], structure: Any) -> Any:
    """Return the state that `split_tensors` has split."""
    if not isinstance(structure, dict):
        return structure
    ((kind, content),) = structure.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "float":
        return float(content)
    if kind == "dict":
        return {key: join_tensors(tensors, item) for key, item in content}
    return {"list": list, "tuple": tuple}[kind](join_tensors(tensors, item) for item in content)


def write_training_state(path: Path, tensors: Mapping[str, Tensor], structure: Any) -> None:
    """Write a state that `split_tensors` has split.

    Raises:
        OSError: the file cannot be written.
    """
    write_safetensors(path, tensors, {STRUCTURE: json.dumps(structure)})


def read_training_state(path: Path) -> Any:
    """Read what `write_training_state` wrote.

    Raises:
        ValueError: the file is missing or damaged.
    """
    tensors, metadata = read_safetensors(path)
    try:
        return join_tensors(tensors, json.loads(metadata[STRUCTURE]))
    except (KeyError, ValueError, TypeError, RecursionError):
        raise ValueError(f"{path}: got no training state in it, expected one of a checkpoint") from None
