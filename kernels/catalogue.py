"""Every op there is: importing this file fills dispatch.OPS."""

from peakgpt.kernels.adamw import adamw
from peakgpt.kernels.attention import attention, attention_qkv
from peakgpt.kernels.attention_decode import attention_decode
from peakgpt.kernels.cache_store import cache_store
from peakgpt.kernels.dropout import dropout
from peakgpt.kernels.embedding import embedding
from peakgpt.kernels.layernorm import add_layernorm, layernorm
from peakgpt.kernels.linear import linear
from peakgpt.kernels.linear_cross_entropy import linear_cross_entropy
from peakgpt.kernels.linear_quantised import linear_q4, linear_q8
from peakgpt.kernels.mlp import gated_mlp, mlp
from peakgpt.kernels.rmsnorm import add_rmsnorm, rmsnorm
from peakgpt.kernels.rotary import rotary
from peakgpt.kernels.sum_of_squares import sum_of_squares

__all__ = [
    "adamw",
    "add_layernorm",
    "add_rmsnorm",
    "attention",
    "attention_decode",
    "attention_qkv",
    "cache_store",
    "dropout",
    "embedding",
    "gated_mlp",
    "layernorm",
    "linear",
    "linear_cross_entropy",
    "linear_q4",
    "linear_q8",
    "mlp",
    "rmsnorm",
    "rotary",
    "sum_of_squares",
]
