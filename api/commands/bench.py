"""peakgpt bench: see peakgpt.bench.command."""

from peakgpt.bench.command import add_arguments, run

__all__ = ["add_arguments", "run"]
