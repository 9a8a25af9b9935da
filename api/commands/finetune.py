"""peakgpt finetune: adapt a checkpoint to a task. A resumed run has the same bits as an uninterrupted run."""

from __future__ import annotations

from peakgpt.engine.finetuning.config import FinetuneConfig
from peakgpt.engine.finetuning.session import check_resources, resume, start
from peakgpt.run_command import RunCommand

COMMAND = RunCommand(FinetuneConfig, check_resources, start, resume)
add_arguments, run = COMMAND.add_arguments, COMMAND.run
