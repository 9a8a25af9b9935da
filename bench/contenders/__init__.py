"""What benchmarks compare: contenders, the processes that run them, and other engines' models."""
