"""peakgpt: GPT models at the speed of their hardware."""

from peakgpt import nn
from peakgpt.dropin.patching import patch, unpatch
from peakgpt.engine.config import GPTConfig
from peakgpt.engine.model import GPT
from peakgpt.engine.optim import AdamW
from peakgpt.engine.tags import prefix_tags
from peakgpt.kernels.attention import attention
from peakgpt.kernels.attention_decode import attention_decode
from peakgpt.kernels.cache_store import cache_store
from peakgpt.kernels.dispatch import use_backend
from peakgpt.kernels.doctor import doctor
from peakgpt.kernels.layernorm import add_layernorm, layernorm
from peakgpt.kernels.linear import linear
from peakgpt.kernels.linear_cross_entropy import linear_cross_entropy
from peakgpt.kernels.mlp import gated_mlp, mlp
from peakgpt.kernels.rmsnorm import add_rmsnorm, rmsnorm
from peakgpt.kernels.rotary import rotary
from peakgpt.kernels.vocab_parallel import vocab_shard

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
    "prefix_tags",
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
