"""All ops. Importing this module registers them in `dispatch.OPS`."""

from peakgpt.kernels.ops.adamw import adamw
from peakgpt.kernels.ops.attention import attention, attention_qkv
from peakgpt.kernels.ops.attention_decode import attention_decode
from peakgpt.kernels.ops.cache_store import cache_store
from peakgpt.kernels.ops.dropout import dropout
from peakgpt.kernels.ops.embedding import embedding
from peakgpt.kernels.ops.experts import experts
from peakgpt.kernels.ops.linear import linear
from peakgpt.kernels.ops.linear_cross_entropy import linear_cross_entropy
from peakgpt.kernels.ops.linear_grouped import linear_grouped
from peakgpt.kernels.ops.linear_lora import linear_lora
from peakgpt.kernels.ops.linear_quantized import linear_q4, linear_q8
from peakgpt.kernels.ops.mlp import gated_mlp, mlp
from peakgpt.kernels.ops.muon import muon
from peakgpt.kernels.ops.norm import add_layernorm, add_rmsnorm, layernorm, rmsnorm
from peakgpt.kernels.ops.qk_norm import qk_norm
from peakgpt.kernels.ops.rotary import rotary
from peakgpt.kernels.ops.sum_of_squares import sum_of_squares

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
    "experts",
    "gated_mlp",
    "layernorm",
    "linear",
    "linear_cross_entropy",
    "linear_grouped",
    "linear_lora",
    "linear_q4",
    "linear_q8",
    "mlp",
    "muon",
    "qk_norm",
    "rmsnorm",
    "rotary",
    "sum_of_squares",
]
