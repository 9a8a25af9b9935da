"""Quantized weights: our own folders, GPTQ and AWQ (packed_*.py), and MXFP4."""
