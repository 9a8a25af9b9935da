"""Samples of a run: how its model continues the prompts of the user at each validation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from peakgpt.engine.data.tokenizer import Tokenizer
from peakgpt.engine.training.validation_config import ValidationConfig


@dataclass(frozen=True)
class Sample:
    """A continuation that the model wrote."""

    prompt: str
    text: str


class Sampler:
    """Lets a GPT continue the prompts of a run."""

    def __init__(
        self, model: nn.Module, config: ValidationConfig, tokenizer: Tokenizer | None,
        encode: Callable[[str], list[int]] | None, seed: int,
    ):  # fmt: skip
        """
        Args:
            model: a GPT, if there are prompts.
            config: prompts and temperature.
            tokenizer: of the texts.
            encode: returns the ids of a prompt.
            seed: of the samples.
        Raises:
            ValueError: prompts without a tokenizer, or a prompt without tokens or too long for the model.
        """
        self.model, self.config, self.tokenizer, self.seed = model, config, tokenizer, seed
        self._prompts = [(prompt, self._encode(prompt, encode)) for prompt in config.prompts]

    def samples(self) -> list[Sample]:
        """Return the continuation of each prompt."""
        return [self._sample(*pair) for pair in self._prompts]

    def _encode(self, prompt: str, encode: Callable[[str], list[int]] | None) -> list[int]:
        if encode is None:
            raise ValueError("validation: got prompts without a tokenizer, expected both")
        ids, limit = encode(prompt), self.model.config.block_size
        if not 0 < len(ids) < limit:
            raise ValueError(
                f"prompts: {prompt[:40]!r} has {len(ids)} tokens, expected 1 to {limit - 1}, fewer than the model's "
                f"block_size {limit}"
            )
        return ids

    def _sample(self, prompt: str, ids: list[int]) -> Sample:
        config = self.config
        ends = {*self.tokenizer.stop_token_ids, *self.model.generation_config.eos_token_id}
        sampling = {"do_sample": True, "temperature": config.sample_temperature, "seed": self.seed}
        new = min(config.sample_tokens, self.model.config.block_size - len(ids))
        out = self.model.generate(
            torch.tensor([ids], device=next(self.model.parameters()).device), max_new_tokens=new,
            eos_token_id=sorted(ends), num_beams=1, **(sampling if config.sample_temperature else {"do_sample": False}),
        )  # fmt: skip
        return Sample(prompt, self.tokenizer.decode([i for i in out[0, len(ids) :].tolist() if i not in ends]))
