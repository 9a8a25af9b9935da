"""Make Triton's interpreter as strict as a GPU, on top of the corrections of peakgpt.kernels.gpu.interpreter.

bfloat16 arithmetic, comparisons and reductions, which the interpreter computes on bit patterns, raise. A masked load
without `other` gives NaN; on a GPU it gives any value, in the interpreter 0.
"""

import functools

import numpy as np


@functools.cache  # once per process
def patch() -> None:
    """Patch the interpreter's builder, for kernels decorated before or after the call."""
    import triton.language as tl
    from triton.runtime import interpreter as it

    from peakgpt.kernels.gpu import interpreter

    interpreter.patch()
    builder = it.InterpreterBuilder
    plain_load, plain_check = builder.create_masked_load, it.ReduceScanOpInterface.check_tensor

    def masked_load(self, ptrs, mask, other, *rest, **options):
        element = ptrs.get_element_ty()
        if other is None and element.is_floating() and element.primitive_bitwidth >= 16:
            nan = interpreter.BF16_NAN if element == tl.bfloat16 else np.nan
            other = it.TensorHandle(np.full(ptrs.data.shape, nan, dtype=it._get_np_dtype(element)), element)
        return plain_load(self, ptrs, mask, other, *rest, **options)

    def no_bf16(plain):
        def checked(self, *args):
            moves_bits = args[-1] is np.where  # tl.where
            if not moves_bits and any(getattr(a, "dtype", None) == tl.bfloat16 for a in args):
                raise TypeError("arithmetic on bfloat16: cast to float32 first, as all kernels of this project do")
            return plain(self, *args)

        return checked

    def check_tensor(self, tensors):
        if any(t.dtype == tl.bfloat16 for t in tensors):
            raise TypeError("reduction of bfloat16: cast to float32 first, as all kernels of this project do")
        plain_check(self, tensors)

    builder.create_masked_load = masked_load
    for name in ("binary_op", "unary_op", "ternary_op", "create_fma", "create_rsqrt", "create_erf"):
        setattr(builder, name, no_bf16(getattr(builder, name)))
    it.ReduceScanOpInterface.check_tensor = check_tensor
