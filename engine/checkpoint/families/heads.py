"""transformers' classes with a head for labels: which families have them, and how the head's tensors are called.

A sequence has one label: the class reads the last token that is no padding; the head has no bias. A token has a label
of its own: the head has a bias.
"""

from __future__ import annotations

import re

from peakgpt.engine.checkpoint.families.catalogue import OWN
from peakgpt.engine.checkpoint.families.family import Family

SEQUENCE, TOKEN = "ForSequenceClassification", "ForTokenClassification"
SCORE, CLASSIFIER = "score", "classifier"
LANGUAGE_MODEL = re.compile("(LMHeadModel|ForCausalLM)$")
# Families whose class for sequences has another name than that of their language model.
OTHER_NAMES = {"gemma3_text": "Gemma3TextForSequenceClassification"}
WITHOUT_SEQUENCES = {"codegen", OWN}
WITHOUT_TOKENS = {"openai-gpt", "gptj", "opt", "olmo", "olmo2", "olmo3", "gemma3_text", *WITHOUT_SEQUENCES}
WITH_CLASSIFIER = {"gpt2", "gpt_neo", "gpt_neox", "bloom", "gpt_bigcode", "mpt", "falcon"}  # of tokens


def head_class(family: Family, kind: str) -> str | None:
    """Return transformers' class of a family for SEQUENCE or TOKEN; None if it has none."""
    if family.model_type in (WITHOUT_SEQUENCES if kind == SEQUENCE else WITHOUT_TOKENS):
        return None
    return OTHER_NAMES.get(family.model_type) or LANGUAGE_MODEL.sub(kind, family.architecture)


def head_name(family: Family, kind: str) -> str:
    """Return the name of the head's module in the files of a family; without a class it is SCORE."""
    return CLASSIFIER if kind == TOKEN and family.model_type in WITH_CLASSIFIER else SCORE
