"""All model families of transformers, by model_type. The rows are in families_*.py; `Family` explains their fields.

A config is written in the layout of the family that it was read from, or else of the first one that reads it back
unchanged. The last family is our own layout,
which expresses every config.
"""

from __future__ import annotations

from dataclasses import fields

from peakgpt.engine.checkpoint.families_classic import CLASSIC
from peakgpt.engine.checkpoint.families_other import OTHER
from peakgpt.engine.checkpoint.family import Family, Field
from peakgpt.engine.checkpoint.module_names import SameNames
from peakgpt.engine.model.config import GPTConfig

OWN = "peakgpt"  # model_type of our own layout

OWN_LAYOUT = Family(
    model_type=OWN,
    architecture="GPT",
    fields=tuple(Field(f.name, f.name, f.default) for f in fields(GPTConfig)),
    names=SameNames(),
)
FAMILIES = {family.model_type: family for family in (*CLASSIC, *OTHER, OWN_LAYOUT)}


def family_of(config: GPTConfig, model_type: str | None = None) -> Family:
    """Return the family in whose layout a model is written: the first that can express its config.

    Args:
        config: of the model.
        model_type: the family to try first, that of the folder which the model was loaded from.
    """
    preferred = [FAMILIES[model_type]] if model_type in FAMILIES and model_type != OWN else []
    return next(family for family in (*preferred, *FAMILIES.values()) if not family.differences(config))


def nearest_family(config: GPTConfig) -> tuple[str, list[str]]:
    """Return the model type whose layout expresses most of a config, and the fields that it cannot express."""
    missing = {name: family.differences(config) for name, family in FAMILIES.items() if name != OWN}
    return min(missing.items(), key=lambda pair: len(pair[1]))
