"""peakgpt: GPT models at the speed of their hardware."""

from peakgpt import nn
from peakgpt.dropin.patching import patch, unpatch
from peakgpt.engine.data.control_tokens import prepend_control_tokens
from peakgpt.engine.gpt import GPT
from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.training.optimizer import AdamW
from peakgpt.kernels.core.dispatch import use_backend
from peakgpt.kernels.doctor import doctor
from peakgpt.kernels.ops.attention import attention
from peakgpt.kernels.ops.attention_decode import attention_decode
from peakgpt.kernels.ops.cache_store import cache_store
from peakgpt.kernels.ops.layernorm import add_layernorm, layernorm
from peakgpt.kernels.ops.linear import linear
from peakgpt.kernels.ops.linear_cross_entropy import linear_cross_entropy
from peakgpt.kernels.ops.mlp import gated_mlp, mlp
from peakgpt.kernels.ops.rmsnorm import add_rmsnorm, rmsnorm
from peakgpt.kernels.ops.rotary import rotary
from peakgpt.kernels.ops.vocab_parallel import vocab_shard

__all__ = [
    "GPT",
    "AdamW",
    "GPTConfig",
    "add_layernorm",
    "add_rmsnorm",
    "attention",
    "attention_decode",
    "cache_store",
    "doctor",
    "gated_mlp",
    "layernorm",
    "linear",
    "linear_cross_entropy",
    "mlp",
    "nn",
    "patch",
    "prepend_control_tokens",
    "register_attention",
    "rmsnorm",
    "rotary",
    "unpatch",
    "use_backend",
    "vocab_shard",
]


def register_attention() -> None:
    """Make `attn_implementation="peakgpt"` known to transformers; `patch` does it by itself."""
    from peakgpt.dropin.interface import register_attention

    register_attention()


__version__ = "0.1.0"
