"""Benchmarks: contenders interleaved in one run, one result schema."""
