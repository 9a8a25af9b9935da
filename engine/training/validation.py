"""Validation: loss, perplexity and bits per byte of a model on held-out sets, samples of its text, and the best so far.

    loss = sum_i -ln p(t_i) / n        perplexity = e^loss        bits per byte = loss / (ln 2 * bytes per token)

i runs over the n targets of a set. Each window of T tokens is scored by itself, as in training.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from peakgpt.engine.data.batches import document_positions, validation_batches
from peakgpt.engine.data.shards import TokenShards
from peakgpt.engine.data.tokenizer import Tokenizer
from peakgpt.engine.training.samples import Sample, Sampler
from peakgpt.engine.training.validation_config import ValidationConfig
from peakgpt.kernels.ops.linear_cross_entropy import IGNORE_INDEX

COUNTS = ("best_step", "waited")
STATE = ("best_loss", "reference_loss", *COUNTS)  # attributes of a BestValidation that a checkpoint contains


@dataclass(frozen=True)
class SetMetrics:
    """A model's result on one held-out set.

    Args:
        loss: mean over the targets, in nats per token.
        tokens: number of targets.
        bits_per_byte: the loss in bits per UTF-8 byte of text, which does not depend on the tokenizer; None if the
            bytes of the text are unknown.
    """

    loss: float
    tokens: int
    bits_per_byte: float | None = None

    @property
    def perplexity(self) -> float:
        """e^loss; infinite above a loss of 709."""
        return math.exp(self.loss) if self.loss < 709 else math.inf

    @property
    def criterion(self) -> float:
        """What decides which validation is the best; lower is better."""
        return self.loss

    def row(self) -> dict[str, Any]:
        """Return the keys of metrics.jsonl."""
        figures = {"validation_loss": self.loss, "perplexity": self.perplexity, "validation_tokens": self.tokens}
        return figures if self.bits_per_byte is None else {**figures, "bits_per_byte": self.bits_per_byte}

    def __str__(self) -> str:
        bits = "" if self.bits_per_byte is None else f", {self.bits_per_byte:.4f} bits per byte"
        return f"loss {self.loss:.4f}, perplexity {self.perplexity:.4g}{bits}, {self.tokens:,} tokens"


@dataclass(frozen=True)
class ValidationMetrics:
    """The model was evaluated.

    Args:
        step: updates made so far.
        sets: results by name. The first set decides which validation is the best.
        is_best: whether the first set's criterion is the lowest so far.
        samples: one for each prompt.
        seconds: that the validation took.
    """

    step: int
    sets: Mapping[str, SetMetrics]
    is_best: bool = True
    samples: Sequence[Sample] = ()
    seconds: float = 0.0

    @property
    def loss(self) -> float:
        """The loss on the first set, in nats per token."""
        return next(iter(self.sets.values())).loss

    @property
    def bits_per_byte(self) -> float | None:
        """The bits per byte of the first set."""
        return next(iter(self.sets.values())).bits_per_byte

    def row(self) -> dict[str, Any]:
        """Return the event as a line of metrics.jsonl. The figures of further sets have the set's name in front."""
        row: dict[str, Any] = {"step": self.step}
        for number, (name, found) in enumerate(self.sets.items()):
            prefix = f"{name}/" if number else ""
            row |= {f"{prefix}{key}": value for key, value in found.row().items()}
        row |= {"is_best": self.is_best, "validation_s": round(self.seconds, 3)}
        if self.samples:
            row["samples"] = [{"prompt": sample.prompt, "text": sample.text} for sample in self.samples]
        return row


class BestValidation(ABC):
    """Evaluates a model during its training, and knows the best validation so far.

    Attributes:
        best_loss: the lowest criterion of the first set, which is its loss unless its metrics say otherwise; infinite
            before the first validation.
        best_step: its step; 0 before the first validation.
        reference_loss: what a criterion must be lower than by min_delta, so that training goes on.
        waited: validations since the reference.
    """

    def __init__(self, model: nn.Module, config: ValidationConfig):
        self.model, self.config = model, config
        self.best_loss, self.best_step = math.inf, 0
        self.reference_loss, self.waited = math.inf, 0

    @abstractmethod
    def evaluate(self, batches: int | None) -> Mapping[str, SetMetrics]:
        """Evaluate the model, which is in evaluation mode, on at most this many batches of each set, or on all."""

    @abstractmethod
    def count_targets(self) -> int:
        """Return the number of targets of one validation."""

    def samples(self) -> Sequence[Sample]:
        """Return texts of the model; the default has none."""
        return ()

    def validate(self, step: int, *, batches: int | None = None) -> ValidationMetrics:
        """Evaluate the model on all sets and write the samples.

        The state of torch's random generators stays as it is.

        Args:
            step: updates made so far.
            batches: of each set; None means the config's number.
        Raises:
            FloatingPointError: a loss is not finite.
        """
        count = self.config.validation_batches if batches is None else batches
        was_training, start_s = self.model.training, time.perf_counter()
        self.model.eval()
        try:
            sets = self.evaluate(count)
            for name, found in sets.items():
                if not math.isfinite(found.loss):
                    raise FloatingPointError(
                        f"step {step}: the loss on {name} is {found.loss}, expected a finite number"
                    )
            samples = self.samples()
        finally:
            self.model.train(was_training)
        is_best = self._observe(step, next(iter(sets.values())).criterion)
        return ValidationMetrics(step, sets, is_best, samples, time.perf_counter() - start_s)

    def _observe(self, step: int, loss: float) -> bool:
        """Take the criterion of a validation into account; return whether it is the lowest so far."""
        self.waited += 1
        if loss < self.reference_loss - self.config.min_delta:
            self.reference_loss, self.waited = loss, 0
        is_best = loss < self.best_loss
        if is_best:
            self.best_loss, self.best_step = loss, step
        return is_best

    @property
    def should_stop(self) -> bool:
        """Whether `patience` validations in a row were not better."""
        return self.config.patience is not None and self.waited >= self.config.patience

    def state_dict(self) -> dict[str, float | int | None]:
        """Return the best validation so far as JSON, for a checkpoint. JSON has no infinity: it is None."""
        values = {name: getattr(self, name) for name in STATE}
        return {name: None if value == math.inf else value for name, value in values.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned.

        Raises:
            ValueError: other keys or types; nothing changes.
        """
        wrong = sorted(state) != sorted(STATE) or any(
            not isinstance(value, int if name in COUNTS else float | None) for name, value in state.items()
        )
        if wrong:
            raise ValueError(f"validation state: got {dict(state)}, expected numbers for {', '.join(STATE)}")
        for name, value in state.items():
            setattr(self, name, math.inf if value is None else value)


class Validator(BestValidation):
    """Evaluates a language model on token streams that it is not trained on."""

    def __init__(
        self, model: nn.Module, sets: Mapping[str, TokenShards], config: ValidationConfig, *, batch: int, tokens: int,
        tokenizer: Tokenizer | None = None, seed: int = 0, document_token: int | None = None,
    ):  # fmt: skip
        """
        Args:
            model: called as model(ids, targets) -> mean loss, in evaluation mode. Samples need a GPT.
            sets: held-out tokens by name, at least one set.
            config: what to measure.
            batch, tokens: B and T of a forward pass.
            tokenizer: for samples.
            seed: of samples.
            document_token: the id with which a document begins, for a model that is trained on masked documents.
        Raises:
            ValueError: no set, a set with fewer than two tokens, or a prompt without tokens or too long for the model.
        """
        if not sets:
            raise ValueError("validation: got no held-out set, expected at least one")
        for shards in sets.values():
            validation_batches(shards, batch, tokens)  # raises now, not after hours of training
        super().__init__(model, config)
        self.sets, self.batch, self.tokens, self.document_token = dict(sets), batch, tokens, document_token
        self.sampler = Sampler(model, config, tokenizer, tokenizer and tokenizer.encode, seed)

    def evaluate(self, batches: int | None) -> dict[str, SetMetrics]:
        return {
            name: evaluate(
                self.model, shards, self.batch, self.tokens, batches=batches, document_token=self.document_token
            )
            for name, shards in self.sets.items()
        }

    def samples(self) -> Sequence[Sample]:
        return self.sampler.samples()

    def count_targets(self) -> int:
        batches = self.config.validation_batches
        limit = math.inf if batches is None else batches * self.batch * self.tokens
        return sum(int(min(len(shards) - 1, limit)) for shards in self.sets.values())


@torch.no_grad()
def evaluate(
    model: nn.Module, shards: TokenShards, batch: int, tokens: int, *, batches: int | None = None,
    document_token: int | None = None,
) -> SetMetrics:  # fmt: skip
    """Return a model's metrics on the start of a token stream: the exact mean over its targets.

    Args:
        model: called as model(ids, targets) -> mean loss over the targets that are not IGNORE_INDEX.
        shards: tokens that are not trained on.
        batch, tokens: B and T.
        batches: the maximum number of batches; None: all.
        document_token: the id with which a document begins, which attends to itself alone. None: no masks.
    """
    device = next(model.parameters()).device
    losses: list[Tensor] = []
    counts: list[int] = []
    for ids, targets in islice(validation_batches(shards, batch, tokens), batches):
        packed = {}
        if document_token is not None:
            packed["position_ids"] = document_positions(ids, document_token).to(device)
        losses.append(model(ids.to(device), targets.to(device), **packed))
        counts.append(int((targets != IGNORE_INDEX).sum()))
    total = torch.stack(losses).double() @ torch.tensor(counts, dtype=torch.float64, device=device)
    loss = float(total) / sum(counts)
    return SetMetrics(loss, sum(counts), None if shards.text_bytes is None else shards.bits_per_byte(loss))
