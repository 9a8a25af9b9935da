"""Layers on fused kernels for other people's models."""

from peakgpt.engine.model.layers import GELUMLP, CausalSelfAttention, GatedMLP, LayerNorm, RMSNorm

__all__ = ["GELUMLP", "CausalSelfAttention", "GatedMLP", "LayerNorm", "RMSNorm"]
