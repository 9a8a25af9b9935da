"""All model families of transformers, by model_type. `Family` explains the fields of a row.

A config is written in the layout of the family it was read from, if that still reads it back unchanged, else of the
first family that does. Fields that only training reads may be in a section of ours, if no family has them. The last
family is our own layout, which expresses every config.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from peakgpt.engine.checkpoint.families.classic import CLASSIC
from peakgpt.engine.checkpoint.families.experts import EXPERT_FAMILIES
from peakgpt.engine.checkpoint.families.family import SECTION, Family, Field
from peakgpt.engine.checkpoint.families.llama import LLAMA_LINE
from peakgpt.engine.checkpoint.families.module_names import SameNames
from peakgpt.engine.checkpoint.families.other import OTHER
from peakgpt.engine.model.config import GPTConfig

OWN = "peakgpt"  # model_type of our own layout

OWN_LAYOUT = Family(
    model_type=OWN,
    architecture="GPT",
    fields=tuple(Field(f.name, f.name, f.default) for f in fields(GPTConfig)),
    names=SameNames(),
)
FAMILIES = {family.model_type: family for family in (*CLASSIC, *LLAMA_LINE, *OTHER, *EXPERT_FAMILIES, OWN_LAYOUT)}

# Fields of a config.json that say nothing about the architecture: names, token ids, initialization, generation.
UNSPECIFIC = {
    "model_type", "architectures", "torch_dtype", "dtype", "transformers_version", "auto_map", "_name_or_path",
    "use_cache", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id", "output_attentions",
    "output_hidden_states", "return_dict",
}  # fmt: skip


def family_of(config: GPTConfig, source: Mapping[str, Any] | None = None) -> Family:
    """Return the family whose layout a config is written in.

    Args:
        config: of the model.
        source: the config.json that the model was loaded from; None for a new model.
    """
    kept = FAMILIES.get(str((source or {}).get("model_type")), OWN_LAYOUT)
    families = [*([] if kept is OWN_LAYOUT else [kept]), *FAMILIES.values()]
    *theirs, own = (family for family in families if not family.differences(config))
    exact = next((family for family in theirs if SECTION not in family.config_json(config)), None)
    return exact or next(iter(theirs), own)


def nearest_family(config: GPTConfig) -> tuple[str, list[str]]:
    """Return the model type whose layout expresses most of a config, and the fields that it cannot express."""
    missing = {name: family.differences(config) for name, family in FAMILIES.items() if name != OWN}
    return min(missing.items(), key=lambda pair: len(pair[1]))


def known_family(content: Mapping[str, Any]) -> Family:
    """Return the family of a config.json.

    Raises:
        ValueError: there is none; the message names the nearest families, and the fields that the nearest lacks.
    """
    model_type = content.get("model_type")
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    known = f"model_type is {model_type!r:.60}, expected one of {', '.join(FAMILIES)}"
    given, names = content.keys() - UNSPECIFIC, [name for name in FAMILIES if name != OWN]
    by_fields = sorted(names, key=lambda name: len(given - FAMILIES[name].config_names))
    nearest = difflib.get_close_matches(str(model_type), names, n=3) or by_fields[:1]
    unread = sorted(given - FAMILIES[nearest[0]].config_names)
    lacks = f"{nearest[0]} has no {', '.join(unread[:8])}" if unread else f"{nearest[0]} has all its fields"
    raise ValueError(f"{known}; nearest: {', '.join(nearest)}; {lacks}")
