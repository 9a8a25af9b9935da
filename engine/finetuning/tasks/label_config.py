"""The settings of the tasks with labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peakgpt.engine.settings.setting import check_settings, setting

CLASSES, SCORES = PROBLEM_TYPES = ("single_label_classification", "regression")  # transformers' names
SEQUENCE_TASKS = ("classification", "entailment", "similarity")
LABEL_TASKS = (*SEQUENCE_TASKS, "multiple-choice", "token-classification")
WITH_LABELS = {"task": LABEL_TASKS}
# Radford et al. 2018, section 4.1, and the arguments of finetune-transformer-lm. Dropout is that of the checkpoint.
DEFAULTS: dict[str, Any] = {
    "lr": 6.25e-5, "batch": 32, "epochs": 3.0, "warmup": 0.002, "schedule": "linear", "betas": (0.9, 0.999),
    "weight_decay": 0.01, "max_norm": 1.0, "validation_batches": None,
}  # fmt: skip


@dataclass(kw_only=True, frozen=True)
class LabelConfig:
    """How rows with labels are read, and how the model with a head is trained on them.

    Raises:
        ValueError: a value is out of range.
    """

    text_fields: tuple[str, ...] | None = setting(
        None, "fields of a row that have its texts, in the order of the task's own: classification text; entailment "
        "premise hypothesis; similarity sentence1 sentence2; multiple-choice context choices, or context question "
        "choices; token-classification tokens", section="labels", metavar="FIELD", automatic="the task's own",
        only_with=WITH_LABELS,
    )  # fmt: skip
    label_field: str = setting(
        "label", "field of a row that has its label; of token-classification the list of labels", section="labels",
        metavar="FIELD", only_with=WITH_LABELS,
    )  # fmt: skip
    problem_type: str | None = setting(
        None, "classes, or numbers to predict (regression); transformers' names", section="labels",
        choices=PROBLEM_TYPES, automatic="regression if a label has a decimal point",
        only_with={"task": SEQUENCE_TASKS},
    )  # fmt: skip
    lm_loss_weight: float = setting(
        0.5, "factor on the loss of the language model, which is added to that of the task; 0: none (lambda of GPT-1)",
        section="labels", at_least=0, metavar="FACTOR", only_with=WITH_LABELS,
    )  # fmt: skip
    transfer_layers: int | None = setting(
        None, "blocks that start with the weights of init, from the first one, besides the embeddings; the others are "
        "random. none: all; -1: no weight of init, not even the embeddings", section="labels", at_least=-1,
        metavar="N", only_with=WITH_LABELS,
    )  # fmt: skip
    classifier_dropout: float = setting(
        0.1, "probability with which an input of the head is zero, in training", section="labels", at_least=0, below=1,
        metavar="RATE", only_with=WITH_LABELS,
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_settings(self)
