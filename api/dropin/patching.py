"""`peakgpt.patch` and `peakgpt.unpatch`: run an existing PyTorch model on peakgpt's ops, and undo it."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from peakgpt.dropin import detection, unreplaced
from peakgpt.dropin.attention_function import NAME
from peakgpt.dropin.class_swap import class_path, original_class, replace, restore, wrapped_since
from peakgpt.dropin.known_classes import KNOWN_CLASSES, Row
from peakgpt.dropin.replacements import lm_heads
from peakgpt.dropin.replacements.attention import TransformersAttention
from peakgpt.dropin.replacements.layers import MLP
from peakgpt.dropin.replacements.rotary_attention import RotaryAttention
from peakgpt.dropin.report import KEPT, LEFT, PART, REPLACED, Entry, Report
from peakgpt.dropin.verification import compare_outputs, reference_outputs
from peakgpt.kernels.cpu.memory import keep_pages

PREVIOUS_ATTENTION = "_peakgpt_previous_attention"  # attribute of a model: attn_implementation before the patch
FORWARD_SET = "its attribute `forward` replaces the forward of its class, as the hooks of accelerate do"
BY_NAME = 'attention, by attn_implementation="peakgpt"'


def patch(model: nn.Module, strict: bool = False, check: bool = True) -> Report:
    """Replace the layers of a model by peakgpt's fused ops, in place.

    Parameters, module names, tied weights, state dict, hooks and existing optimizers stay valid. `unpatch` undoes it.

    In train() and with labels, language models of transformers return `logits=None` with the loss: the logits are never
    computed. If the model has parameters on the CPU, the process keeps freed memory from then on, because returning it
    to the system costs page faults in every step.

    Args:
        model: any module. Models of transformers are recognized by class (docs/dropin.md), others layer by layer.
        strict: raise if any module is left that has an op in peakgpt or is unknown.
        check: compare outputs before and after on the model's own weights.
    Returns:
        A Report with one entry for each module. Print it to see what runs on which op and why others do not.
    Raises:
        ValueError: not a module; already patched; strict and modules are left; outputs differ. The model is then
            unchanged.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"patch: got a {type(model).__name__}, expected a torch.nn.Module")
    if any(original_class(m) is not type(m) for m in model.modules()):
        raise ValueError("patch: got a model that is patched already, expected an unpatched model: call unpatch first")
    before = reference_outputs(model) if check else None
    report = Report()
    try:
        attention_ids = _set_attention_implementation(model)
        parts: dict[int, str] = {}
        for name, module in model.named_modules():
            report.entries.append(_entry(name, module, parts, attention_ids))
        if strict and report.left:
            names = "; ".join(f"{e.module or 'the model'} ({e.kind}): {e.note}" for e in report.left[:3])
            raise ValueError(f"patch: got strict=True and {len(report.left)} modules left, expected none: {names}")
        report.check = compare_outputs(before, model) if check else "not done: check=False"
    except Exception:
        unpatch(model)
        raise
    if any(p.device.type == "cpu" for p in model.parameters()):
        reason = keep_pages()
        keeps = "the process keeps freed memory until it ends"
        report.process = f"freed memory returns to the system: {reason}" if reason else keeps
    return report


def unpatch(model: nn.Module) -> None:
    """Undo `patch`: restore the class of every module. Outputs then have the same bits as before `patch`.

    Raises:
        ValueError: a module was wrapped after it was patched, for example by FSDP2. The model is then unchanged.
    """
    for name, module in model.named_modules():
        if obstacle := wrapped_since(module):
            raise ValueError(
                f"unpatch: got {name or 'the model'}, a {obstacle}, expected it unwrapped: patch after wrapping"
            )
    for module in model.modules():
        restore(module)
        if PREVIOUS_ATTENTION in module.__dict__:
            previous = module.__dict__.pop(PREVIOUS_ATTENTION)
            if module.config._attn_implementation_internal == NAME:  # else set_attn_implementation was called later
                module.config._attn_implementation_internal = previous


def row_of(module: nn.Module) -> Row | None:
    """Return the row of the module's class, or of the class that FSDP2 wrapped; None for an unknown class."""
    kind = original_class(module)
    if kind.__name__.startswith("FSDP") and len(kind.__mro__) > 2 and kind.__mro__[1].__name__ == "FSDPModule":
        kind = kind.__mro__[2]
    return KNOWN_CLASSES.get(class_path(kind))


def _set_attention_implementation(model: nn.Module) -> set[int]:
    """Set attn_implementation of transformers' models to "peakgpt"; return the ids of their attention modules."""
    if "transformers.modeling_utils" not in sys.modules:
        return set()
    from transformers import PreTrainedModel

    from peakgpt.dropin.mask_function import register_attention

    attention_ids: set[int] = set()
    configs: set[int] = set()
    for part in model.modules():
        if not isinstance(part, PreTrainedModel) or not (ids := _attention_modules(part)):
            continue
        attention_ids |= ids
        if id(part.config) not in configs:
            register_attention()
            configs.add(id(part.config))
            part.__dict__[PREVIOUS_ATTENTION] = part.config._attn_implementation_internal
            part.config._attn_implementation_internal = NAME
    return attention_ids


def _attention_modules(model: nn.Module) -> set[int]:
    """Return the ids of modules that take attention from their config's attn_implementation or are replaced."""
    if any(_needs_dense_mask(module) for module in model.modules()):
        return set()
    rows = {id(m): row for m in model.modules() if (row := row_of(m))}
    known = {
        key for key, row in rows.items()
        if row.replacement is None or issubclass(row.replacement, TransformersAttention)
    }  # fmt: skip
    if known or not (model._supports_attention_backend and model._can_set_attn_implementation()):
        return known
    return {id(m) for m in model.modules() if type(m).__name__.endswith("Attention")}


def _needs_dense_mask(module: nn.Module) -> bool:
    """Return whether this is attention that adds a mask to its scores itself and that cannot be replaced."""
    rows = (KNOWN_CLASSES.get(class_path(kind)) for kind in original_class(module).__mro__)
    row = next(filter(None, rows), None)
    if row is None or row.replacement is None or not issubclass(row.replacement, TransformersAttention):
        return False
    replaced = row_of(module) is row and _objection(row, module, dict(row.options)) is None
    return not (replaced or issubclass(row.replacement, RotaryAttention))


def _objection(row: Row, module: nn.Module, options: dict[str, Any]) -> str | None:
    return FORWARD_SET if "forward" in vars(module) else row.replacement.objection(module, options)


def _entry(name: str, module: nn.Module, parts: dict[int, str], attention_ids: set[int]) -> Entry:
    """Replace one module if possible; return its entry of the report."""
    kind, row = type(module).__name__, row_of(module)
    if row is None and id(module) not in attention_ids:
        row = _detect(module)
    if row is None or row.replacement is None:
        if id(module) in attention_ids:
            return Entry(name, kind, REPLACED, BY_NAME)
        if id(module) in parts:
            return Entry(name, kind, PART, parts[id(module)])
        reason = "its model is not a transformers model" if row else unreplaced.reason_left(module)
        return Entry(name, kind, LEFT, reason) if reason else Entry(name, kind, KEPT)
    options = dict(row.options)
    if reason := _objection(row, module, options):
        return Entry(name, kind, LEFT, reason)
    for part in row.parts:
        parts[id(module.get_submodule(part))] = f"{row.ops} of {name}" if name else row.ops
    if issubclass(row.replacement, lm_heads.LanguageModel):
        lm_heads.replace_head(module, options)
    if original_class(module) is type(module):  # else it is the head of a language model, replaced above
        replace(module, row.replacement, options)
    if id(module) in parts:
        return Entry(name, kind, PART, parts[id(module)])
    return Entry(name, kind, REPLACED, row.ops)


def _detect(module: nn.Module) -> Row | None:
    """Return a row for a module of an unknown class if it is detected as attention or MLP, else None."""
    if detection.calls_sdpa(type(module)):
        return Row(detection.CallsSDPA, "attention, for scaled_dot_product_attention")
    options = detection.detect_mlp(module)
    if options is None:
        return None
    return Row(DetectedMLP, "mlp", options, tuple(options[name] for name in ("up", "act", "down") if options[name]))


class DetectedMLP(MLP):
    """An MLP of an unknown class. `detection` has determined its activation."""

    @classmethod
    def objection(cls, module: nn.Module, options: dict[str, Any]) -> str | None:
        return super().objection(module, options) if options["act"] else None

    def _intact_layers(self, *roles: str) -> list[nn.Module] | None:
        same = list(self._modules) == self._peakgpt["children"]  # a layer that was appended to nn.Sequential must run
        return super()._intact_layers(*roles) if same else None
