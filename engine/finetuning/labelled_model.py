"""The models of GPT-1's tasks: a GPT and a linear head on its hidden states, trained with two losses.

    L = L2 + lm_loss_weight L1

L2 is the loss of the task, L1 that of predicting each next token of the same sequences. Both are means: L1 over the
tokens of a sequence, then over the sequences of an example; both over the examples. Radford et al. 2018, "Improving
Language Understanding by Generative Pre-Training", section 3.2, equations 3 to 5.

An example has S sequences, whose last token is _classify_. What the head reads is one class for each kind of task:

    SequenceModel   h = sum over the sequences of the hidden states of _classify_      logits = W h
    ChoiceModel     one logit for each sequence; softmax over the sequences
    TokenModel      one prediction for each token that has a label; one sequence, without _classify_

The sum is that of section 3.3 for similarity. W has no bias, so W h is also the sum of the logits of each sequence.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peakgpt.engine.gpt import GPT
from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.model.experts import balance_loss
from peakgpt.engine.model.plain import run_linear
from peakgpt.engine.model.transformer import INIT_STD
from peakgpt.kernels.ops.dropout import dropout
from peakgpt.kernels.ops.linear_cross_entropy import IGNORE_INDEX

GPT_PREFIX, HEAD_PREFIX = "gpt.", "head."  # of names in its state dict


class LabelledModel(nn.Module):
    """A GPT with a head. Called with a batch, it returns the loss.

    Attributes:
        gpt: the language model.
        head: from hidden states to `outputs` numbers.
    """

    batch_names: ClassVar[tuple[str, ...]] = ("", "", "")  # of the Trainer: the tensors of a batch have no keywords
    has_head_bias: ClassVar[bool] = False  # as transformers' class for such a task has it

    def __init__(
        self, gpt: GPT, outputs: int, *, lm_loss_weight: float = 0.0, classifier_dropout: float = 0.0,
        is_regression: bool = False,
    ):  # fmt: skip
        """Add a head with random weights, from torch's generator.

        Args:
            gpt: has embeddings of all tokens; on the default device, where the head is too, or without memory.
            outputs: number of classes; 1 for numbers and for choices.
            lm_loss_weight: lambda of L1; 0 leaves L1 out.
            classifier_dropout: probability with which an input of the head is zero in training. The mask is the same
                for all sequences of an example, as in the published code.
            is_regression: the labels are numbers, and L2 is the squared error.
        """
        super().__init__()
        self.gpt, self.lm_loss_weight, self.classifier_dropout = gpt, lm_loss_weight, classifier_dropout
        self.is_regression = is_regression
        self.head = nn.Linear(gpt.config.word_dim, outputs, bias=self.has_head_bias, dtype=gpt.dtype)
        with torch.no_grad():
            self.head.weight.normal_(0.0, INIT_STD)
            if self.head.bias is not None:
                self.head.bias.zero_()

    @property
    def config(self) -> GPTConfig:
        """The config of the language model."""
        return self.gpt.config

    @property
    def transformer(self) -> nn.Module:
        """The blocks of the language model, for `set_recompute`."""
        return self.gpt.transformer

    @property
    def source_files(self) -> Any:
        """JSON files of the folder that the language model was loaded from."""
        return self.gpt.source_files

    def forward(self, input_ids: Tensor, lengths: Tensor, labels: Tensor, loss_weight: Tensor | None = None) -> Tensor:
        """Compute L, a float32 scalar.

        Args:
            input_ids: (B, S, T) int64, padded at the end with any id.
            lengths: (B, S) int64, tokens of each sequence without padding; 0 for a sequence that an example lacks.
            labels: (B,) int64 classes or choices, or float32 numbers; of tokens (B, T) int64, IGNORE_INDEX for none.
            loss_weight: (B,) float32, a factor on the loss of each example; the loss is then their sum. None: those of
                `loss_weights`.
        """
        weight = loss_weight
        if weight is None:
            weight = self.loss_weights(input_ids, lengths, labels)["loss_weight"]
        usage: list[Tensor] | None = [] if self.config.experts and self.training else None
        h = self._hidden_states(input_ids, usage)
        loss = (self.losses(self._logits(h, lengths), labels) * weight).sum()
        if self.lm_loss_weight:
            loss = loss + self._lm_loss(h, input_ids, lengths, self.lm_loss_weight * weight)
        if usage:
            loss = loss + self.config.balance_loss * weight.sum() * balance_loss(usage, self.config.balance_over)
        return loss

    def loss_weights(self, input_ids: Tensor, lengths: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the factor on the loss of each example that makes the sum a mean over all labels, (B,) float32."""
        counts = self.label_counts(labels)
        return {"loss_weight": counts / counts.sum()}

    def label_counts(self, labels: Tensor) -> Tensor:
        """Return the number of labels of each example, (B,) float32."""
        return torch.ones(len(labels), device=labels.device)

    def predict(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        """Compute the logits, float32: (B, outputs); (B, S) of choices, -inf for none; (B, T, outputs) of tokens."""
        return self._logits(self._hidden_states(input_ids), lengths)

    def _hidden_states(self, input_ids: Tensor, usage: list[Tensor] | None = None) -> Tensor:
        """Compute the hidden states, (B, S, T, C). No token attends to the padding, which comes last."""
        return self.gpt.hidden_states(input_ids.flatten(0, 1), balance=usage).unflatten(0, input_ids.shape[:2])

    def _logits(self, h: Tensor, lengths: Tensor) -> Tensor:
        """Compute what `predict` returns from hidden states (B, S, T, C)."""
        raise NotImplementedError

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Compute L2 of each example, (B,) float32, from what `predict` returns."""
        if self.is_regression:
            return (logits.squeeze(-1) - labels).square()
        return F.cross_entropy(logits, labels, reduction="none")

    def _lm_loss(self, h: Tensor, input_ids: Tensor, lengths: Tensor, weight: Tensor) -> Tensor:
        """Compute the sum of L1 of all examples, each times its weight, which the op includes in its gradient."""
        counts = (lengths - 1).clamp(min=0)[..., None]  # (B, S, 1), targets of each sequence
        is_target = torch.arange(input_ids.shape[-1], device=input_ids.device) < counts
        targets = input_ids.roll(-1, -1).masked_fill(~is_target, IGNORE_INDEX)
        sequences = (lengths > 0).sum(1)[:, None, None]
        each = (weight[:, None, None] / (counts * sequences).clamp(min=1)).expand(targets.shape)
        return self.gpt.compute_loss(h.flatten(0, 1), targets.flatten(0, 1), each.flatten(0, 1))

    def _read(self, h: Tensor, lengths: Tensor) -> Tensor:
        """Return the hidden state of the last token of each sequence, (B, S, C), with dropout; zeros without one."""
        last = (lengths - 1).clamp(min=0)[..., None, None].expand(-1, -1, 1, h.shape[-1])
        return self._dropped(h.gather(2, last).squeeze(2)) * (lengths > 0)[..., None]

    def _dropped(self, x: Tensor) -> Tensor:
        """Drop elements of (B, S, C) in training, with one mask for all sequences of an example."""
        if not (self.training and self.classifier_dropout):
            return x
        return x * dropout(torch.ones_like(x[:, :1]), p=self.classifier_dropout)


class SequenceModel(LabelledModel):
    """One class, or one number, for an example: of the sum of the hidden states of its sequences."""

    def _logits(self, h: Tensor, lengths: Tensor) -> Tensor:
        return run_linear(self.head, self._read(h, lengths).sum(1)).float()


class ChoiceModel(LabelledModel):
    """The sequence with the largest logit."""

    def _logits(self, h: Tensor, lengths: Tensor) -> Tensor:
        logits = run_linear(self.head, self._read(h, lengths)).squeeze(-1).float()
        return logits.masked_fill(lengths == 0, -math.inf)


class TokenModel(LabelledModel):
    """One class for each token."""

    has_head_bias = True

    def label_counts(self, labels: Tensor) -> Tensor:
        return (labels != IGNORE_INDEX).sum(-1).float()

    def _logits(self, h: Tensor, lengths: Tensor) -> Tensor:
        x = h.squeeze(1)  # (B, T, C)
        if self.training and self.classifier_dropout:
            x = dropout(x, p=self.classifier_dropout)
        return run_linear(self.head, x).float()

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORE_INDEX)
        return losses.sum(-1) / (labels != IGNORE_INDEX).sum(-1).clamp(min=1)
