"""adapter_config.json: an adapter's settings and the name of its base model, as PEFT writes and reads them.

PEFT writes all fields of all kinds of adapters. A field that we do not support is fine as long as it has the value that
turns it off; else it is refused by its name, never ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from peakgpt.engine.checkpoint.folder import read_json
from peakgpt.engine.data.adapter_source import ADAPTER_CONFIG
from peakgpt.engine.model.lora import LoraConfig

PEFT_TYPE = "LORA"
# Fields that say nothing about what an adapter computes. fan_in_fan_out follows from the family's layers.
UNSPECIFIC = {
    "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "task_type", "inference_mode",
    "fan_in_fan_out", "megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying",
}  # fmt: skip
# Fields of which we support some values -> these, and why no others.
CHOICES = {
    "bias": (("none",), ""),
    "init_lora_weights": (
        (True, False, "gaussian", "orthogonal", "eva"), ": other ways change the weights of the base model too"
    ),
}  # fmt: skip
OURS = frozenset(field.name for field in fields(LoraConfig))


def read_adapter_config(folder: Path) -> LoraConfig:
    """Read adapter_config.json of a folder.

    Raises:
        ValueError: no such file, a damaged one, or an adapter that we do not support.
    """
    path = folder / ADAPTER_CONFIG
    content = read_json(path)
    if (kind := content.get("peft_type")) != PEFT_TYPE:
        raise ValueError(f"{path}: peft_type is {kind!r:.60}, expected {PEFT_TYPE}: other adapters are not supported")
    try:
        _refuse_unsupported(content)
        return LoraConfig(**{name: value for name, value in content.items() if name in OURS})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _refuse_unsupported(content: Mapping[str, Any]) -> None:
    for name, value in content.items():
        if name in OURS or name in UNSPECIFIC:
            continue
        if name in CHOICES:
            allowed, reason = CHOICES[name]
            if value not in allowed:
                raise ValueError(f"{name} is {value!r:.60}, expected {' or '.join(map(str, allowed))}{reason}")
        elif value not in (None, False, {}, []):
            raise ValueError(f"{name} is {value!r:.60}, expected none: it is not supported")


def adapter_json(
    config: LoraConfig, targets: Sequence[str] | str, base: str | None, revision: str | None, *, is_conv1d: bool
) -> dict[str, Any]:
    """Return the content of an adapter_config.json.

    Args:
        config: the adapter's settings.
        targets: target_modules, as PEFT finds them.
        base, revision: name or path of the base model; None if it has none.
        is_conv1d: whether the family stores the weights of its layers as [in, out].
    """
    fields_of_config = {name: list(value) if isinstance(value := getattr(config, name), tuple) else value
                        for name in sorted(OURS)}  # fmt: skip
    return {
        "peft_type": PEFT_TYPE,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "inference_mode": True,
        **fields_of_config,
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "bias": "none",
        "fan_in_fan_out": is_conv1d,
        "init_lora_weights": True,
    }
