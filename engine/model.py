"""GPT: token and position embedding, L pre-norm blocks, a final norm, the embedding again as the head.

    x = wte[ids] + wpe      per block: x += attn(ln_1(x)), x += mlp(ln_2(x))      logits = ln_f(x) wte^T

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3. Parameters have the names
of transformers' GPT-2, weights the Linear layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from peakgpt.engine import checkpoint
from peakgpt.engine.cache import KVCache
from peakgpt.engine.config import GPTConfig
from peakgpt.engine.generate import generate, stream
from peakgpt.engine.layers import Block, Conv1DLoading, LayerNorm
from peakgpt.engine.optim import AdamW, decay_groups
from peakgpt.engine.presets import preset
from peakgpt.kernels.embedding import embedding
from peakgpt.kernels.linear import linear
from peakgpt.kernels.linear_cross_entropy import linear_cross_entropy

if TYPE_CHECKING:
    from peakgpt.engine.tokenizer import Tokenizer

INIT_STD = 0.02  # GPT-2's initializer_range


class _SkipInit(TorchFunctionMode):
    """Leave out torch.nn.init: on the meta device it imports the compiler, at seconds and 130 MiB."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"]
        return function(*args, **kwargs)


class GPT(Conv1DLoading):
    """A GPT language model on fused ops."""

    def __init__(self, config: GPTConfig):
        """Build with GPT-2's random initialisation, drawn from torch's generator."""
        super().__init__()
        self.config = config
        device = torch.get_default_device()
        with torch.device("meta"), _SkipInit():  # torch's own initialisation would be thrown away, at seconds for GPT-2
            self.transformer = nn.ModuleDict(
                {
                    "wte": _embedding(config.vocab_size, config.n_embd),
                    "wpe": _embedding(config.block_size, config.n_embd),
                    "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                    "ln_f": LayerNorm(config.n_embd, config.layer_norm_epsilon, config.bias),
                }
            )
        # Not to_empty: of a meta tensor it imports sympy, 45 MiB for good.
        self._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device=device))
        self._initialise()

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> GPT:
        """Build a known model with random weights.

        Args:
            name: "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl" or "gpt2-tiny".
            changes: GPTConfig fields that replace the preset's.
        Raises:
            ValueError: an unknown name or field, or sizes that do not fit each other.
        """
        return cls(preset(name, **changes))

    @classmethod
    def from_pretrained(
        cls, folder: Path | str, *, dtype: torch.dtype = torch.float32, dropout: float | None = None
    ) -> GPT:
        """Load a checkpoint in the Hugging Face GPT-2 layout, in evaluation mode as transformers does.

        Args:
            folder: with config.json and model.safetensors (or its shards, or pytorch_model.bin).
            dtype: of the parameters.
            dropout: replaces the checkpoint's rate.
        Raises:
            ValueError: a missing, damaged or foreign checkpoint; the message names file and tensor.
        """
        config = checkpoint.read_config(folder, dropout=dropout)
        with torch.device("meta"):
            model = cls(config)
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        model.load_state_dict(checkpoint.read_weights(folder, config, shapes, dtype), assign=True)
        return model.eval()

    def save_pretrained(
        self, folder: Path | str, tokenizer: Tokenizer | None = None, *, weights: Mapping[str, Tensor] | None = None
    ) -> None:
        """Save in the Hugging Face GPT-2 layout; an interrupted write leaves what was there.

        Args:
            folder: made where it is not there.
            tokenizer: saved beside the model; anything with `save(folder)` and `end_id`.
            weights: replaces the model's own tensors by name, as from AdamW.master_weights.
        Raises:
            ValueError: a config that the layout has no room for.
            OSError: the folder can not be written.
        """
        checkpoint.write_model(folder, self.config, {**self.state_dict(), **(weights or {})}, tokenizer)

    @torch.no_grad()
    def _initialise(self) -> None:
        """Normal weights of deviation 0.02; what ends a branch is scaled by 1 / sqrt(2 L), section 2.3 of the paper."""
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                parameter.normal_(0.0, INIT_STD * (2 * self.config.n_layer) ** -0.5)
            elif parameter.dim() >= 2:
                parameter.normal_(0.0, INIT_STD)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)  # the vectors are biases and norms' weights

    def features(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """Compute what the head reads.

        Args:
            ids: (B, T) int64 or int32.
            cache: the tokens before ids; it is extended by ids, and nothing is dropped out.
        Returns:
            (B, T, C), after the final norm.
        Raises:
            ValueError: ids of a wrong shape or dtype, out of range, or longer than block_size.
        """
        start = 0 if cache is None else cache.length
        if ids.dim() != 2 or start + ids.shape[1] > self.config.block_size:
            raise ValueError(
                f"GPT: ids have shape {tuple(ids.shape)} after {start} tokens, "
                f"expected (B, T) with at most block_size {self.config.block_size} tokens in all"
            )
        t = self.transformer
        x = embedding(ids, t.wte.weight, t.wpe.weight, start=start)  # (B, T, C)
        if self.training and self.config.dropout and cache is None:
            x = F.dropout(x, self.config.dropout)
        h = t.h[0].ln_1(x)
        next_norms = [*(block.ln_1 for block in t.h[1:]), t.ln_f]
        for layer, (block, next_norm) in enumerate(zip(t.h, next_norms, strict=True)):
            x, h = block(x, h, next_norm, cache, layer)
        if cache is not None:
            cache.length += ids.shape[1]
        return h

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> Tensor:
        """Compute logits, or the mean loss where targets are given.

        Args:
            ids: (B, T) int64 or int32.
            targets: (B, T) the token that follows each one, already shifted; -100 does not count.
        Returns:
            (B, T, V) logits, or a float32 scalar.
        Raises:
            ValueError: ids or targets of a wrong shape or dtype, out of range, or longer than block_size.
        """
        h = self.features(ids)
        if targets is None:
            return self.head(h)
        return linear_cross_entropy(h, self.transformer.wte.weight, targets)

    def head(self, h: Tensor) -> Tensor:
        """Logits (..., V) of features (..., C), by the tied embedding."""
        return linear(h, self.transformer.wte.weight)

    def generate(
        self,
        ids: Tensor,
        *,
        max_new_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: Sequence[int] = (),
    ) -> Tensor:
        """Continue a batch of equally long prompts, with a KV cache.

        Args:
            ids: (B, T) int64 or int32.
            max_new_tokens: at most this many are added; None means up to block_size.
            temperature: 0 is greedy, and top_k and top_p do not matter.
            top_k, top_p: choose among the k likeliest, among the fewest that reach p.
            seed: of the choice; torch's generator where None.
            stop: ids that end a sequence; it keeps the one that did and is filled up with the first of `stop`.
        Returns:
            (B, T + new), dtype of ids; new ends where the last sequence did.
        Raises:
            ValueError: parameters out of range, or more tokens asked than block_size has room for.
        """
        return generate(
            self, ids, stop=stop, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
            seed=seed,
        )  # fmt: skip

    def stream(
        self,
        ids: Tensor,
        *,
        max_new_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: Sequence[int] = (),
    ) -> Iterator[int]:
        """Yield new token ids of one sequence, (1, T), as they come; ends before an id of `stop`. See `generate`."""
        return stream(
            self, ids, stop=stop, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
            seed=seed,
        )  # fmt: skip

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


def _embedding(rows: int, width: int) -> nn.Embedding:
    """Without torch's initialisation: on the meta device its normal_ imports torch._dynamo, 145 MiB for good."""
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)
