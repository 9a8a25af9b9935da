"""GPT: the model with everything a user does with it. The network itself is `peakgpt.engine.model.transformer`.

Each method hands over to the module that does the work, so that no module below imports this one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peakgpt.engine.checkpoint import checkpoint
from peakgpt.engine.checkpoint import quantized as quantized_folder
from peakgpt.engine.data.tokenizer import Tokenizer
from peakgpt.engine.inference.beam_search import beam_search
from peakgpt.engine.inference.generate import check_prompt, generate, stream
from peakgpt.engine.inference.sampling_params import SamplingParams
from peakgpt.engine.model.presets import preset
from peakgpt.engine.model.quantized_linear import QuantizedLinear
from peakgpt.engine.model.transformer import Transformer
from peakgpt.engine.training.optimizer import AdamW, decay_groups


class GPT(Transformer):
    """A GPT language model: build, load, save, train, generate."""

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> GPT:
        """Build a known model with random weights.

        Args:
            name: a key of peakgpt.engine.model.presets.PRESETS, such as "gpt2".
            changes: GPTConfig fields that replace the preset's.
        Raises:
            ValueError: an unknown name or field, or sizes that do not fit each other.
        """
        return cls(preset(name, **changes))

    @classmethod
    def from_pretrained(
        cls, folder: Path | str, *, dtype: torch.dtype = torch.float32, dropout: float | None = None
    ) -> GPT:
        """Load a checkpoint in the Hugging Face layout of its family, in evaluation mode as transformers does.

        Args:
            folder: with config.json and model.safetensors (or its shards, or pytorch_model.bin).
            dtype: of the parameters.
            dropout: replaces the checkpoint's rates.
        Raises:
            ValueError: a missing, damaged or foreign checkpoint; the message names file and tensor.
        """
        family, config = checkpoint.read_config(folder, dropout=dropout)
        with torch.device("meta"):
            model = cls(config)
        if form := quantized_folder.read_format(folder):
            return quantized_folder.read(folder, model, form, dtype)
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        model.load_state_dict(checkpoint.read_weights(folder, family, config, shapes, dtype), assign=True)
        return model.eval()

    def save_pretrained(
        self, folder: Path | str, tokenizer: Tokenizer | None = None, *, weights: Mapping[str, Tensor] | None = None,
        dtype: torch.dtype | None = None, max_shard_size: int | str | None = None,
    ) -> None:  # fmt: skip
        """Save in the Hugging Face layout of its family, or in our own where there is none, with a warning.

        An interrupted write leaves what was there.

        Args:
            folder: made where it is not there.
            tokenizer: saved beside the model; anything with `save(folder)` and `end_id`.
            weights: replaces the model's own tensors by name, as from AdamW.master_weights.
            dtype: what is written is converted to; None writes tensors as they are, masters in float32.
            max_shard_size: bytes, or such as "5GB"; more goes into several files with an index. None: one file.
        Raises:
            OSError: the folder can not be written.
            ValueError: the model is quantized, or max_shard_size is no size.
        """
        if any(isinstance(module, QuantizedLinear) for module in self.modules()):
            raise ValueError("save_pretrained: got a quantized model, expected float weights; copy its folder instead")
        state = {name: t.to(dtype or t.dtype) for name, t in {**self.state_dict(), **(weights or {})}.items()}
        checkpoint.write_model(folder, self.config, state, tokenizer, max_shard_size)

    def generate(
        self,
        ids: Tensor,
        *,
        start: Tensor | None = None,
        beams: int = 1,
        length_penalty: float = 1.0,
        early_stopping: bool | str = False,
        **options: Any,
    ) -> Tensor:
        """Continue a batch of prompts, with a KV cache; on the CPU by one program a step where that pays.

        Args:
            ids: (B, T) int64 or int32, padded on the left where their lengths differ.
            start: (B,) integers; where each left-padded prompt begins. None: all are of one length.
            beams: more than 1 keeps so many texts and returns the likeliest, as transformers does; nothing is drawn,
                and temperature (but 0), top_k and top_p are refused.
            length_penalty: texts compare by log-probability over length to this power.
            early_stopping: True stops when `beams` texts have ended, False when no better one is likely, "never" when
                none is possible.
            options: max_new_tokens, temperature, top_k, top_p, stop (token ids) and seed, see SamplingParams. A
                sequence keeps the id that ended it and is filled up with the first of `stop`; each prompt has a stream
                of numbers from the seed.
        Returns:
            (B, T + new), dtype of ids; new ends where the last sequence did.
        Raises:
            TypeError: another option.
            ValueError: parameters out of range, or more tokens asked than block_size has room for.
        """
        own = ("start", "beams", "length_penalty", "early_stopping")
        params = SamplingParams.from_generate_options("generate", options, own)
        if beams == 1:
            return generate(self, ids, params, start)
        if drawn := [name for name in ("temperature", "top_k", "top_p") if options.get(name)]:
            raise ValueError(f"generate: got {drawn[0]} with beams {beams}, expected none: beam search draws nothing")
        count = check_prompt(self, ids, params.max_tokens, start)
        return beam_search(self, ids, beams, count=count, stop=params.stop_token_ids, length_penalty=length_penalty,
                           early_stopping=early_stopping, start=start)  # fmt: skip

    def stream(self, ids: Tensor, **options: Any) -> Iterator[int]:
        """Yield new token ids of one sequence, (1, T), as they come; ends before an id of `stop`. See `generate`."""
        return stream(self, ids, SamplingParams.from_generate_options("stream", options))

    def configure_optimizer(
        self,
        lr: float = 6e-4,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        max_norm: float | None = 1.0,
        dtype: torch.dtype | None = None,
    ) -> AdamW:
        """Build AdamW as GPT-3 was trained: matrices decay, biases and norms do not (arXiv:2005.14165, appendix B).

        Args:
            lr, betas, eps, weight_decay, max_norm: as in peakgpt.AdamW.
            dtype: the model is turned into this dtype, and what it was is the optimizer's float32 master.
        """
        groups = decay_groups(self, weight_decay)
        return AdamW(groups, lr, betas, eps, max_norm=max_norm, dtype=dtype)
