"""Adapter folders: a folder in PEFT's format has no model of its own, but the name of one."""

from __future__ import annotations

import json
from pathlib import Path

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def is_adapter(folder: Path) -> bool:
    """Return whether a folder has an adapter."""
    return (folder / ADAPTER_CONFIG).is_file()


def base_of(folder: Path) -> tuple[str, str | None]:
    """Return the name or path of an adapter's base model, and its revision.

    Raises:
        ValueError: adapter_config.json is damaged or names no base model.
    """
    path = folder / ADAPTER_CONFIG
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        base, revision = content.get("base_model_name_or_path"), content.get("revision")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: {error}, expected a JSON object") from None
    if not isinstance(base, str) or not base:
        raise ValueError(f"{path}: base_model_name_or_path is {base!r}, expected the model that the adapter is for; "
                         "load that model and give the adapter to it")  # fmt: skip
    return base, revision or None
