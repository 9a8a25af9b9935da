"""peakgpt train: train a GPT on text. A resumed run has the same bits as an uninterrupted run."""

from __future__ import annotations

from peakgpt.engine.run_session import check_resources, resume, start
from peakgpt.engine.training.run_config import RunConfig
from peakgpt.run_command import RunCommand

COMMAND = RunCommand(RunConfig, check_resources, start, resume)
add_arguments, run = COMMAND.add_arguments, COMMAND.run
