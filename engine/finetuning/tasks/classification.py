"""Classification of a text: [start; text; extract]. Radford et al. 2018, section 3.3 and figure 1."""

from __future__ import annotations

from peakgpt.engine.finetuning.rows import Row
from peakgpt.engine.finetuning.tasks.sequence_task import SequenceTask, Texts


class Classification(SequenceTask):
    """One text, one label."""

    name = "classification"
    fields = ("text",)

    def texts(self, row: Row) -> list[Texts]:
        return [tuple(row.text(name) for name in self.field_names)]
