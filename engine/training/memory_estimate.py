"""Predict the memory of training a GPT, and refuse what cannot fit before anything is loaded.

P parameters, N = tokens of one forward pass, s = bytes of the dtype, 4 or 2. Of a step stay in memory, in bytes:

    weights            P s
    gradients          P s
    optimizer          P (8 + r)             two float32 moments; r = 2: the low half of the float32 master of bfloat16;
                       4 less with Muon for each weight of its matrices, which have one moment
    average            P 4                   with ema_decay
    checkpoint copy    P 12                  float32 weights and moments, while a thread writes them; on a CPU
    orthogonal update  M (4 + 2 s)           of Muon's largest matrix, M values, on a CPU; on a GPU of all matrices of
                                             its shape, and no more than 2^26 values at a time in products
    activations        N s sum_l a_l         what backward reads of layer l, below
    one more layer     N s a_max             what backward computes of one layer at a time
    logits             a block of them       never all of them on a CPU (kernels/cpu/linear_cross_entropy.py)
    runtime            constant              threads and their buffers; with recompute=block torch imports 150 MiB more

Layer l keeps, for each token: its two sums and two norms 4 C, q k v (H + 2 K) D, attention's output H D, the
pre-activations of its MLP F (2 F if gated). recompute leaves out some: "norm" the norms 2 C, "mlp" F, "block" all but
the two inputs 2 C.

Compared with the measured peak of 17 models on a CPU, P from 4 to 28 M: the largest error is 13 %, the mean error 4 %
(tests/engine/training/test_memory_estimate.py repeats five of them). Unmeasured on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.model.flops import matrix_count, parameter_count
from peakgpt.engine.model.norms import BLOCK_NORMS
from peakgpt.engine.model.recompute import parse
from peakgpt.engine.training.figures import bytes_text
from peakgpt.engine.training.train_config import TrainConfig
from peakgpt.kernels.hardware.memory import available_bytes

TOLERANCE = 0.15  # of the predicted peak
RUNTIME_BYTES = {"cpu": 32 << 20, "cuda": 512 << 20}  # measured on a CPU; on a GPU the workspaces of cuBLAS, a guess
CHECKPOINT_IMPORT_BYTES = 150 << 20  # torch.utils.checkpoint imports torch._dynamo (torch 2.13)
BATCH_ELEMENTS = 1 << 26  # of one batch of Muon's products (kernels/gpu/muon.py)
LOGITS_ROWS, LOGITS_BYTES = 512, {"cpu": 128 << 20, "cuda": 4 << 30}  # of one block of logits, at most


@dataclass(frozen=True)
class MemoryEstimate:
    """The predicted memory of a training run, in bytes by part."""

    state: dict[str, int]  # as long as the run
    step: dict[str, int]  # in a step

    @property
    def total(self) -> int:
        """The peak."""
        return sum(self.state.values()) + sum(self.step.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {bytes_text(size)}" for name, size in {**self.state, **self.step}.items() if size)
        return f"{bytes_text(self.total)} ({parts})"


@dataclass(frozen=True)
class AdapterSizes:
    """What a run with an adapter has instead of weights that train.

    Args:
        trained: number of the adapter's weights.
        frozen_bytes: of the base model's weights, which may be quantized.
    """

    trained: int
    frozen_bytes: int


def estimate_memory(
    model: GPTConfig, config: TrainConfig, device: torch.device | str, adapter: AdapterSizes | None = None
) -> MemoryEstimate:
    """Predict the memory that training takes in addition to that of the process; `adapter` if only that trains."""
    kind, size = torch.device(device).type, config.dtype.itemsize
    parameters = parameter_count(model) if adapter is None else adapter.trained
    frozen = 0 if adapter is None else adapter.frozen_bytes
    tokens = (config.micro_batch or config.batch) * config.tokens
    moments = parameters * 8 - (matrix_count(model) * 4 if config.optimizer == "muon" else 0)
    layers = list(_saved_widths(model, config.recompute, by_layers=adapter is not None))
    rows = min(tokens, LOGITS_ROWS) if kind == "cpu" else tokens
    imports = CHECKPOINT_IMPORT_BYTES if kind == "cpu" and parse(config.recompute)[0] == "block" else 0
    return MemoryEstimate(
        state={
            "weights": parameters * size + frozen,
            "gradients": parameters * size,
            "optimizer": moments + parameters * (2 if config.dtype == torch.bfloat16 else 0),
            "average": parameters * 4 if config.ema_decay is not None else 0,
            # Weights and optimizer state, from which a thread writes while training goes on. On a GPU in host memory.
            "checkpoint copy": parameters * 4 + moments if kind == "cpu" else 0,
            "runtime": RUNTIME_BYTES[kind] + imports,
        },
        step={
            # 3 C: the embedding, the input of the head and its gradient.
            "activations": tokens * size * (sum(layers) + 3 * model.n_embd),
            "one more layer": tokens * size * max(_saved_widths(model, "none", by_layers=adapter is not None)),
            "orthogonal update": _orthogonal_bytes(model, config, kind) if config.optimizer == "muon" else 0,
            "logits": min(rows * model.vocab_size * size, LOGITS_BYTES[kind]),
        },
    )


def _orthogonal_bytes(model: GPTConfig, config: TrainConfig, kind: str) -> int:
    """Return the bytes in which Muon orthogonalizes its largest matrix, or on a GPU all matrices of its shape."""
    inner = max(model.expert_inner if model.has_experts(i) else model.n_inner for i in range(model.n_layer))
    largest = model.n_embd * max(inner, model.n_head * model.head_dim)
    if kind == "cpu":
        return largest * (4 + 2 * config.dtype.itemsize)
    together = largest * 2 * sum(model.experts if model.has_experts(i) else 1 for i in range(model.n_layer))
    return (together + 3 * min(together, BATCH_ELEMENTS)) * config.dtype.itemsize


def _saved_widths(model: GPTConfig, plan: str, *, by_layers: bool) -> Iterator[int]:
    """Yield the number of values per token that each layer keeps for backward.

    `by_layers`: MLPs run layer by layer, because these have adapters, and keep what is between their layers too.
    """
    kind, every = parse(plan)
    c, heads = model.n_embd, model.n_head * model.head_dim
    for layer in range(model.n_layer):
        has_experts = model.has_experts(layer)
        hidden = model.n_inner * (1 + model.gated_mlp) * (1 + by_layers)
        if has_experts:
            hidden = model.experts_per_token * model.expert_inner * (1 + model.gated_experts)
        if kind == "block" and layer % every == 0:
            yield 2 * c
            continue
        norms = BLOCK_NORMS[model.residual]
        normed = 2 * c * ("ln_1" in norms and kind != "norm")  # outputs of the norms before the branches
        branches = 2 * c * ("ln_1_out" in norms)  # inputs of the norms after them
        qkv = (model.n_head + 2 * model.n_kv_head) * model.head_dim
        yield 2 * c + normed + branches + heads + qkv + hidden * (kind != "mlp")


def refuse_what_cannot_fit(
    model: GPTConfig, config: TrainConfig, device: torch.device, adapter: AdapterSizes | None = None
) -> tuple[MemoryEstimate, int]:
    """Return the estimate and the available bytes.

    Raises:
        ValueError: the prediction is higher than what is available; the message says what to change.
    """
    found, available = estimate_memory(model, config, device, adapter), available_bytes(device, with_swap=True)
    if found.total <= available:
        return found, available
    raise ValueError(
        f"memory: this run needs about {bytes_text(found.total)} on {device}, expected at most the "
        f"{bytes_text(available)} that are available; {_advice(model, config, device, adapter, available)}"
    )


def _advice(
    model: GPTConfig, config: TrainConfig, device: torch.device, adapter: AdapterSizes | None, available: int
) -> str:
    """Say which single changes suffice, else all of them at once; if that is not enough, say so."""
    sizes = [(estimate_memory(model, smaller, device, adapter).total, text) for text, smaller in _smaller(config)]
    fitting = {text.split()[0]: (size, text) for size, text in reversed(sizes) if size <= available}
    if fitting:
        return "; ".join(f"{text} needs {bytes_text(size)}" for size, text in reversed(fitting.values()))
    if not sizes:
        return "use a smaller model"
    size, text = min(sizes)
    return f"{text} still needs {bytes_text(size)}: use a smaller model"


def _smaller(config: TrainConfig) -> Iterator[tuple[str, TrainConfig]]:
    """Yield what can be changed, as flags, and the changed config; single changes before all of them at once."""
    changes = {}
    if config.dtype == torch.float32:
        changes["dtype"] = torch.bfloat16
    size = (config.micro_batch or config.batch) // 2
    while size:
        changes["micro_batch"] = size
        yield f"--micro-batch {size}", replace(config, micro_batch=size)
        size //= 2
    if parse(config.recompute) != ("block", 1):
        changes["recompute"] = "block"
        yield "--recompute block", replace(config, recompute="block")
    if "dtype" in changes:
        yield "--dtype bfloat16", replace(config, dtype=torch.bfloat16)
    if len(changes) > 1:
        one = {"micro_batch": 1} if "micro_batch" in changes else {}
        flags = {"dtype": "--dtype bfloat16", "recompute": "--recompute block", "micro_batch": "--micro-batch 1"}
        yield " ".join(flags[name] for name in reversed(changes)), replace(config, **{**changes, **one})
