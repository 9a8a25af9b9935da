"""Triton backend: one file per op."""
