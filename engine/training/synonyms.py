"""Names of settings in other training programs, for the error of an unknown key and the table in docs/training.md.

litgpt: `litgpt pretrain` (litgpt/pretrain.py, args.py). torchtitan: torchtitan/config/configs.py and the Config classes
in components/. nanoGPT: train.py. transformers: TrainingArguments, and GPT2Config for [model].
"""

from __future__ import annotations

PROGRAMS = ("litgpt", "torchtitan", "nanoGPT", "transformers")

# Our key or flag -> what a reader of each program looks for; several names are separated by blanks.
SYNONYMS: dict[str, tuple[str, str, str, str]] = {}


def our_name(name: str) -> str | None:
    """Return what to use instead of a name of another program; None if no program has it.

    Args:
        name: a key or a flag without its dashes; sections may stand before it, as in train.global_batch_size.
    """
    return None
