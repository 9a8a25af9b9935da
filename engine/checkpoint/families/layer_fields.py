"""Fields of config.json about single layers or parts of them: layer_types with sliding_window, and biases."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from peakgpt.engine.checkpoint.families.family import FieldGroup
from peakgpt.engine.checkpoint.families.rope_fields import FULL, SLIDING
from peakgpt.engine.model.config import GPTConfig

Types = Callable[[Mapping[str, Any]], list[str]]


def window_fields(window: int | None, types: Types, *more: str) -> FieldGroup:
    """Return the fields of a family whose layers attend to all keys or to those of a sliding window.

    Args:
        window: transformers' sliding_window if config.json has none.
        types: (config.json with defaults) -> "full_attention" or "sliding_attention" of each layer, if config.json has
            no layer_types; a shorter list is repeated.
        more: names of the fields that `types` reads. If use_sliding_window is one of them, the window needs it.
    """
    optional = "use_sliding_window" in more

    def read(content: Mapping[str, Any]) -> dict[str, Any]:
        width = _window(content.get("sliding_window", window))
        width = None if optional and not content.get("use_sliding_window", False) else width
        given, layers = content.get("layer_types"), content["num_hidden_layers"]
        if given is None and width is None:
            return {"windows": (None,)}
        kinds = types(content) if given is None else list(given)
        is_valid = all(kind == FULL or (kind == SLIDING and width is not None) for kind in kinds)
        if not is_valid or (given is not None and len(kinds) != layers):
            expected = f"{layers} times {FULL}, or {SLIDING} with a sliding_window"
            raise ValueError(f"layer_types is {given!r:.80}, expected {expected}")
        return {"windows": tuple(width if kind == SLIDING else None for kind in kinds)}

    def write(config: GPTConfig) -> dict[str, Any]:
        windows = {width for width in config.windows if width is not None}
        first = next((layer for layer, width in enumerate(config.windows) if width is not None), config.n_layer)
        more_fields = {"use_sliding_window": bool(windows), "max_window_layers": first}
        kinds = [FULL if width is None else SLIDING for width in config.windows]
        known = {name: value for name, value in more_fields.items() if name in more}
        return {**known, "sliding_window": max(windows, default=None), "layer_types": kinds}

    return FieldGroup(("sliding_window", "layer_types", *more), read, write)


def uniform_window_fields(window: int | None) -> FieldGroup:
    """Return the field of a family whose layers all have the same window, `window` if config.json has none."""

    def read(content: Mapping[str, Any]) -> dict[str, Any]:
        if content.get("layer_types") is not None:
            raise ValueError(f"layer_types is {content['layer_types']!r:.80}, expected none: sliding_window decides")
        return {"windows": (_window(content.get("sliding_window", window)),)}

    return FieldGroup(("sliding_window", "layer_types"), read, lambda config: {"sliding_window": config.windows[0]})


def _window(value: Any) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError(f"sliding_window is {value!r:.60}, expected an integer of at least 1, or null")
    return value


def rotary_layer_fields(interval: int) -> FieldGroup:
    """Return the fields of a family that leaves some layers without positions.

    Args:
        interval: transformers' distance between these layers if config.json does not list them.
    """

    def read(content: Mapping[str, Any]) -> dict[str, Any]:
        layers, given = content["num_hidden_layers"], content.get("no_rope_layers")
        if given is None:
            every = content.get("no_rope_layer_interval", interval)
            return {"rotary_layers": tuple((layer + 1) % every != 0 for layer in range(layers))}
        if len(given) < layers or not all(value in (0, 1) for value in given):
            raise ValueError(f"no_rope_layers is {given!r:.80}, expected 1 (rotary) or 0 for each of {layers} layers")
        return {"rotary_layers": tuple(bool(value) for value in given[:layers])}

    def write(config: GPTConfig) -> dict[str, Any]:
        return {"no_rope_layers": [int(is_rotary) for is_rotary in config.rotary_layers]}

    return FieldGroup(("no_rope_layers", "no_rope_layer_interval"), read, write)


def bias_fields(**parts: tuple[str, ...]) -> FieldGroup:
    """Return fields of config.json that say which layers have a bias.

    Args:
        parts: name of a boolean field -> the parts of GPTConfig.bias that have a bias if it is true.
    """

    def read(content: Mapping[str, Any]) -> dict[str, Any]:
        return {"bias": tuple(part for name, biased in parts.items() if content.get(name) for part in biased)}

    def write(config: GPTConfig) -> dict[str, Any]:
        return {name: all(map(config.has_bias, biased)) for name, biased in parts.items()}

    return FieldGroup(tuple(parts), read, write)
