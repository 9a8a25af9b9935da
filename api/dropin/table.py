"""What is replaced by what: one row a class, known by its path, so that nothing is imported before it is there."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peakgpt.dropin import heads, layers
from peakgpt.dropin.swap import CONV1D, LINEAR, Replaced


@dataclass(frozen=True)
class Row:
    """Args:
    by: the class that takes its place; None where the module stays and calls attention by transformers' interface.
    ops: the ops that then run, for the report.
    options: names of submodules and what else `by` reads.
    parts: names of submodules whose work is done here.
    """

    by: type[Replaced] | None
    ops: str
    options: dict[str, Any] = field(default_factory=dict)
    parts: tuple[str, ...] = ()


INTERFACE = Row(None, "attention")


def _mlp(up: str, act: str, down: str, dropout: str | None = None) -> Row:
    options = {"up": up, "act": act, "down": down, "dropout": dropout}
    return Row(layers.MLP, "mlp", options, (up, act, down))


def _causal(head: str = "lm_head") -> Row:
    return Row(heads.CausalLM, "linear_cross_entropy", {"head": head}, (head,))


def _masked(head: str) -> Row:
    return Row(heads.MaskedLM, "cross-entropy of the labelled positions", {"head": head}, (head,))


_MODELS = "transformers.models.{0}.modeling_{0}.{1}".format

TABLE: dict[str, Row] = {
    LINEAR: Row(layers.Linear, "linear"),
    CONV1D: Row(layers.Linear, "linear"),
    "torch.nn.modules.normalization.LayerNorm": Row(layers.LayerNorm, "layernorm"),
    _MODELS("gpt2", "GPT2Attention"): INTERFACE,
    _MODELS("gpt2", "GPT2MLP"): _mlp("c_fc", "act", "c_proj", "dropout"),
    _MODELS("gpt2", "GPT2LMHeadModel"): _causal(),
}

# Modules with arithmetic that peakgpt has an op for in other shapes, or none yet, and why these stay as they are.
REASONS: dict[str, str] = {}
