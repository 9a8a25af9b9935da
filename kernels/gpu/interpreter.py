"""Corrections of Triton's interpreter, without which kernels run wrong or not at all on CPU tensors.

Triton 3.6 and 3.7 store bfloat16 as uint16 bit patterns in numpy and compute on the patterns: `tl.dot` multiplies
them, a cast from float32 truncates. They ignore `input_precision`, so a missing "ieee" has no effect but costs 13 bits
on a GPU. They refuse a device function whose file does not import triton.language. `launch.py` applies the corrections.
"""

from __future__ import annotations

import functools
import threading

import numpy as np

BF16_NAN = 0x7FC0


def to_bf16_bits(x: np.ndarray) -> np.ndarray:
    """Convert a float32 array to bfloat16 bit patterns, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(x), BF16_NAN, rounded).astype(np.uint16)


def from_bf16_bits(bits: np.ndarray) -> np.ndarray:
    """Convert bfloat16 bit patterns to a float32 array, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_tf32(x: np.ndarray) -> np.ndarray:
    """Round the mantissa of a float32 array to TF32's 10 bits."""
    return ((np.ascontiguousarray(x).view(np.uint32) + 0x1000) & 0xFFFFE000).view(np.float32)


@functools.cache  # once per process
def patch() -> None:
    """Patch the interpreter's builder, for kernels decorated before or after the call."""
    import triton.language as tl
    from triton._C.libtriton import ir
    from triton.runtime import interpreter as it

    builder = it.InterpreterBuilder
    plain_cast, plain_dot, plain_fp_to_fp = builder.cast_impl, builder.create_dot, builder.create_fp_to_fp
    plain_patch_lang, plain_launch, launching = it._patch_lang, it.GridExecutor.__call__, threading.RLock()

    def cast(self, src, dst_type):
        if src.dtype.scalar == tl.bfloat16:
            src = it.TensorHandle(from_bf16_bits(src.data), tl.float32)
        if dst_type.scalar == tl.bfloat16:
            return it.TensorHandle(to_bf16_bits(src.data.astype(np.float32)), tl.bfloat16)
        return plain_cast(self, src, dst_type)

    def fp_to_fp(self, src, dst_type, rounding_mode):
        if dst_type.scalar == tl.bfloat16 and rounding_mode == ir.ROUNDING_MODE.RTNE:
            return cast(self, src, dst_type)
        return plain_fp_to_fp(self, src, dst_type, rounding_mode)

    def operand(x, input_precision):
        if x.dtype.scalar == tl.bfloat16:
            return it.TensorHandle(from_bf16_bits(x.data), tl.float32)
        if x.dtype.scalar == tl.float32 and input_precision == ir.INPUT_PRECISION.TF32:
            return it.TensorHandle(to_tf32(x.data), tl.float32)
        return x

    def dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        a, b = operand(a, input_precision), operand(b, input_precision)
        return plain_dot(self, a, b, d, input_precision, max_num_imprecise_acc)

    def patch_lang(fn):
        # Patching triton.language at each call of a device function took half of the time. Skip it if it is patched.
        languages = [m for m in (tl, tl.core) if any(m is value for value in fn.__globals__.values())]
        if any(tl.core.is_builtin(m.load) for m in languages):
            return plain_patch_lang(fn)
        return it._LangPatchScope()

    def launch(self, *args, **kwargs):
        with launching:  # a launch patches triton.language, which all threads see
            return plain_launch(self, *args, **kwargs)

    it._patch_lang, it.GridExecutor.__call__ = patch_lang, launch
    builder.cast_impl, builder.create_fp_to_fp, builder.create_dot = cast, fp_to_fp, dot
