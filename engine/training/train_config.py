"""How to train: batch sizes, optimizer settings, precision."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from peakgpt.engine.model.recompute import parse
from peakgpt.engine.settings.setting import check_settings, setting
from peakgpt.kernels.command_line import MAX_SEED
from peakgpt.kernels.hardware.device import describe


@dataclass(kw_only=True, frozen=True)
class TrainConfig:
    """The settings of a training run that do not depend on its model or its data.

    Raises:
        ValueError: a value is out of range.
    """

    batch: int = setting(8, "sequences per update", section="training", at_least=1)
    tokens: int = setting(256, "tokens per sequence", section="training", at_least=1)
    micro_batch: int | None = setting(
        None, "sequences per pass; gradients are accumulated; none: the whole batch", section="training", at_least=1
    )
    steps: int = setting(
        1000, "updates", section="training", at_least=1, metavar="N", resumable=True
    )
    dtype: torch.dtype = setting(
        torch.float32, "of parameters, activations and gradients; bfloat16 has a float32 master", section="training",
        choices=("float32", "bfloat16"), automatic="bfloat16 if the device multiplies it in hardware",
    )  # fmt: skip
    recompute: str = setting(
        "none", "activations that backward recomputes: none, norm, mlp, block or block/N", section="training",
        metavar="PLAN",
    )  # fmt: skip
    fp8: bool = setting(False, "matrix products take 8-bit operands", section="training")
    seed: int = setting(
        1337, "of the initial weights and of the data order", section="training", at_least=0, at_most=MAX_SEED
    )
    lr: float = setting(1e-3, "peak learning rate", section="optimizer", above=0)
    weight_decay: float = setting(
        0.1, "decoupled decay of matrices; vectors (biases, norms) do not decay", section="optimizer", at_least=0,
        metavar="FACTOR",
    )  # fmt: skip
    betas: tuple[float, float] = setting(
        (0.9, 0.95), "of the moments, as in torch.optim.AdamW", section="optimizer", at_least=0, below=1, metavar="BETA"
    )
    eps: float = setting(1e-8, "as in torch.optim.AdamW", section="optimizer", above=0)
    max_norm: float = setting(1.0, "the norm of all gradients is clipped to this", section="optimizer", above=0)
    warmup: float = setting(
        0.05, "fraction of the updates over which the learning rate rises to its peak", section="lr_scheduler",
        at_least=0, below=1, metavar="FRACTION",
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_settings(self)
        if self.micro_batch is not None and self.micro_batch > self.batch:
            raise ValueError(
                f"TrainConfig: micro_batch is {self.micro_batch}, expected 1 to batch {self.batch}, or none"
            )
        parse(self.recompute)


def best_dtype(device: torch.device | str) -> torch.dtype:
    """Return bfloat16 if the device has matrix instructions for it, else float32."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float32
    native = {"avx512_bf16", "amx_bf16", "bf16"} & set(describe(device).arch.split())
    return torch.bfloat16 if native else torch.float32
