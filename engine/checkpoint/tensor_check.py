"""Comparing the tensors of a file with those that a model expects."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from peakgpt.engine.checkpoint.folder import CONFIG

NO_SHARDS: Mapping[str, Path] = MappingProxyType({})


def check_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, torch.Size],
    shards: Mapping[str, Path] = NO_SHARDS,
) -> None:
    """Check names, shapes and dtypes.

    Args:
        path: the file that errors name.
        tensors: by name.
        expected: shapes by name.
        shards: shard of each tensor, by tensor name; errors name it instead of `path`.
    Raises:
        ValueError: a tensor is missing, unexpected, of another shape, or not floating point.
    """
    for name, shape in expected.items():
        file = shards.get(name, path)
        if name not in tensors:
            raise ValueError(f"{file}: got no tensor {name}, expected one of shape {tuple(shape)} as {CONFIG} says")
        if tensors[name].shape != shape or not tensors[name].is_floating_point():
            raise ValueError(
                f"{file}: {name} is {tensors[name].dtype} of shape {tuple(tensors[name].shape)}, "
                f"expected floating point of shape {tuple(shape)} as {CONFIG} says (both as [out, in])"
            )
    if extra := sorted(set(tensors) - set(expected)):
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise ValueError(
            f"{shards.get(extra[0], path)}: got tensor {extra[0]}{more}, expected only the {len(expected)} of {CONFIG}"
        )
