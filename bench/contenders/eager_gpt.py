"""The PyTorch eager baseline: GPT-2 in plain torch, and its training step.

SDPA attention, one qkv projection, F.gelu, F.cross_entropy over the flattened logits, torch's fused AdamW, gradient
clipping by torch, bf16 by autocast over float32 parameters. Parameters have the names of peakgpt.GPT, so that both
load one state dict. Structure after GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners").
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.training.optimizer import decay_groups
from peakgpt.engine.training.schedule import Schedule
from peakgpt.engine.training.train_config import TrainConfig


def is_gpt2(config: GPTConfig) -> bool:
    """Return whether a model is GPT-2 of any size: all that this file computes."""
    sizes = {name: getattr(config, name) for name in ("n_layer", "n_head", "n_embd", "n_inner", "head_dim",
             "block_size", "vocab_size", "layer_norm_epsilon")}  # fmt: skip
    return config == GPTConfig(**sizes)


class Attention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head, width = config.n_head, config.n_head * config.head_dim
        self.c_attn = nn.Linear(config.n_embd, 3 * width)
        self.c_proj = nn.Linear(width, config.n_embd)

    def forward(self, x: Tensor, past: list[Tensor] | None = None) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for t in self.c_attn(x).chunk(3, -1))
        if past is not None:
            past[:] = [torch.cat((old, new), 2) for old, new in zip(past, (k, v), strict=True)] if past else [k, v]
            k, v = past
        y = F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1)  # (B, H, T, D)
        return self.c_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, config.n_inner)
        self.c_proj = nn.Linear(config.n_inner, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, past: list[Tensor] | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), past)
        return x + self.mlp(self.ln_2(x))


class EagerGPT(nn.Module):
    """GPT-2 in plain torch: ids (B, T) -> logits (B, T, V), or the mean loss if targets are given."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                "ln_f": nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon),
            }
        )

    def forward(self, ids: Tensor, targets: Tensor | None = None, past: list[list[Tensor]] | None = None) -> Tensor:
        start = past[0][0].shape[2] if past and past[0] else 0
        positions = torch.arange(start, start + ids.shape[1], device=ids.device)
        x = self.transformer["wte"](ids) + self.transformer["wpe"](positions)  # (B, T, C)
        for block, cache in zip(self.transformer["h"], past or [None] * self.config.n_layer, strict=True):
            x = block(x, cache)
        x = self.transformer["ln_f"](x)
        if targets is None:
            return F.linear(x[:, -1:] if past else x, self.transformer["wte"].weight)
        logits = F.linear(x, self.transformer["wte"].weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)

    @torch.no_grad()
    def generate(self, ids: Tensor, count: int) -> Tensor:
        """Decode greedily with a KV cache that grows by concatenation: (B, T) -> (B, T + count)."""
        past: list[list[Tensor]] = [[] for _ in range(self.config.n_layer)]
        step = ids
        for _ in range(count):
            step = self(step, past=past)[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat((ids, step), 1)
        return ids


class EagerTrainer:
    """The training step of peakgpt's Trainer in plain torch: fused AdamW, autocast, torch's clipping."""

    def __init__(self, model: nn.Module, train_config: TrainConfig, *, steps: int):
        self.model, self.train_config, self.steps, self.done = model, train_config, steps, 0
        self.schedule = Schedule(train_config)
        groups = decay_groups(model, train_config.weight_decay)
        self.optimizer = torch.optim.AdamW(
            groups, lr=train_config.lr, betas=train_config.betas, eps=train_config.eps, fused=True
        )

    def step(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Make one update and return the mean loss, detached."""
        self.optimizer.zero_grad(set_to_none=True)
        half = self.train_config.dtype != torch.float32
        with torch.autocast(ids.device.type, self.train_config.dtype, enabled=half):
            loss = self.model(ids, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.train_config.max_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.lr(self.done, self.steps)
        self.optimizer.step()
        self.done += 1
        return loss.detach()
