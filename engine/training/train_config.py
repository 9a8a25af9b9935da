"""How to train: batch sizes, optimizer settings, precision."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from peakgpt.engine.model.recompute import parse
from peakgpt.kernels.hardware.device import describe


@dataclass(kw_only=True, frozen=True)
class TrainConfig:
    """The settings of a training run that do not depend on its model or its data.

    Args:
        batch: sequences per update.
        tokens: tokens per sequence.
        micro_batch: sequences per forward and backward pass; their gradients are accumulated. None: the whole batch.
        lr: peak learning rate.
        warmup: fraction of all updates over which the learning rate rises to its peak.
        weight_decay: decoupled decay of matrices; vectors (biases, norms) do not decay.
        betas, eps: as in torch.optim.AdamW.
        max_norm: the global gradient norm is clipped to this.
        dtype: of parameters, activations and gradients: torch.float32, or torch.bfloat16 with a float32 master.
        recompute: which layers recompute their activations in backward; see engine/model/recompute.py.
        fp8: whether matrix products take 8-bit operands; see engine/model/fp8.py.
        seed: of the initial weights and of the data order.
    Raises:
        ValueError: a value is out of range.
    """

    batch: int = 8
    tokens: int = 256
    micro_batch: int | None = None
    lr: float = 1e-3
    warmup: float = 0.05
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    max_norm: float = 1.0
    dtype: torch.dtype = torch.float32
    recompute: str = "none"
    fp8: bool = False
    seed: int = 1337

    def __post_init__(self) -> None:
        for name in ("batch", "tokens", "lr", "eps", "max_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"TrainConfig: {name} is {getattr(self, name)}, expected a finite number above 0")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"TrainConfig: weight_decay is {self.weight_decay}, expected a finite number from 0")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"TrainConfig: betas are {self.betas}, expected numbers from 0 to below 1")
        if self.micro_batch is not None and not 0 < self.micro_batch <= self.batch:
            raise ValueError(
                f"TrainConfig: micro_batch is {self.micro_batch}, expected 1 to batch {self.batch}, or None"
            )
        if not 0 <= self.warmup < 1:
            raise ValueError(f"TrainConfig: warmup is {self.warmup}, expected a fraction from 0 to below 1")
        if self.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"TrainConfig: dtype is {self.dtype}, expected torch.float32 or torch.bfloat16")
        parse(self.recompute)


def best_dtype(device: torch.device | str) -> torch.dtype:
    """Return bfloat16 if the device has matrix instructions for it, else float32."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float32
    native = {"avx512_bf16", "amx_bf16", "bf16"} & set(describe(device).arch.split())
    return torch.bfloat16 if native else torch.float32
