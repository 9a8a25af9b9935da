"""Triton backend: one module per op, anywhere below this package."""
