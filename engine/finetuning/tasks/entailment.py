"""Textual entailment: [start; premise; delimiter; hypothesis; extract]. Radford et al. 2018, section 3.3."""

from __future__ import annotations

from peakgpt.engine.finetuning.tasks.classification import Classification


class Entailment(Classification):
    """Two texts in an order that matters, one label."""

    name = "entailment"
    fields = ("premise", "hypothesis")
