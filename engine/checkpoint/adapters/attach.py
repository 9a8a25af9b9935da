"""Adapters of a model: add a new one, load one from a folder, save it, activate it, delete it, merge it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peakgpt.engine.checkpoint.adapters.config_file import adapter_json, read_adapter_config
from peakgpt.engine.checkpoint.adapters.folder import read_adapter_weights, to_peft
from peakgpt.engine.checkpoint.adapters.targets import Target, file_names, find_targets
from peakgpt.engine.checkpoint.families.catalogue import family_of
from peakgpt.engine.checkpoint.families.family import Family
from peakgpt.engine.checkpoint.folder import CONFIG
from peakgpt.engine.model.lora import LoraConfig, LoraWeights, freeze_base, lora_layers, replace_layers, with_adapters
from peakgpt.engine.model.quantized_linear import QuantizedLinear
from peakgpt.engine.model.transformer import Transformer


def family(model: Transformer) -> Family:
    """Return the family whose names a model's adapters have."""
    return family_of(model.config, model.source_files.get(CONFIG))


def add_adapter(model: Transformer, config: LoraConfig, name: str) -> None:
    """Add an adapter to a model and activate it. All weights of the model but those of adapters are frozen.

    Raises:
        ValueError: the model has an adapter of this name, or target_modules does not fit it.
    """
    targets = find_targets(model, family(model), config, every_name=True)
    for weights in _attach(model, targets, config, name).values():
        weights.reset_parameters()


def load_adapter(model: Transformer, folder: Path, name: str, *, is_trainable: bool) -> None:
    """Load an adapter from a folder in PEFT's format and activate it.

    Raises:
        ValueError: the model has an adapter of this name, a missing or damaged file, an adapter that is not supported
            or of another model.
    """
    config = read_adapter_config(folder)
    targets = find_targets(model, family(model), config, every_name=False)
    pairs = read_adapter_weights(folder, family(model), model.config, targets, config)
    attached = _attach(model, targets, config, name)
    with torch.no_grad():
        for layer, weights in attached.items():
            weights.lora_A.copy_(pairs[layer][0])
            weights.lora_B.copy_(pairs[layer][1])
            weights.requires_grad_(is_trainable)


def _attach(
    model: Transformer, targets: list[Target], config: LoraConfig, name: str
) -> dict[str, LoraWeights]:
    """Give the layers an adapter whose weights have no values yet; return it by layer."""
    if name in model.adapters:
        raise ValueError(f"adapter: the model has one named {name!r} already, expected another name")
    if not name or "." in name:
        raise ValueError(f"adapter: name is {name!r:.60}, expected text without a dot")
    attached: dict[str, LoraWeights] = {}
    dtype = _float_dtype(model)
    for target in targets:
        layer = with_adapters(model, target.name)
        shared = attached[target.first].lora_A if target.first in attached else None
        device = layer.base_layer.weight.device
        with torch.device(device):
            weights = LoraWeights(target.inputs, layer.out_features, target.chosen_rows, config, lora_A=shared)
        layer.adapters[name] = attached[target.name] = weights.to(dtype).train(layer.training)
    model.adapters[name] = config
    freeze_base(model)
    set_adapter(model, name)
    return attached


def _float_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype of the first floating parameter: a quantized model has others too."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def set_adapter(model: Transformer, name: str | None) -> None:
    """Activate an adapter; None: no adapter.

    Raises:
        ValueError: the model has no adapter of this name.
    """
    _expect(model, name)
    for _, layer in lora_layers(model):
        layer.active = name
    model.active_adapter = name


def delete_adapter(model: Transformer, name: str) -> None:
    """Remove an adapter. A layer without any other is again the layer that it was.

    Raises:
        ValueError: the model has no adapter of this name.
    """
    _expect(model, name)
    if model.active_adapter == name:
        set_adapter(model, None)
    del model.adapters[name]
    for layer_name, layer in list(lora_layers(model)):
        if name in layer.adapters:
            del layer.adapters[name]
        if not layer.adapters:
            model.set_submodule(layer_name, layer.base_layer)


def merge(model: Transformer) -> None:
    """Add the active adapter to the weights and remove all adapters.

    Raises:
        ValueError: a layer of the adapter is quantized.
    """
    replace_layers(model, merge=True)
    model.adapters, model.active_adapter = {}, None


def merge_floats(model: Transformer) -> None:
    """Merge the active adapter if none of its layers is quantized; else it stays beside them."""
    layers = [layer for _, layer in lora_layers(model) if layer.active in layer.adapters]
    if not any(isinstance(layer.base_layer, QuantizedLinear) for layer in layers):
        merge(model)


class SavedAdapter:
    """How an adapter of a model is written: what it needs besides its weights is read from the model once."""

    def __init__(self, model: Transformer, name: str | None):
        """
        Args:
            model: with the adapter.
            name: of the adapter; None: the active one.
        Raises:
            ValueError: the model has no such adapter.
        """
        name = model.active_adapter if name is None else name
        if name is None:
            raise ValueError("adapter: the model has no active one, expected its name")
        _expect(model, name)
        self.name, self.model, self.family = name, model.config, family(model)
        self.config = config = model.adapters[name]
        self.targets = find_targets(model, self.family, config, every_name=False)
        targets = file_names(model, self.family, config)
        self.content: dict[str, Any] = adapter_json(
            config, targets, model.name_or_path or None, model.revision, is_conv1d=self.family.conv1d
        )

    def parameter_names(self) -> dict[str, tuple[str, str]]:
        """Return the names of A and B in the model's state dict, by layer."""
        inside = ((target.name, f"{target.name}.adapters.{self.name}") for target in self.targets)
        return {layer: (f"{weights}.lora_A", f"{weights}.lora_B") for layer, weights in inside}

    def tensors(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of the file from the model's state dict, or from its tensors of this adapter alone."""
        pairs = {layer: (state[a], state[b]) for layer, (a, b) in self.parameter_names().items()}
        return to_peft(self.family, self.model, self.targets, pairs)

    def read(self, folder: Path) -> dict[str, Tensor]:
        """Return the tensors of a state dict from a folder that has this adapter.

        Raises:
            ValueError: the folder has another adapter, or a damaged one.
        """
        pairs = read_adapter_weights(folder, self.family, self.model, self.targets, self.config)
        names = self.parameter_names()
        return {name: tensor for layer, pair in pairs.items() for name, tensor in zip(names[layer], pair, strict=True)}


def _expect(model: Transformer, name: str | None) -> None:
    if name is not None and name not in model.adapters:
        known = ", ".join(map(repr, model.adapters)) or "none"
        raise ValueError(f"adapter: got {name!r:.60}, expected one of the model's: {known}")
