"""GPT: an embedding, L blocks, a head; which ones, the config says. GPT-2's, the defaults:

    x = wte[ids] + wpe      per block: x += attn(ln_1(x)), x += mlp(ln_2(x))      logits = ln_f(x) wte^T

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3. Parameters of every family
have the names of transformers' GPT-2, weights the Linear layout.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.model.fp8 import fp8_linear
from peakgpt.engine.model.kv_cache import AttentionCache, SequenceCache
from peakgpt.engine.model.layers import Block, Conv1DLoading, norm
from peakgpt.engine.model.positions import Positions, positions
from peakgpt.engine.model.quantized import QuantizedLinear
from peakgpt.kernels.ops.dropout import dropout
from peakgpt.kernels.ops.embedding import embedding
from peakgpt.kernels.ops.linear import linear
from peakgpt.kernels.ops.linear_cross_entropy import linear_cross_entropy

INIT_STD = 0.02  # GPT-2's initializer_range


class _SkipInit(TorchFunctionMode):
    """Leave out torch.nn.init: on the meta device it imports the compiler, at seconds and 130 MiB."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"]
        return function(*args, **kwargs)


class Transformer(Conv1DLoading):
    """The network of a GPT: embedding, blocks and head. `peakgpt.GPT` adds loading, saving and generation."""

    def __init__(self, config: GPTConfig):
        """Build with GPT-2's random initialisation, whatever the family, drawn from torch's generator."""
        super().__init__()
        self.config, self.fp8 = config, False
        device = torch.get_default_device()
        with torch.device("meta"), _SkipInit():  # torch's own initialisation would be thrown away, at seconds for GPT-2
            self.transformer = nn.ModuleDict(_parts(config))
            if not config.tied_head:
                self.lm_head = nn.Linear(config.word_dim, config.vocab_size, bias=config.head_bias)
        # Not to_empty: of a meta tensor it imports sympy, 45 MiB for good.
        self._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device=device))
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        """Normal weights of deviation 0.02; what ends a branch is scaled by 1 / sqrt(2 L), section 2.3 of the paper.

        Weights of a head whose logits are scaled are larger by as much, about 1 for PaLM, as its section 2 has them.
        """
        head = "transformer.wte.weight" if self.config.tied_head else "lm_head.weight"
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                parameter.normal_(0.0, INIT_STD * (2 * self.config.n_layer) ** -0.5)
            elif parameter.dim() >= 2:
                parameter.normal_(0.0, INIT_STD / (self.config.logit_scale if name == head else 1.0))
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)  # the vectors are biases and norms' weights

    def features(
        self, ids: Tensor, cache: SequenceCache | None = None, start: Tensor | None = None,
        balance: list[Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """Compute what the head reads.

        Args:
            ids: (B, T) int64 or int32.
            cache: the tokens before ids; it is extended by ids, and nothing is dropped out.
            start: (B,) integers; where each left-padded sequence begins, counted from the cache's first token.
            balance: gets the balance of each layer that has experts, float32 scalars.
        Returns:
            (B, T, C), after the last norm.
        Raises:
            ValueError: ids of a wrong shape or dtype, out of range, or longer than block_size.
        """
        past = 0 if cache is None else cache.length
        if ids.dim() != 2 or past + ids.shape[1] > self.config.block_size:
            raise ValueError(
                f"GPT: ids have shape {tuple(ids.shape)} after {past} tokens, "
                f"expected (B, T) with at most block_size {self.config.block_size} tokens in all"
            )
        x = self._embed(ids, past, start)  # (B, T, C)
        if self.training and self.config.embedding_dropout and cache is None:
            x = dropout(x, p=self.config.embedding_dropout)
        h = self._blocks(x, positions(self.config, past, ids.shape[1], start, x.device), cache, balance)
        if cache is not None:
            cache.length += ids.shape[1]
        return h

    def rows(self, ids: Tensor, places: Tensor, where: Positions, cache: AttentionCache) -> Tensor:
        """Compute what the head reads for tokens of any number of texts, one after the other.

        Args:
            ids: (N,) int64 or int32.
            places: (N,) integers, where each token stands in its text.
            where: the same, for attention.
            cache: knows whose each token is.
        Returns:
            (N, C), after the last norm.
        """
        return self._blocks(self._embed(ids[None], places, None), where, cache)[0]

    def _blocks(
        self, x: Tensor, where: Positions, cache: AttentionCache | None, balance: list[Tensor] | None = None
    ) -> Tensor:  # fmt: skip
        """From the embedding, (B, T, C), to what the head reads."""
        t, after = self.transformer, self.config.residual == "post_norm"
        h = x if after else t.h[0].ln_1(x)
        next_norms = [*(block.ln_1 for block in t.h[1:]), None if after else t.ln_f]
        for block, next_norm in zip(t.h, next_norms, strict=True):
            x, h = block(x, h, next_norm, cache, where, balance)
        h = linear(h, t.project_out.weight) if "project_out" in t else h
        return h if self.config.logit_scale == 1.0 else h * self.config.logit_scale

    def _embed(self, ids: Tensor, past: int | Tensor, start: Tensor | None) -> Tensor:
        """What the first block reads, (B, T, C), before dropout; `past` may be the place of each token, (T,)."""
        t = self.transformer
        table = t.wpe.weight if "wpe" in t else None
        if self.config.position_offset:
            past = past + self.config.position_offset
        if start is None and "project_in" not in t:
            places = past[None] if table is not None and isinstance(past, Tensor) else None
            x = embedding(ids, t.wte.weight, table, places, start=past if isinstance(past, int) else 0)
        else:
            x = embedding(ids, t.wte.weight)
            x = linear(x, t.project_in.weight) if "project_in" in t else x
            x = x if table is None else x + _position_rows(table, past, ids.shape[1], start)
        return t.ln_emb(x) if "ln_emb" in t else x

    def forward(
        self,
        ids: Tensor,
        targets: Tensor | None = None,
        start: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        """Compute logits, or the mean loss where targets are given, while training with what the config adds to it.

        Args:
            ids: (B, T) int64 or int32.
            targets: (B, T) the token that follows each one, already shifted; -100 does not count.
            start: (B,) integers; where each left-padded sequence begins. Nothing attends to what is before.
            weight: (B, T) float32, a factor on each target's loss, of which the sum is then returned.
        Returns:
            (B, T, V) logits, or a float32 scalar.
        Raises:
            ValueError: ids or targets of a wrong shape or dtype, out of range, or longer than block_size.
        """
        balance: list[Tensor] | None = [] if self.config.experts and self.training else None
        h = self.features(ids, start=start, balance=balance)
        if targets is None:
            return self.head(h)
        z_loss = self.config.z_loss if self.training else 0.0
        if self.config.head_bias or self._quantized_head or self._fp8_head:  # linear_cross_entropy takes none of them
            logits = self.head(h).flatten(0, 1).float()
            loss = F.cross_entropy(logits, targets.flatten(), reduction="mean" if weight is None else "none")
            loss = loss if weight is None else (loss * weight.flatten()).sum()
            loss = loss if z_loss == 0.0 else loss + z_loss * _mean_square_lse(logits, targets, weight)
        else:
            reduction = "mean" if weight is None else "sum"
            loss = linear_cross_entropy(h, self._head_weight, targets, weight, reduction=reduction, z_loss=z_loss)
        if not balance:
            return loss
        share = 1.0 if weight is None else (weight * (targets != -100)).sum()  # of a batch that comes in parts
        return loss + self.config.balance_loss * share * sum(balance)

    def head(self, h: Tensor) -> Tensor:
        """Logits (..., V) of features (..., C), by the tied embedding or a head of its own."""
        if self._quantized_head:
            return self.lm_head(h)
        product = fp8_linear if self._fp8_head else linear
        return product(h, self._head_weight, self.lm_head.bias if self.config.head_bias else None)

    @property
    def _fp8_head(self) -> bool:
        return self.fp8 and self.training

    @property
    def _quantized_head(self) -> bool:
        return isinstance(self._modules.get("lm_head"), QuantizedLinear)

    @property
    def _head_weight(self) -> Tensor:
        return self.transformer.wte.weight if self.config.tied_head else self.lm_head.weight


def _mean_square_lse(logits: Tensor, targets: Tensor, weight: Tensor | None) -> Tensor:
    """(log sum exp)^2 of (N, V) logits over the targets that count, or their weighted sum."""
    live = targets.flatten() != -100
    share = live / live.sum() if weight is None else live * weight.flatten()
    return (share * logits.logsumexp(-1).square()).sum()


def _embedding(rows: int, width: int) -> nn.Embedding:
    """Without torch's initialisation: on the meta device its normal_ imports torch._dynamo, 145 MiB for good."""
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)


def _parts(config: GPTConfig) -> dict[str, nn.Module]:
    """The modules between ids and head, with GPT-2's names; only those that the config has."""
    parts: dict[str, nn.Module] = {"wte": _embedding(config.vocab_size, config.word_dim)}
    if config.position == "learned":
        parts["wpe"] = _embedding(config.position_offset + config.block_size, config.n_embd)
    if config.word_dim != config.n_embd:
        parts["project_in"] = nn.Linear(config.word_dim, config.n_embd, bias=False)
        parts["project_out"] = nn.Linear(config.n_embd, config.word_dim, bias=False)
    if config.embedding_norm:
        parts["ln_emb"] = norm(config)
    parts["h"] = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
    if config.residual != "post_norm":
        parts["ln_f"] = norm(config)
    return parts


def _position_rows(table: Tensor, first: int | Tensor, tokens: int, start: Tensor | None) -> Tensor:
    """Rows of the position table, (T, C), or (B, T, C) where sequences are padded: the first token takes row `first`.

    What is padding takes any row: nothing attends to it. `first` may be the row of each token, (T,).
    """
    if isinstance(first, Tensor):
        return embedding(first[None], table)
    rows = table[first : first + tokens]
    if start is None:
        return rows
    steps = torch.arange(first, first + tokens, device=table.device) - start[:, None]
    return embedding(steps.clamp(min=0), table)
