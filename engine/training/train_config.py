"""How to train: batch sizes, length, optimizer, learning rate, precision."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from peakgpt.engine.model.recompute import parse
from peakgpt.engine.settings.setting import check_settings, setting, settings_of
from peakgpt.engine.settings.values import show
from peakgpt.kernels.command_line import MAX_SEED
from peakgpt.kernels.hardware.device import describe
from peakgpt.kernels.ops.muon import ADJUST_LR, NS_COEFFICIENTS, NS_STEPS

WSD = {"schedule": ("wsd",)}
DECAY = {"schedule": ("linear", "cosine", "wsd")}  # the schedules that decay
OPTIMIZERS = ("adamw", "muon")
MUON = {"optimizer": ("muon",)}
SCHEDULES = ("constant", "linear", "cosine", "wsd")
DECAY_SHAPES = ("linear", "cosine", "sqrt")
MAX_TOKENS = 10**15


@dataclass(kw_only=True, frozen=True)
class TrainConfig:
    """The settings of a training run that do not depend on its model or its data.

    Raises:
        ValueError: a value is out of range, or two values contradict each other.
    """

    batch: int = setting(8, "sequences per update", section="training", at_least=1)
    tokens: int = setting(256, "tokens per sequence", section="training", at_least=1)
    micro_batch: int | None = setting(
        None, "sequences per pass; gradients are accumulated; none: the whole batch", section="training", at_least=1
    )
    steps: int | None = setting(
        None, "updates", section="training", at_least=1, metavar="N", resumable=True,
        automatic="1000", only_with={"max_tokens": (None,), "epochs": (None,)},
    )  # fmt: skip
    max_tokens: int | None = setting(
        None, "train for as many updates as fit into this many tokens", section="training", at_least=1,
        at_most=MAX_TOKENS, metavar="N",
    )  # fmt: skip
    epochs: float | None = setting(
        None, "train for as many updates as fit into this many passes over the tokens", section="training", above=0,
        metavar="N",
    )  # fmt: skip
    minutes: float | None = setting(
        None, "wall time of the run with all its resumes; it plans as many updates as fit, at most the run's length",
        section="training", above=0, resumable=True,
    )  # fmt: skip
    ramp_batch: int | None = setting(
        None, "sequences of the first updates; they rise to batch by ramp_tokens", section="training", at_least=1
    )
    ramp_tokens: int | None = setting(
        None, "tokens over which the batch rises from ramp_batch to batch, in steps of micro_batch or ramp_batch",
        section="training", at_least=1, at_most=MAX_TOKENS,
    )  # fmt: skip
    batch_stages: tuple[str, ...] | None = setting(
        None, "smaller batches before batch, such as 512:50000000000 1024:190000000000: 512 sequences per update until "
        "that many tokens, then 1024", section="training", metavar="SEQUENCES:TOKENS",
    )  # fmt: skip
    mask_documents: bool = setting(
        False, "tokens attend to their own document alone, and positions start anew in each", section="training"
    )
    dtype: torch.dtype = setting(
        torch.float32, "of parameters, activations and gradients; with bfloat16 there is a float32 copy of the weights",
        section="training", choices=("float32", "bfloat16"),
        automatic="bfloat16 if the device multiplies it in hardware",
    )  # fmt: skip
    recompute: str = setting(
        "none", "activations that backward recomputes: none, norm, mlp, block or block/N", section="training",
        metavar="PLAN",
    )  # fmt: skip
    fp8: bool = setting(False, "matrix products take 8-bit operands", section="training")
    seed: int = setting(
        1337, "seed of the initial weights and of the data order", section="training", at_least=0, at_most=MAX_SEED
    )
    optimizer: str = setting(
        "adamw", "muon: Muon for the weights of the linear layers in the blocks, AdamW for all other parameters",
        section="optimizer", choices=OPTIMIZERS,
    )  # fmt: skip
    lr: float = setting(1e-3, "peak learning rate", section="optimizer", above=0)
    matrix_lr: float | None = setting(
        None, "peak learning rate of Muon's matrices; lr keeps the schedule", section="optimizer", above=0,
        automatic="lr", only_with=MUON,
    )  # fmt: skip
    weight_decay: float = setting(
        0.1, "decoupled decay of matrices; vectors (biases, norms) do not decay", section="optimizer", at_least=0,
        metavar="FACTOR",
    )  # fmt: skip
    betas: tuple[float, float] = setting(
        (0.9, 0.95), "decay rates of the moments, as in torch.optim.AdamW", section="optimizer", at_least=0, below=1,
        metavar="BETA",
    )  # fmt: skip
    eps: float = setting(1e-8, "added to the denominator, as in torch.optim.AdamW", section="optimizer", above=0)
    momentum: float = setting(
        0.95, "decay rate of Muon's mean of gradients, as in torch.optim.Muon", section="optimizer", at_least=0,
        below=1, only_with=MUON,
    )  # fmt: skip
    nesterov: bool = setting(True, "Muon looks one step of its momentum ahead", section="optimizer", only_with=MUON)
    ns_steps: int = setting(
        NS_STEPS, "Newton-Schulz steps that make Muon's update orthogonal", section="optimizer", at_least=1,
        at_most=99, only_with=MUON,
    )  # fmt: skip
    ns_coefficients: tuple[float, float, float] = setting(
        NS_COEFFICIENTS, "coefficients of a Newton-Schulz step", section="optimizer", metavar="NUMBER", only_with=MUON
    )
    adjust_lr_fn: str = setting(
        "match_rms_adamw", "how the size of Muon's update depends on the shape of a matrix, as in torch.optim.Muon; "
        "match_rms_adamw: lr and weight_decay are AdamW's", section="optimizer", choices=tuple(ADJUST_LR),
        only_with=MUON,
    )  # fmt: skip
    max_norm: float = setting(1.0, "the norm of all gradients is clipped to this", section="optimizer", above=0)
    layerwise_lr_decay: float = setting(
        1.0, "factor on the learning rate from each layer to the one below it, down to the embeddings (ULMFiT: 0.385, "
        "which is 1 / 2.6)", section="optimizer", above=0, at_most=1, metavar="FACTOR",
    )  # fmt: skip
    gradual_unfreezing: float = setting(
        0.0, "share of the training in which layers begin to train one after the other, from the last one to the "
        "embeddings (ULMFiT); 0: all train from the start", section="optimizer", at_least=0, at_most=1,
        metavar="SHARE",
    )  # fmt: skip
    ema_decay: float | None = setting(
        None, "validate and save an exponential moving average of the weights, with this decay",
        section="optimizer", above=0, below=1, metavar="DECAY",
    )  # fmt: skip
    spike_sigma: float | None = setting(
        None, "a loss more than this many standard deviations above the mean of the last spike_window losses is a "
        "spike, which is rolled back", section="optimizer", above=0, metavar="N",
    )  # fmt: skip
    spike_window: int = setting(
        128, "number of losses whose mean and deviation define a spike", section="optimizer", at_least=2,
        metavar="STEPS",
    )  # fmt: skip
    spike_rollback: int = setting(
        100, "a spike continues from the last checkpoint at least this many updates before it", section="optimizer",
        at_least=1, metavar="STEPS",
    )  # fmt: skip
    spike_skip: int = setting(
        200, "batches to leave out after the batch of a spike", section="optimizer", at_least=0, metavar="BATCHES"
    )
    schedule: str = setting(
        "linear", "how the learning rate falls after its warmup; wsd: stable, then decay", section="lr_scheduler",
        choices=SCHEDULES,
    )  # fmt: skip
    warmup: float | None = setting(
        None, "fraction of the training over which the learning rate rises to lr", section="lr_scheduler", at_least=0,
        below=1, metavar="FRACTION", automatic="0.05",
        only_with={"warmup_steps": (None,), "warmup_tokens": (None,)},
    )  # fmt: skip
    warmup_steps: int | None = setting(
        None, "updates over which the learning rate rises to lr", section="lr_scheduler", at_least=0
    )
    warmup_tokens: int | None = setting(
        None, "tokens over which the learning rate rises to lr", section="lr_scheduler", at_least=0, at_most=MAX_TOKENS
    )
    decay_steps: int | None = setting(
        None, "updates, from the first one, after which the learning rate stays at its floor", section="lr_scheduler",
        at_least=1, automatic="the end of the training", only_with=DECAY,
    )  # fmt: skip
    decay_tokens: int | None = setting(
        None, "tokens, from the first one, after which the learning rate stays at its floor", section="lr_scheduler",
        at_least=1, at_most=MAX_TOKENS, automatic="the end of the training", only_with=DECAY,
    )  # fmt: skip
    decay_fraction: float | None = setting(
        None, "share of the training, up to the end of the decay, in which wsd decays", section="lr_scheduler",
        above=0, at_most=1, metavar="FRACTION", automatic="0.2", only_with=WSD,
    )  # fmt: skip
    decay_shape: str | None = setting(
        None, "how wsd decays", section="lr_scheduler", choices=DECAY_SHAPES, automatic="linear",
        only_with=WSD,
    )  # fmt: skip
    min_lr: float | None = setting(None, "floor of the decay", section="lr_scheduler", at_least=0, automatic="0")
    min_lr_fraction: float | None = setting(
        None, "floor of the decay, as a fraction of lr", section="lr_scheduler", at_least=0, at_most=1,
        metavar="FRACTION", automatic="0",
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_settings(self)
        for names in ALTERNATIVES:
            if len(given := self._given(names)) > 1:
                raise ValueError(f"TrainConfig: got {' and '.join(given)}, expected one of {', '.join(names)}")
        for names, holds, expected in REQUIREMENTS:
            if (given := self._given(names)) and not holds(self):
                got, wanted = show(getattr(self, given[0])), expected.format_map(vars(self))
                raise ValueError(f"TrainConfig: {given[0]} is {got}, expected {wanted}")
        parse(self.recompute)
        parse_stages(self.batch_stages or ())

    def _given(self, names: Iterable[str]) -> list[str]:
        """Return the settings that do not have their default."""
        return [s.name for s in settings_of(TrainConfig) if s.name in names and getattr(self, s.name) != s.default]


# Settings of which at most one can be given.
ALTERNATIVES = (
    ("steps", "max_tokens", "epochs"),
    ("warmup", "warmup_steps", "warmup_tokens"),
    ("decay_steps", "decay_tokens"),
    ("min_lr", "min_lr_fraction"),
    ("ramp_batch", "batch_stages"),
)
# (settings, condition without which they would have no effect or no meaning, the condition in words)
REQUIREMENTS: tuple[tuple[tuple[str, ...], Callable[[TrainConfig], bool], str], ...] = (
    (("micro_batch",), lambda c: c.micro_batch <= c.batch, "1 to batch {batch}, or none"),
    (("ramp_batch",), lambda c: c.ramp_batch < c.batch, "less than batch {batch}"),
    (("ramp_batch",), lambda c: c.ramp_tokens is not None, "ramp_tokens too"),
    (("ramp_tokens",), lambda c: c.ramp_batch is not None, "ramp_batch too"),
    (("decay_fraction", "decay_shape"), lambda c: c.schedule == "wsd", "schedule wsd"),
    (("decay_steps", "decay_tokens", "min_lr", "min_lr_fraction"), lambda c: c.schedule != "constant",
     "another schedule than constant, which has no decay"),
    (("min_lr",), lambda c: c.min_lr <= c.lr, "at most lr {lr}"),
    (("decay_steps",), lambda c: c.decay_steps > (c.warmup_steps or 0), "more than warmup_steps {warmup_steps}"),
    (("decay_tokens",), lambda c: c.decay_tokens > (c.warmup_tokens or 0), "more than warmup_tokens {warmup_tokens}"),
    (("matrix_lr", "momentum", "nesterov", "ns_steps", "ns_coefficients", "adjust_lr_fn"),
     lambda c: c.optimizer == "muon", "optimizer muon"),
    (("spike_window", "spike_rollback", "spike_skip"), lambda c: c.spike_sigma is not None, "spike_sigma too"),
)  # fmt: skip


def parse_stages(stages: Iterable[str]) -> list[tuple[int, int]]:
    """Read stages of the batch size.

    Args:
        stages: "512:50000000000" is 512 sequences per update until 50000000000 tokens.
    Returns:
        (sequences, tokens) of each stage.
    Raises:
        ValueError: a stage is not two positive integers, or does not end after the one before it.
    """
    parsed: list[tuple[int, int]] = []
    for stage in stages:
        match = re.fullmatch(r"0*([1-9]\d{0,8}):0*([1-9]\d{0,17})", stage, re.ASCII)
        if match is None or (parsed and int(match[2]) <= parsed[-1][1]):
            raise ValueError(
                f"TrainConfig: batch_stages has {stage!r}, expected SEQUENCES:TOKENS such as 512:50000000000, in the "
                "order of their tokens"
            )
        parsed.append((int(match[1]), int(match[2])))
    return parsed


def best_dtype(device: torch.device | str) -> torch.dtype:
    """Return bfloat16 if the device has matrix instructions for it, else float32."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float32
    native = {"avx512_bf16", "amx_bf16", "bf16"} & set(describe(device).arch.split())
    return torch.bfloat16 if native else torch.float32
