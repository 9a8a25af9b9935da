"""Language-model heads whose loss is `linear_cross_entropy`: in train() and with labels the logits are never formed.

transformers' own forward runs, with a head that hands the hidden states through; the loss is taken from those. A head's
bias is one more column of its weight, for a feature that is 1. Its output is the same but for `logits`, which are None
then. In eval(), without labels, and under a loss function of the
user's, nothing is different from transformers.
"""

from __future__ import annotations

import contextlib
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peakgpt.dropin.layers import Linear
from peakgpt.dropin.swap import LINEAR, Replaced, layout, original, replace
from peakgpt.kernels.ops.linear_cross_entropy import linear_cross_entropy

ALIGNED = 64  # columns; rows then begin where loads of every width may
IGNORED = -100  # transformers' label for what is not to be learnt


class Head(Linear):
    """The linear layer of a head; `passing` hands its input through."""

    def forward(self, x: Tensor) -> Tensor:
        return x if self._peakgpt["passing"] else super().forward(x)


class Passing(Replaced):
    """Any other head module, likewise."""

    def forward(self, x: Tensor) -> Tensor:
        return x if self._peakgpt["passing"] else super().forward(x)


@contextlib.contextmanager
def passing(head: nn.Module):
    head._peakgpt["passing"] = True
    try:
        yield
    finally:
        head._peakgpt["passing"] = False


class LanguageModel(Replaced):
    """Options: head: the name of the module that makes logits; shifted: whether labels are moved by one."""

    _signed = True

    @classmethod
    def objection(cls, module: nn.Module, options: dict[str, Any]) -> str | None:
        options["names"] = list(inspect.signature(original(module).forward).parameters)[1:]
        return None

    def forward(self, *args, **kwargs):
        inputs = {**dict(zip(self._peakgpt["names"], args, strict=False)), **kwargs}
        labels = inputs.get("labels")
        head = getattr(self, self._peakgpt["head"])
        if labels is None or not self.training or self._has_own_loss() or not self._can_pass(head):
            return super().forward(*args, **kwargs)
        whole = inputs.pop("return_dict", None)
        whole = self.config.return_dict if whole is None else whole
        del inputs["labels"]
        inputs |= self._decoder_inputs(inputs, labels)
        out = self._without_logits(head, inputs, super().forward)
        loss = self._loss_of(head, out.logits, labels, inputs)
        out = type(out)(**{**out, "loss": loss, "logits": None})
        return out if whole else out.to_tuple()

    def _has_own_loss(self) -> bool:
        """Whether the loss is not the one that is known here."""
        return False

    def _can_pass(self, head: nn.Module) -> bool:
        """Whether the head can be done without at this call."""
        return layout(head) == LINEAR

    def _without_logits(self, head: nn.Module, inputs: dict[str, Any], forward):
        """The output of the model, with what the head reads in place of logits."""
        with passing(head):
            return forward(**inputs, return_dict=True)

    def _decoder_inputs(self, inputs: dict[str, Any], labels: Tensor) -> dict[str, Any]:
        """What the model would make of labels beside the loss."""
        return {}


class CausalLM(LanguageModel):
    """Heads with transformers' ForCausalLMLoss."""

    def _has_own_loss(self) -> bool:
        # Not by asking for `loss_function`, which warns about a loss_type of None: no graph takes a warning.
        return hasattr(self, "_loss_function") or getattr(self, "loss_type", None) not in (None, "ForCausalLM")

    def _loss_of(self, head: nn.Module, x: Tensor, labels: Tensor, inputs: dict[str, Any]) -> Tensor:
        """As ForCausalLMLoss: mean over the labels that count, or their sum over num_items_in_batch."""
        ignored = inputs.get("ignore_index", IGNORED)
        target = inputs.get("shift_labels")
        if target is None:
            target = F.pad(labels, (0, 1), value=ignored)[..., 1:]
        x, target = x.flatten(0, -2), target.reshape(-1).to(x.device)
        if x.shape[0] != target.shape[0]:
            raise ValueError(
                f"loss: got {x.shape[0]} positions with logits and {target.shape[0]} labels, expected as many: "
                "logits_to_keep takes shift_labels of the same positions with it"
            )
        items = inputs.get("num_items_in_batch")
        reduction = "mean" if items is None else "sum"
        loss = _cross_entropy(x, head.weight, head.bias, target, ignore_index=ignored, reduction=reduction)
        return loss if items is None else loss / (items.to(loss.device) if isinstance(items, Tensor) else items)


class AlignedLM(LanguageModel):
    """BART's decoder alone: labels are the targets as they are."""

    def _loss_of(self, head: nn.Module, x: Tensor, labels: Tensor, inputs: dict[str, Any]) -> Tensor:
        target = labels.reshape(-1).to(x.device)
        return _cross_entropy(x.flatten(0, -2), head.weight, self._head_bias(head), target, ignore_index=IGNORED)

    def _head_bias(self, head: nn.Module) -> Tensor | None:
        return head.bias


class Seq2SeqLM(AlignedLM):
    """T5, whose decoder reads the labels one later."""

    def _decoder_inputs(self, inputs: dict[str, Any], labels: Tensor) -> dict[str, Any]:
        if inputs.get("decoder_input_ids") is not None or inputs.get("decoder_inputs_embeds") is not None:
            return {}
        return {"decoder_input_ids": self.prepare_decoder_input_ids_from_labels(labels)}


class BartLM(Seq2SeqLM):
    """BART, which adds final_logits_bias to what its head gives."""

    def _without_logits(self, head: nn.Module, inputs: dict[str, Any], forward):
        from transformers.modeling_outputs import Seq2SeqLMOutput

        out = dict(self.model(**{**inputs, "use_cache": False}, return_dict=True))
        return Seq2SeqLMOutput(logits=out.pop("last_hidden_state"), **out)

    def _head_bias(self, head: nn.Module) -> Tensor:
        return self.final_logits_bias.flatten()


def _cross_entropy(x: Tensor, w: Tensor, bias: Tensor | None, target: Tensor, **options: Any) -> Tensor:
    """`linear_cross_entropy` of a head with a bias or without; with one, its weight is copied."""
    if bias is not None:
        more = ALIGNED - x.shape[1] % ALIGNED
        one = F.pad(x.new_ones(len(x), 1), (0, more - 1))
        x, w = torch.cat((x, one), 1), torch.cat((w, F.pad(bias[:, None].to(w.dtype), (0, more - 1))), 1)
    return linear_cross_entropy(x, w, target, **options)


class MaskedLM(LanguageModel):
    """BERT and RoBERTa: logits of the labelled positions only, usually 15 % of them."""

    def _can_pass(self, head: nn.Module) -> bool:
        return not (torch.compiler.is_compiling() or head._forward_hooks or head._forward_pre_hooks)

    def _loss_of(self, head: nn.Module, x: Tensor, labels: Tensor, inputs: dict[str, Any]) -> Tensor:
        labels = labels.reshape(-1).to(x.device)
        at = (labels != IGNORED).nonzero()[:, 0]
        return F.cross_entropy(head(x.flatten(0, -2)[at]), labels[at])


def replace_head(model: nn.Module, options: dict[str, Any]) -> None:
    """Let the head of a language model hand its input through when it is asked to."""
    head = model.get_submodule(options["head"])
    replace(head, Head if isinstance(head, nn.Linear) else Passing, {"passing": False})
