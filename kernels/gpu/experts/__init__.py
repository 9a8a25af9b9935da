"""Kernels of the mixture of experts in Triton."""
