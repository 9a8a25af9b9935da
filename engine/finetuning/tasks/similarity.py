"""Similarity: two texts without an order, so there are two sequences with both orders.

    [start; a; delimiter; b; extract]    [start; b; delimiter; a; extract]

Their hidden states are added before the head. Radford et al. 2018, section 3.3.
"""

from __future__ import annotations

from peakgpt.engine.finetuning.rows import Row
from peakgpt.engine.finetuning.tasks.sequence_task import SequenceTask, Texts


class Similarity(SequenceTask):
    """Two texts, and a class or a number."""

    name = "similarity"
    fields = ("sentence1", "sentence2")

    def texts(self, row: Row) -> list[Texts]:
        first, second = (row.text(name) for name in self.field_names)
        return [(first, second), (second, first)]
