"""Replacements for language models of transformers, whose loss becomes `linear_cross_entropy`.

In train() and with labels, the forward of transformers runs with a head that returns its input, and the loss is
computed from these hidden states. The output is the same except `logits`, which is None. The bias of a head becomes an
extra column of its weight, with a constant input of 1. In eval(), without labels, and with a custom loss function,
nothing changes.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import threading
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peakgpt.dropin.attention_function import NAME
from peakgpt.dropin.class_swap import LINEAR, Replacement, linear_layout, original_class, replace, with_signature
from peakgpt.dropin.intact import is_intact
from peakgpt.dropin.replacements.layers import Linear
from peakgpt.engine.model.plain import has_own_call
from peakgpt.kernels.ops.linear_cross_entropy import linear_cross_entropy

ALIGNED = 64  # columns; each row then starts at an address that every vector load accepts
IGNORED = -100  # the ignore_index of transformers


class LinearHead(Linear):
    """A head that is nn.Linear; returns its input inside `passing_through`."""

    def forward(self, x: Tensor) -> Tensor:
        return x if _thread() in self._peakgpt["passing_through"] else super().forward(x)


class PassThroughHead(Replacement):
    """Any other head module; returns its input inside `passing_through`."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return args[0] if _thread() in self._peakgpt["passing_through"] else super().forward(*args, **kwargs)


def _thread() -> int:
    """Return a number of this thread. torch.compile cannot trace get_ident, and traces in one thread at a time."""
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


@contextlib.contextmanager
def passing_through(head: nn.Module):
    """Make the head return its input in this thread."""
    threads = head._peakgpt["passing_through"]
    threads.add(_thread())
    try:
        yield
    finally:
        threads.discard(_thread())


class LanguageModel(Replacement):
    """Base of the replacements of language models. Options: head: name of the module that computes logits."""

    def __init__(self, config, *args, **kwargs):
        if config._attn_implementation == NAME:  # the config of a patched model; some classes cannot be built with it
            config = copy.deepcopy(config)
            config._attn_implementation_internal = None
        super().__init__(config, *args, **kwargs)

    @classmethod
    def _peakgpt_attributes(cls, kind: type) -> dict[str, Any]:
        """Keep the signature of the original: transformers inspects the arguments of whole models."""
        return {"forward": with_signature(cls.forward, kind.forward)}

    @classmethod
    def objection(cls, module: nn.Module, options: dict[str, Any]) -> str | None:
        options["names"] = list(inspect.signature(original_class(module).forward).parameters)[1:]
        return None

    def forward(self, *args, **kwargs):
        inputs = {**dict(zip(self._peakgpt["names"], args, strict=False)), **kwargs}
        labels = inputs.get("labels")
        head = getattr(self, self._peakgpt["head"])
        if labels is None or not self.training or self._has_custom_loss() or not self._can_skip_head(head):
            return super().forward(*args, **kwargs)
        return_dict = inputs.pop("return_dict", None)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        del inputs["labels"]
        inputs |= self._decoder_inputs(inputs, labels)
        out = self._forward_without_head(head, inputs, super().forward)
        loss = self._fused_loss(head, out.logits, labels, inputs)
        if (balance := out.get("aux_loss")) is not None:  # of experts
            loss = loss + self.router_aux_loss_coef * balance.to(loss.device)
        out = type(out)(**{**out, "loss": loss, "logits": None})
        return out if return_dict else out.to_tuple()

    def _has_custom_loss(self) -> bool:
        """Return whether the model has a loss other than the default of its class."""
        return False

    def _can_skip_head(self, head: nn.Module) -> bool:
        """Return whether this call can compute the loss without the head's forward."""
        return linear_layout(head) == LINEAR

    def _forward_without_head(self, head: nn.Module, inputs: dict[str, Any], forward):
        """Run the model; `logits` of its output hold the input of the head."""
        with passing_through(head):
            return forward(**inputs, return_dict=True)

    def _decoder_inputs(self, inputs: dict[str, Any], labels: Tensor) -> dict[str, Any]:
        """Return the decoder inputs that the model derives from labels."""
        return {}


class CausalLM(LanguageModel):
    """Models with the ForCausalLMLoss of transformers."""

    def _has_custom_loss(self) -> bool:
        # Reading `loss_function` warns if loss_type is None, and torch.compile cannot trace a warning.
        return hasattr(self, "_loss_function") or getattr(self, "loss_type", None) not in (None, "ForCausalLM")

    def _fused_loss(self, head: nn.Module, x: Tensor, labels: Tensor, inputs: dict[str, Any]) -> Tensor:
        """Return the mean over labels that are not ignored, or their sum divided by num_items_in_batch."""
        ignored = inputs.get("ignore_index", IGNORED)
        target = inputs.get("shift_labels")
        if target is None:
            target = F.pad(labels, (0, 1), value=ignored)[..., 1:]
        x, target = x.flatten(0, -2), target.reshape(-1).to(x.device)
        if x.shape[0] != target.shape[0]:
            raise ValueError(
                f"loss: got {x.shape[0]} positions with logits and {target.shape[0]} labels, expected equal counts: "
                "with logits_to_keep, pass shift_labels for the same positions"
            )
        items = inputs.get("num_items_in_batch")
        reduction = "mean" if items is None else "sum"
        loss = _cross_entropy(
            x, head.weight, head.bias, target, ignore_index=ignored, reduction=reduction, **self._loss_options()
        )
        return loss if items is None else loss / (items.to(loss.device) if isinstance(items, Tensor) else items)


    def _loss_options(self) -> dict[str, Any]:
        """Return further options of `linear_cross_entropy`."""
        return {}


class CappedLM(CausalLM):
    """Gemma 2 and 3, whose logits may be capped: c tanh(logits / c)."""

    def _forward_without_head(self, head: nn.Module, inputs: dict[str, Any], forward):
        from transformers.modeling_outputs import CausalLMOutputWithPast

        kept = inputs.pop("logits_to_keep", None) or 0
        out = self.model(**inputs, return_dict=True)
        x = out.last_hidden_state[:, slice(-kept, None) if isinstance(kept, int) else kept]
        others = {name: out.get(name) for name in ("past_key_values", "hidden_states", "attentions")}
        return CausalLMOutputWithPast(logits=x, **others)

    def _loss_options(self) -> dict[str, Any]:
        return {"softcap": self.config.final_logit_softcapping}


class AlignedLM(LanguageModel):
    """The decoder of BART alone: labels are the targets, without a shift."""

    def _fused_loss(self, head: nn.Module, x: Tensor, labels: Tensor, inputs: dict[str, Any]) -> Tensor:
        target = labels.reshape(-1).to(x.device)
        return _cross_entropy(x.flatten(0, -2), head.weight, self._head_bias(head), target, ignore_index=IGNORED)

    def _head_bias(self, head: nn.Module) -> Tensor | None:
        return head.bias


class Seq2SeqLM(AlignedLM):
    """T5: the decoder input is the labels shifted right by one."""

    def _decoder_inputs(self, inputs: dict[str, Any], labels: Tensor) -> dict[str, Any]:
        if inputs.get("decoder_input_ids") is not None or inputs.get("decoder_inputs_embeds") is not None:
            return {}
        return {"decoder_input_ids": self.prepare_decoder_input_ids_from_labels(labels)}


class BartLM(Seq2SeqLM):
    """BART: final_logits_bias is added to the logits of its head."""

    def _forward_without_head(self, head: nn.Module, inputs: dict[str, Any], forward):
        from transformers.modeling_outputs import Seq2SeqLMOutput

        out = dict(self.model(**{**inputs, "use_cache": False}, return_dict=True))
        return Seq2SeqLMOutput(logits=out.pop("last_hidden_state"), **out)

    def _head_bias(self, head: nn.Module) -> Tensor:
        return self.final_logits_bias.flatten()


def _cross_entropy(x: Tensor, w: Tensor, bias: Tensor | None, target: Tensor, **options: Any) -> Tensor:
    """Compute `linear_cross_entropy` for a head with or without bias. A bias costs a copy of the weight."""
    if bias is not None:
        columns = ALIGNED - x.shape[1] % ALIGNED
        ones = F.pad(x.new_ones(len(x), 1), (0, columns - 1))
        x, w = torch.cat((x, ones), 1), torch.cat((w, F.pad(bias[:, None].to(w.dtype), (0, columns - 1))), 1)
    return linear_cross_entropy(x, w, target, **options)


class MaskedLM(LanguageModel):
    """BERT and RoBERTa: logits of labelled positions only, usually 15 % of all."""

    def _has_custom_loss(self) -> bool:
        loss = getattr(self, "mlm_loss_fct", None)  # DistilBERT
        return loss is not None and not _is_default(loss)

    def _can_skip_head(self, head: nn.Module) -> bool:
        return is_intact(head) and not torch.compiler.is_compiling()

    def _fused_loss(self, head: nn.Module, x: Tensor, labels: Tensor, inputs: dict[str, Any]) -> Tensor:
        labels = labels.reshape(-1).to(x.device)
        labelled = (labels != IGNORED).nonzero()[:, 0]
        return F.cross_entropy(head(x.flatten(0, -2)[labelled]), labels[labelled])


def _is_default(loss: nn.Module) -> bool:
    """Return whether the loss is the mean cross-entropy over labels other than -100."""
    if type(loss) is not nn.CrossEntropyLoss or has_own_call(loss) or loss.weight is not None:
        return False
    return (loss.ignore_index, loss.reduction, loss.label_smoothing) == (IGNORED, "mean", 0.0)


def replace_head(model: nn.Module, options: dict[str, Any]) -> None:
    """Replace the head of a language model by one that can return its input."""
    head = model.get_submodule(options["head"])
    replace(head, LinearHead if isinstance(head, nn.Linear) else PassThroughHead, {"passing_through": set()})
