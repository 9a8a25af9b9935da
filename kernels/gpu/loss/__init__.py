"""Loss kernels in Triton."""
