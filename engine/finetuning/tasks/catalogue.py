"""All tasks by name."""

from __future__ import annotations

from peakgpt.engine.finetuning.task import Task
from peakgpt.engine.finetuning.tasks.sft import Sft

TASKS: dict[str, type[Task]] = {task.name: task for task in (Sft,)}
