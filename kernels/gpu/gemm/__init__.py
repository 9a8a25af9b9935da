"""Matrix-product kernels in Triton."""
