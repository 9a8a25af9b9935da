"""Adapter folders in PEFT's format: adapter_config.json and adapter_model.safetensors.

The tensors have the names of the family's model in transformers, behind PEFT's prefix, and A (r, in) and B (out, r) of
each of its modules. Ours are (A, B) of each layer: those of its parts, one below the other (engine/model/lora.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peakgpt.engine.checkpoint.adapters.targets import Target
from peakgpt.engine.checkpoint.families.family import Family
from peakgpt.engine.checkpoint.folder import replace_files
from peakgpt.engine.checkpoint.safetensors_io import read_safetensors, write_safetensors
from peakgpt.engine.checkpoint.source_files import TokenizerFiles
from peakgpt.engine.data.adapter_source import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.model.lora import LoraConfig
from peakgpt.kernels.strict_json import dumps

PREFIX = "base_model.model."
Pairs = Mapping[str, tuple[Tensor, Tensor]]  # (A, B) of each layer, by our name


def read_adapter_weights(
    folder: Path, family: Family, model: GPTConfig, targets: Sequence[Target], config: LoraConfig
) -> dict[str, tuple[Tensor, Tensor]]:
    """Read adapter_model.safetensors.

    Args:
        folder: with the file.
        family, model: of the base model.
        targets, config: of the adapter.
    Returns:
        (A, B) of each target, by its name.
    Raises:
        ValueError: a damaged file, or one with other tensors than an adapter of this model has.
    """
    path = folder / ADAPTER_WEIGHTS
    tensors = read_safetensors(path)[0]
    named = family.standard_names({name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()})
    expected = to_peft(family, model, targets, _shapes(targets, config))
    _check(path, named, {name.removeprefix(PREFIX): tensor.shape for name, tensor in expected.items()})
    a, b = ({name.removesuffix(suffix): t.float() for name, t in named.items() if name.endswith(suffix)}
            for suffix in (".lora_A.weight", ".lora_B.weight"))  # fmt: skip
    # Modules of a layer without an adapter have rows of zeros until their layer is made of all of them.
    all_b = {f"{module}.weight": b.get(module) for target in targets for module in target.modules}
    for target in targets:
        for module, (begin, end) in zip(target.modules, target.rows, strict=True):
            if all_b[f"{module}.weight"] is None:
                all_b[f"{module}.weight"] = torch.zeros(end - begin, config.r)
    pairs = {}
    for target in targets:
        whole = family.from_layout(model, f"{target.name}.weight", all_b)
        parts = [whole[begin:end] for begin, end in target.chosen_rows]
        pairs[target.name] = torch.cat([a[module] for module in target.chosen_modules]), torch.cat(parts)
    return pairs


def to_peft(family: Family, model: GPTConfig, targets: Sequence[Target], pairs: Pairs) -> dict[str, Tensor]:
    """Return the tensors of adapter_model.safetensors, by name, from (A, B) of each target, by its name."""
    tensors, whole = {}, {}
    for target in targets:
        a, b = pairs[target.name]
        r = b.shape[1]
        if target.first == target.name:
            tensors |= {f"{PREFIX}{module}.lora_A.weight": part.contiguous()
                        for module, part in zip(target.chosen_modules, a.split(r), strict=True)}  # fmt: skip
        whole[f"{target.name}.weight"] = all_rows = b.new_zeros(target.rows[-1][1], r)
        sizes = [end - begin for begin, end in target.chosen_rows]
        for (begin, end), part in zip(target.chosen_rows, b.split(sizes), strict=True):
            all_rows[begin:end] = part
    joined = family.join(model, whole)
    for module in dict.fromkeys(module for target in targets for module in target.chosen_modules):
        tensors[f"{PREFIX}{module}.lora_B.weight"] = joined[f"{module}.weight"].contiguous()
    return tensors


def _shapes(targets: Sequence[Target], config: LoraConfig) -> Pairs:
    """Return tensors without memory in the shapes of an adapter."""
    with torch.device("meta"):
        return {
            target.name: (
                torch.empty(len(target.chosen) * config.r, target.inputs),
                torch.empty(sum(end - begin for begin, end in target.chosen_rows), config.r),
            )
            for target in targets
        }


def _check(path: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, torch.Size]) -> None:
    for name, shape in expected.items():
        if name not in tensors:
            raise ValueError(f"{path}: got no tensor {PREFIX}{name}, expected one of shape {tuple(shape)}: is this "
                             "the adapter of another model?")  # fmt: skip
        if tensors[name].shape != shape or not tensors[name].is_floating_point():
            raise ValueError(f"{path}: {PREFIX}{name} is {tensors[name].dtype} of shape {tuple(tensors[name].shape)}, "
                             f"expected floating point of shape {tuple(shape)} for this model and the rank of "
                             f"{ADAPTER_CONFIG}")  # fmt: skip
    if extra := sorted(set(tensors) - set(expected)):
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise ValueError(f"{path}: got tensor {PREFIX}{extra[0]}{more}, expected only the {len(expected)} of the "
                         f"target_modules of {ADAPTER_CONFIG} in this model")  # fmt: skip


def write_adapter_files(
    folder: Path, content: Mapping[str, Any], tensors: Mapping[str, Tensor], tokenizer: TokenizerFiles | None
) -> None:
    """Write the files of an adapter into an existing folder.

    Args:
        content: of adapter_config.json.
        tensors: of `to_peft`.
        tokenizer: written too.
    Raises:
        OSError: a file cannot be written.
    """
    (folder / ADAPTER_CONFIG).write_text(dumps(content, indent=2) + "\n", encoding="utf-8")
    if tokenizer is not None:
        tokenizer.save(folder)
    write_safetensors(folder / ADAPTER_WEIGHTS, tensors, {"format": "pt"})


def write_adapter(
    folder: Path, content: Mapping[str, Any], tensors: Mapping[str, Tensor], tokenizer: TokenizerFiles | None = None
) -> None:
    """Write an adapter folder; arguments as `write_adapter_files`. An interrupted write keeps the old files.

    Raises:
        OSError: the folder cannot be written.
    """
    replace_files(folder, lambda stage: write_adapter_files(stage, content, tensors, tokenizer))
