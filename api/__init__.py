"""peakgpt: train and run GPT models near the peak of their hardware.

Models: GPT, GPTConfig, LoraConfig, Tokenizer. Training: Trainer, TrainConfig, AdamW. Inference: Engine, SamplingParams.
Ops: attention, linear_cross_entropy and the other functions below; `peakgpt.nn` has them as layers.
Other people's models: patch, unpatch, register_attention. Backends: use_backend, doctor.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from peakgpt.engine.gpt import GPT
from peakgpt.engine.inference.sampling_params import SamplingParams
from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.model.lora import LoraConfig
from peakgpt.engine.training.optimizer import AdamW
from peakgpt.kernels.core.dispatch import use_backend
from peakgpt.kernels.ops.attention import attention
from peakgpt.kernels.ops.attention_decode import attention_decode
from peakgpt.kernels.ops.experts import experts
from peakgpt.kernels.ops.linear import linear
from peakgpt.kernels.ops.linear_cross_entropy import linear_cross_entropy
from peakgpt.kernels.ops.mlp import gated_mlp, mlp
from peakgpt.kernels.ops.norm import add_layernorm, add_rmsnorm, layernorm, rmsnorm
from peakgpt.kernels.ops.qk_norm import qk_norm
from peakgpt.kernels.ops.rotary import rotary

if TYPE_CHECKING:
    from peakgpt import nn
    from peakgpt.dropin.patching import patch, unpatch
    from peakgpt.engine.data.tokenizer import Tokenizer
    from peakgpt.engine.inference.engine import Engine
    from peakgpt.engine.training.train_config import TrainConfig
    from peakgpt.engine.training.trainer import Trainer
    from peakgpt.kernels.doctor import doctor

__all__ = [
    "GPT",
    "AdamW",
    "Engine",
    "GPTConfig",
    "LoraConfig",
    "SamplingParams",
    "Tokenizer",
    "TrainConfig",
    "Trainer",
    "add_layernorm",
    "add_rmsnorm",
    "attention",
    "attention_decode",
    "doctor",
    "experts",
    "gated_mlp",
    "layernorm",
    "linear",
    "linear_cross_entropy",
    "mlp",
    "nn",
    "patch",
    "qk_norm",
    "register_attention",
    "rmsnorm",
    "rotary",
    "unpatch",
    "use_backend",
]
__version__ = "0.1.0"

# These names are imported at first use, so that `import peakgpt` stays fast. Type checkers read the block above.
_LAZY = {
    "Engine": "peakgpt.engine.inference.engine",
    "Tokenizer": "peakgpt.engine.data.tokenizer",
    "TrainConfig": "peakgpt.engine.training.train_config",
    "Trainer": "peakgpt.engine.training.trainer",
    "doctor": "peakgpt.kernels.doctor",
    "patch": "peakgpt.dropin.patching",
    "unpatch": "peakgpt.dropin.patching",
}


def __getattr__(name: str) -> Any:
    if name == "nn":
        return import_module("peakgpt.nn")
    if name not in _LAZY:
        raise AttributeError(f"module 'peakgpt' has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def register_attention() -> None:
    """Register `attn_implementation="peakgpt"` in transformers. `patch` calls this itself.

    Raises:
        ImportError: transformers is not installed.
    """
    from peakgpt.dropin.mask_function import register_attention

    register_attention()
