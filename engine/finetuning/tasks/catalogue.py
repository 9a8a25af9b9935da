"""All tasks by name."""

from __future__ import annotations

from peakgpt.engine.finetuning.task import Task
from peakgpt.engine.finetuning.tasks.classification import Classification
from peakgpt.engine.finetuning.tasks.entailment import Entailment
from peakgpt.engine.finetuning.tasks.multiple_choice import MultipleChoice
from peakgpt.engine.finetuning.tasks.sft import Sft
from peakgpt.engine.finetuning.tasks.similarity import Similarity
from peakgpt.engine.finetuning.tasks.token_classification import TokenClassification

KINDS: tuple[type[Task], ...] = (
    Classification, Entailment, Similarity, MultipleChoice, TokenClassification, Sft
)  # fmt: skip
TASKS: dict[str, type[Task]] = {task.name: task for task in KINDS}
