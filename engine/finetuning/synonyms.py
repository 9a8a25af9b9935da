"""Names of settings in other programs for fine-tuning, for the error of an unknown key or flag.

litgpt: `litgpt finetune_full` (litgpt/finetune/full.py, args.py, data/json_data.py). TRL: `trl sft`, SFTConfig and
ScriptArguments; the names of TrainingArguments, which SFTConfig inherits, are those of engine/training/synonyms.py.
"""

from __future__ import annotations

from peakgpt.engine.training.synonyms import Names

PROGRAMS = ("litgpt", "TRL")

# Our key or flag -> what each program calls it; several names are separated by blanks, "" if it has none.
SYNONYMS: dict[str, tuple[str, str]] = {
    "init": ("checkpoint_dir", "model_name_or_path"),
    "data": ("data data.json_path json_path", "dataset_name dataset_path datasets"),
    "validation_share": ("data.val_split_fraction val_split_fraction", ""),
    "truncate": ("", "truncation_mode"),
    "tokens": ("train.max_seq_length max_seq_length", "max_length max_seq_length"),
    "train_on": ("data.mask_prompt mask_prompt", "assistant_only_loss completion_only_loss"),
    "packing": ("", "padding_free packing_strategy"),
    "chat_template": ("data.prompt_style prompt_style", "chat_template_path"),
}  # fmt: skip
FINETUNING = Names(PROGRAMS, SYNONYMS)
