"""The network of a GPT: embedding, blocks, head. `GPTConfig` chooses their variants. The defaults are GPT-2:

    x = wte[ids] + wpe      per block: x += attn(ln_1(x)), x += mlp(ln_2(x))      logits = ln_f(x) wte^T

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3. The parameters of every family
have the names of transformers' GPT-2; weights are in Linear layout, [out, in].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from peakgpt.engine.model.block import Block, Pass, run_blocks
from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.model.experts import balance_loss
from peakgpt.engine.model.fp8 import fp8_linear
from peakgpt.engine.model.kv_cache import AttentionCache, SequenceCache
from peakgpt.engine.model.lora import LoraConfig
from peakgpt.engine.model.norms import make_norm
from peakgpt.engine.model.plain import FORWARDS, fusable, has_own_call, is_plain, is_plain_embedding, run_linear
from peakgpt.engine.model.positions import Positions, left_padding_start, make_positions, packed_positions
from peakgpt.engine.model.quantized_linear import explain_backward
from peakgpt.engine.model.state_dicts import ModuleWithConv1D
from peakgpt.kernels.ops.dropout import dropout
from peakgpt.kernels.ops.embedding import embedding
from peakgpt.kernels.ops.linear import linear
from peakgpt.kernels.ops.linear_cross_entropy import IGNORE_INDEX, linear_cross_entropy
from peakgpt.kernels.ops.soft_cap import soft_cap

INIT_STD = 0.02  # GPT-2's initializer_range


@fusable
class Transformer(ModuleWithConv1D):
    """The network of a GPT: embedding, blocks and head. `peakgpt.GPT` adds loading, saving and generation."""

    def __init__(self, config: GPTConfig):
        """Build the network with GPT-2's random initialization, for every family, from torch's generator."""
        super().__init__()
        self.config, self.fp8 = config, False
        self.source_files: Mapping[str, Mapping[str, Any]] = {}  # JSON files of the folder that it was loaded from
        self.name_or_path, self.revision = "", None  # what it was loaded from: the base model of its adapters
        self.adapters: dict[str, LoraConfig] = {}  # by name; engine/model/lora.py
        self.active_adapter: str | None = None
        device = torch.get_default_device()
        with torch.device("meta"), _SkipInit():  # torch's own initialization takes seconds for GPT-2 and is overwritten
            self.transformer = nn.ModuleDict(_modules(config))
            if not config.tied_head:
                self.lm_head = nn.Linear(config.word_dim, config.vocab_size, bias=config.head_bias)
        # Not to_empty: on a meta tensor it imports sympy, which keeps 45 MiB.
        self._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device=device))
        if device.type != "meta":  # there normal_ would import torch._dynamo, which takes seconds
            self._initialize()

    @torch.no_grad()
    def _initialize(self) -> None:
        """Draw weights from N(0, 0.02^2); those that end a branch from N(0, 0.02^2 / (2 L)), section 2.3 of the paper.

        The weights of a head whose logits are scaled are divided by that scale: about 1 for PaLM, as in its section 2.
        """
        head = "transformer.wte.weight" if self.config.tied_head else "lm_head.weight"
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                parameter.normal_(0.0, INIT_STD * (2 * self.config.n_layer) ** -0.5)
            elif parameter.dim() >= 2 and not name.endswith("bias"):
                parameter.normal_(0.0, INIT_STD / (self.config.logit_scale if name == head else 1.0))
            else:
                # Vectors are biases, sinks, and weights of norms.
                parameter.fill_(0.0 if name.endswith(("bias", "sinks")) else 1.0 - self.config.norm_offset)

    def forward(
        self, input_ids: Tensor, targets: Tensor | None = None, attention_mask: Tensor | None = None,
        loss_weight: Tensor | None = None, *, return_logits: bool = False, cache: SequenceCache | None = None,
        start: Tensor | None = None, position_ids: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        """Compute the logits, or the loss if there are targets.

        In training mode the loss includes what the config adds: label_smoothing, z_loss and balance_loss.

        Args:
            input_ids: (B, T) int64 or int32.
            targets: (B, T), the next token of each position, already shifted; -100 is ignored.
            attention_mask: (B, T), zeros for padding on the left, then ones. No token attends to padding. None without
                padding.
            loss_weight: (B, T) float32, a factor on the loss of each target; the loss is then their sum. None gives the
                mean over the targets that are not ignored.
            return_logits: also return the logits when there are targets. This computes the product with the head once
                more, and stores the logits, which the loss alone does not.
            cache, start, position_ids: as in `hidden_states`; with `start`, attention_mask is None.
        Returns:
            Without targets the logits, (B, T, V). With targets the loss, a float32 scalar, or (loss, logits).
        Raises:
            ValueError: a tensor of a wrong shape or dtype, ids or targets out of range, more tokens than block_size, or
                an attention_mask that is not left padding or together with `start`, or position_ids together with
                one of them.
        """
        if attention_mask is not None:
            if position_ids is not None:
                raise ValueError("GPT: got attention_mask with position_ids, expected one of the two")
            if start is not None or cache is not None:
                raise ValueError("GPT: got attention_mask with start or cache, expected start alone")
            start = left_padding_start(attention_mask, input_ids)
        balance: list[Tensor] | None = [] if self.config.experts and self.training else None
        h = self.hidden_states(input_ids, cache, start, balance, position_ids)
        if targets is None:
            return self.compute_logits(h)
        logits = None if self._has_fusable_head else self.compute_logits(h)
        loss = self._loss_of(h, logits, targets, loss_weight)
        if balance:
            # With loss_weight the batch is a part of a larger one; scale the balance by the part's share of the loss.
            share = 1.0 if loss_weight is None else (loss_weight * (targets != IGNORE_INDEX)).sum()
            loss = loss + self.config.balance_loss * share * balance_loss(balance, self.config.balance_over)
        if not return_logits:
            return loss
        return loss, self.compute_logits(h) if logits is None else logits

    def compute_loss(self, h: Tensor, targets: Tensor, loss_weight: Tensor | None = None) -> Tensor:
        """Compute the loss of hidden states, (B, T, C), without balance_loss; see `forward`."""
        logits = None if self._has_fusable_head else self.compute_logits(h)
        return self._loss_of(h, logits, targets, loss_weight)

    def _loss_of(self, h: Tensor, logits: Tensor | None, targets: Tensor, weight: Tensor | None) -> Tensor:
        """Compute the loss of hidden states, or of their logits if the fused loss does not support the head."""
        loss = self._fused_loss(h, targets, weight) if logits is None else self._loss(logits, targets, weight)
        is_without_gradients = not loss.requires_grad and torch.is_grad_enabled()
        return explain_backward(self, loss) if is_without_gradients else loss

    def _fused_loss(self, h: Tensor, targets: Tensor, weight: Tensor | None) -> Tensor:
        """Compute the cross entropy of hidden states (B, T, C), in training mode with label smoothing and z-loss."""
        return linear_cross_entropy(
            h, self._head_weight, targets, weight, reduction="mean" if weight is None else "sum",
            label_smoothing=self.config.label_smoothing if self.training else 0.0,
            z_loss=self.config.z_loss if self.training else 0.0, softcap=self.config.logit_softcap,
        )  # fmt: skip

    def _loss(self, logits: Tensor, targets: Tensor, weight: Tensor | None) -> Tensor:
        """Compute the same of logits, (B, T, V), for a head that the fused loss does not support."""
        z_loss = self.config.z_loss if self.training else 0.0
        label_smoothing = self.config.label_smoothing if self.training else 0.0
        logits = logits.flatten(0, 1).float()
        loss = F.cross_entropy(
            logits, targets.flatten(), reduction="mean" if weight is None else "none", label_smoothing=label_smoothing
        )
        loss = loss if weight is None else (loss * weight.flatten()).sum()
        return loss if z_loss == 0.0 else loss + z_loss * _mean_square_lse(logits, targets, weight)

    def hidden_states(
        self, input_ids: Tensor, cache: SequenceCache | None = None, start: Tensor | None = None,
        balance: list[Tensor] | None = None, position_ids: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Compute the hidden states of a batch of sequences after the last norm: the input of `compute_logits`.

        Args:
            input_ids: (B, T) int64 or int32.
            cache: KV cache of the tokens before input_ids, which is extended by them; turns dropout off.
            start: (B,) integers, first token of each left-padded sequence, counted from the first token of the cache.
            balance: how each layer uses its experts is appended, (2, E) float32: see `balance_loss` of experts.py.
            position_ids: (B, T) integers, position of each token in its document. A document starts at each 0, and with
                each row; its tokens attend to it alone. None: each row is one document.
        Returns:
            (B, T, C)
        Raises:
            ValueError: ids of a wrong shape or dtype, out of range, or more tokens than block_size, or position_ids
                of another shape, with `cache` or `start`, or for a model with relative positions; or a text with
                cached keys becomes longer than GPTConfig.switch_length.
        """
        past = 0 if cache is None else cache.length
        if input_ids.dim() != 2 or past + input_ids.shape[1] > self.config.block_size:
            raise ValueError(
                f"GPT: ids have shape {tuple(input_ids.shape)} after {past} tokens, "
                f"expected (B, T) with at most block_size {self.config.block_size} tokens in all"
            )
        tokens = input_ids.shape[1]
        if position_ids is None:
            text_tokens = 0 if cache is None else cache.text_tokens
            positions = make_positions(self.config, past, tokens, start, input_ids.device, text_tokens)
            return self._run(input_ids, past, start, positions, cache, balance)
        if position_ids.shape != input_ids.shape or start is not None or cache is not None:
            raise ValueError(
                f"GPT: position_ids have shape {tuple(position_ids.shape)} for ids {tuple(input_ids.shape)}, expected "
                "the same shape, and no cache or start"
            )
        positions = packed_positions(self.config, position_ids)
        h = self._run(input_ids.flatten()[None], position_ids.flatten(), None, positions, None, balance)
        return h.view(*input_ids.shape, -1)

    def _run(
        self, input_ids: Tensor, past: int | Tensor, start: Tensor | None, positions: Positions,
        cache: SequenceCache | None, balance: list[Tensor] | None,
    ) -> Tensor:  # fmt: skip
        """Run the network on (B, T) ids; `past` is the first position, or all positions, (T,)."""
        x = self._embed(input_ids, past, start)  # (B, T, C)
        if self.training and self.config.embedding_dropout and cache is None:
            x = dropout(x, p=self.config.embedding_dropout)
        h = self._run_blocks(x, positions, cache, balance)
        if cache is not None:
            cache.length += input_ids.shape[1]
        return h

    def packed_hidden_states(
        self, input_ids: Tensor, position_ids: Tensor, positions: Positions, cache: AttentionCache
    ) -> Tensor:
        """Compute the hidden states of tokens of several sequences, packed along one axis.

        Args:
            input_ids: (N,) int64 or int32.
            position_ids: (N,) integers, position of each token in its sequence.
            positions: the positions as attention needs them.
            cache: KV cache that knows the sequence of each token.
        Returns:
            (N, C), after the last norm.
        """
        return self._run_blocks(self._embed(input_ids[None], position_ids, None), positions, cache)[0]

    @property
    def device(self) -> torch.device:
        """The device of the first parameter."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first parameter."""
        return next(self.parameters()).dtype

    def last_logits(
        self, input_ids: Tensor, cache: SequenceCache, start: Tensor | None = None, count: int = 1
    ) -> Tensor:
        """Compute the logits of the last `count` tokens, (B, count, V): by `forward` if it was hooked or replaced.

        Args:
            input_ids, cache, start: as in `hidden_states`.
        """
        first = input_ids.shape[1] - count
        if has_own_call(self) or type(self).forward is not FORWARDS[Transformer]:
            return self(input_ids, cache=cache, start=start)[:, first:]
        return self.compute_logits(self.hidden_states(input_ids, cache, start)[:, first:])

    def compute_logits(self, h: Tensor) -> Tensor:
        """Compute the logits, (..., V), of hidden states, (..., C)."""
        product, head = fp8_linear if self._has_fp8_head else linear, self._modules.get("lm_head")
        logits = product(h, self._head_weight) if head is None else run_linear(head, h, product)
        return soft_cap(logits, self.config.logit_softcap)

    def _run_blocks(
        self, x: Tensor, positions: Positions, cache: AttentionCache | None, balance: list[Tensor] | None = None
    ) -> Tensor:
        """Run all blocks and the last norm on the embedding, (B, T, C)."""
        t = self.transformer
        if cache is not None and len(t.h) > self.config.n_layer:
            raise ValueError(f"GPT: got {len(t.h)} blocks, expected at most n_layer {self.config.n_layer} with a cache")
        h = run_blocks(t.h, x, t._modules.get("ln_f"), Pass(cache, positions, balance))
        h = run_linear(t.project_out, h) if "project_out" in t else h
        return h if self.config.logit_scale == 1.0 else h * self.config.logit_scale

    def _embed(self, input_ids: Tensor, past: int | Tensor, start: Tensor | None) -> Tensor:
        """Embed tokens, (B, T, C), without dropout; `past` is the first position, or all positions, (T,)."""
        t = self.transformer
        wpe = t._modules.get("wpe")
        if self.config.position_offset:
            past = past + self.config.position_offset
        fused = is_plain_embedding(t.wte) and (wpe is None or is_plain_embedding(wpe))
        if fused and start is None and "project_in" not in t:
            table = None if wpe is None else wpe.weight
            position_ids = past[None] if wpe is not None and isinstance(past, Tensor) else None
            first = past if isinstance(past, int) else 0
            x = _scaled(embedding(input_ids, t.wte.weight, table, position_ids, start=first), self.config)
        else:
            x = _scaled(_look_up(t.wte, input_ids), self.config)
            x = run_linear(t.project_in, x) if "project_in" in t else x
            x = x if wpe is None else x + _position_embedding(wpe, past, input_ids, start)
        return t.ln_emb(x) if "ln_emb" in t else x

    @property
    def _has_fp8_head(self) -> bool:
        return self.fp8 and self.training

    @property
    def _has_fusable_head(self) -> bool:
        head = self._modules.get("lm_head")
        return not self._has_fp8_head and (head is None or (is_plain(head, nn.Linear) and head.bias is None))

    @property
    def _head_weight(self) -> Tensor:
        return (self._modules.get("lm_head") or self.transformer.wte).weight


class _SkipInit(TorchFunctionMode):
    """Skip torch.nn.init: on the meta device it imports the compiler, which takes seconds and 130 MiB."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"]
        return function(*args, **kwargs)


def _modules(config: GPTConfig) -> dict[str, nn.Module]:
    """Build the modules between token ids and head that the config has, by GPT-2's names."""
    modules: dict[str, nn.Module] = {"wte": _make_embedding(config.vocab_size, config.word_dim)}
    if config.position == "learned":
        modules["wpe"] = _make_embedding(config.position_offset + config.block_size, config.n_embd)
    if config.word_dim != config.n_embd:
        modules["project_in"] = nn.Linear(config.word_dim, config.n_embd, bias=False)
        modules["project_out"] = nn.Linear(config.n_embd, config.word_dim, bias=False)
    if config.embedding_norm:
        modules["ln_emb"] = make_norm(config)
    modules["h"] = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
    if config.residual != "post_norm":
        modules["ln_f"] = make_norm(config)
    return modules


def _make_embedding(rows: int, width: int) -> nn.Embedding:
    """Build an embedding without torch's initialization: on the meta device it imports torch._dynamo, 145 MiB."""
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)


def _look_up(table: nn.Module, ids: Tensor) -> Tensor:
    """Look up rows of an embedding, (..., C): by the fused op, or by the module's own forward if it is not plain."""
    return embedding(ids, table.weight) if is_plain_embedding(table) else table(ids)


def _scaled(x: Tensor, config: GPTConfig) -> Tensor:
    """Multiply a token embedding by embedding_scale, rounded to the dtype of x as Gemma's was in training."""
    if config.embedding_scale == 1.0:
        return x
    return x * torch.tensor(config.embedding_scale, dtype=x.dtype, device="cpu")  # a scalar: no copy to the device


def _position_embedding(table: nn.Module, past: int | Tensor, input_ids: Tensor, start: Tensor | None) -> Tensor:
    """Look up the learned position embedding, (1, T, C), or (B, T, C) of left-padded sequences.

    Args:
        table: the position embedding.
        past: row of the first token, or the row of each token, (T,).
        input_ids: (B, T).
        start: (B,) padding tokens before each left-padded sequence: token t takes row past + t - start. Padding takes
            any row, since no token attends to it.
    """
    if isinstance(past, Tensor):
        return _look_up(table, past[None])
    position_ids = torch.arange(past, past + input_ids.shape[1], device=input_ids.device)[None]
    return _look_up(table, position_ids if start is None else (position_ids - start[:, None]).clamp(min=0))


def _mean_square_lse(logits: Tensor, targets: Tensor, weight: Tensor | None) -> Tensor:
    """Return the mean of logsumexp^2 of (N, V) logits over the targets that count, or the weighted sum."""
    counts = targets.flatten() != IGNORE_INDEX
    share = counts / counts.sum() if weight is None else counts * weight.flatten()
    return (share * logits.logsumexp(-1).square()).sum()
