"""`peakgpt.patch` and `peakgpt.unpatch`: put the ops into a model that is already there, and take them out again."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from peakgpt.dropin import heads, remains, trial
from peakgpt.dropin.attentions import Attention
from peakgpt.dropin.check import compare, observe
from peakgpt.dropin.layers import MLP
from peakgpt.dropin.report import KEPT, LEFT, PART, REPLACED, Entry, Report
from peakgpt.dropin.swap import original, path, replace, restore
from peakgpt.dropin.table import TABLE, Row
from peakgpt.kernels.cpu.memory import keep_pages

FORMER = "_peakgpt_former_attention"  # on a model: its config's attn_implementation from before
BY_NAME = 'attention, by attn_implementation="peakgpt"'


def patch(model: nn.Module, strict: bool = False, check: bool = True) -> Report:
    """Let a model run on peakgpt's ops, in place. Its parameters, names, ties, state dict and optimizer stay.

    In train() and with labels, language models of transformers then give no logits beside the loss. With parameters on
    the CPU the process keeps freed memory from then on (see `kernels/cpu/memory.py`).

    Args:
        model: any module; transformers' models are known by class (docs/dropin.md), others by the layers they are of.
        strict: raise where anything is left: what peakgpt has an op for, or what nobody knows to need none.
        check: compare outputs with those of the unpatched model, on its own weights.
    Returns:
        What became of every module; print it.
    Raises:
        ValueError: no module; it is patched already; strict and something is left; the outputs differ. The model is
            then as it was.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"patch: got a {type(model).__name__}, expected a torch.nn.Module")
    if any(original(m) is not type(m) for m in model.modules()):
        raise ValueError("patch: got a model that is patched already, expected one that is not: unpatch it first")
    before = observe(model) if check else None
    report = Report()
    try:
        attentive = _attend_by_name(model)
        parts: dict[int, str] = {}
        for name, module in model.named_modules():
            report.entries.append(_entry(name, module, parts, attentive))
        if strict and report.left:
            named = "; ".join(f"{e.module or 'the model'} ({e.kind}): {e.note}" for e in report.left[:3])
            raise ValueError(f"patch: got strict=True and {len(report.left)} modules left, expected none: {named}")
        report.check = compare(before, model) if check else "not asked for"
    except Exception:
        unpatch(model)
        raise
    if any(p.device.type == "cpu" for p in model.parameters()):
        why = keep_pages()
        report.process = f"freed memory is given back: {why}" if why else "the process keeps freed memory until it ends"
    return report


def unpatch(model: nn.Module) -> None:
    """Give every module its own class back; the model then computes what it did before, bit for bit.

    Raises:
        ValueError: a patched module has been wrapped since.
    """
    for module in model.modules():
        restore(module)
        if FORMER in module.__dict__:
            module.config._attn_implementation_internal = module.__dict__.pop(FORMER)


def row_of(module: nn.Module) -> Row | None:
    """The row of a module's class, or of the class that FSDP2 has put its own in front of."""
    kind = original(module)
    if kind.__name__.startswith("FSDP") and len(kind.__mro__) > 2 and kind.__mro__[1].__name__ == "FSDPModule":
        kind = kind.__mro__[2]
    return TABLE.get(path(kind))


def _attend_by_name(model: nn.Module) -> set[int]:
    """Set the attention of transformers' models to ours; returns the ids of the modules whose attention it then is."""
    if "transformers.modeling_utils" not in sys.modules:
        return set()
    from transformers import PreTrainedModel

    from peakgpt.dropin.interface import NAME, register_attention

    found: set[int] = set()
    configs: set[int] = set()
    for part in model.modules():
        if not isinstance(part, PreTrainedModel) or not (ids := _attentions(part)):
            continue
        found |= ids
        if id(part.config) not in configs:
            register_attention()
            configs.add(id(part.config))
            part.__dict__[FORMER] = part.config._attn_implementation_internal
            part.config._attn_implementation_internal = NAME
    return found


def _attentions(model: nn.Module) -> set[int]:
    """Modules of a model of transformers whose attention goes by the name in its config, or is replaced here."""
    known = {id(m) for m in model.modules() if (row := row_of(m)) and (row.by is None or issubclass(row.by, Attention))}
    if known or not (model._supports_attention_backend and model._can_set_attn_implementation()):
        return known
    return {id(m) for m in model.modules() if type(m).__name__.endswith("Attention")}


def _entry(name: str, module: nn.Module, parts: dict[int, str], attentive: set[int]) -> Entry:
    """Replace one module, if it can be, and say so."""
    kind, row = type(module).__name__, row_of(module)
    if row is None and id(module) not in attentive:
        row = _tried(module)
    if row is None or row.by is None:
        if id(module) in attentive:
            return Entry(name, kind, REPLACED, BY_NAME)
        if id(module) in parts:
            return Entry(name, kind, PART, parts[id(module)])
        reason = "its model is not one of transformers'" if row else remains.reason(module)
        return Entry(name, kind, LEFT, reason) if reason else Entry(name, kind, KEPT)
    options = dict(row.options)
    if reason := row.by.objection(module, options):
        return Entry(name, kind, LEFT, reason)
    for part in row.parts:
        parts[id(module.get_submodule(part))] = f"{row.ops} of {name}" if name else row.ops
    if issubclass(row.by, heads.LanguageModel):
        heads.replace_head(module, options)
    if original(module) is type(module):  # else it is the head of the model before it
        replace(module, row.by, options)
    if id(module) in parts:
        return Entry(name, kind, PART, parts[id(module)])
    return Entry(name, kind, REPLACED, row.ops)


def _tried(module: nn.Module) -> Row | None:
    """The row of a module whose class is not known."""
    if (by := trial.calling(type(module))) is not None:
        return Row(by, "attention, for scaled_dot_product_attention")
    options = trial.perceptron(module)
    if options is None:
        return None
    return Row(Tried, "mlp", options, tuple(options[name] for name in ("up", "act", "down") if options[name]))


class Tried(MLP):
    """A perceptron whose activation is known by trial."""

    @classmethod
    def objection(cls, module: nn.Module, options: dict[str, Any]) -> str | None:
        return None
