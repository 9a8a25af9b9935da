"""Layers on fused kernels for other people's models."""

from peakgpt.engine.layers import GELUMLP, CausalSelfAttention, LayerNorm

__all__ = ["GELUMLP", "CausalSelfAttention", "LayerNorm"]
