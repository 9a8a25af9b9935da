"""Normalization kernels in Triton."""
