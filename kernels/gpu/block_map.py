"""Many tensors in one launch: the table of their addresses, and which program works on which block of which tensor."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
AOT_TYPES = {"table_ptr": "*i64", "row_ptr": "*i32", "first_ptr": "*i32"}  # of the arguments, for aot_cases


class BlockMap:
    """The blocks of all tensors of a table, for a kernel whose programs take one block each.

    Attributes:
        table: (rows, columns) int64 on the device.
        row: (count,) int32, the row of each block.
        first: (rows,) int32, the first block of each row.
        count: number of blocks.
        align: 16 if every address is a multiple of 16 bytes, else 1: a kernel then loads 16 bytes at a time.
    """

    def __init__(self, table: Tensor, device: torch.device, block: int, *, scalars: int = 0):
        """
        Args:
            table: (rows, columns) int64 on the CPU: elements, then addresses; see kernels/core/foreach.py.
            device: of the tensors.
            block: elements of a block.
            scalars: trailing columns with the addresses of single numbers.
        """
        blocks = -(-table[:, 0] // block)
        wide = table[:, 1 : table.shape[1] - scalars]
        self.count, self.align = int(blocks.sum()), 1 if (wide % 16).any() else 16
        self.table = _send(table, device)
        self.row = _send(torch.arange(len(table), dtype=torch.int32).repeat_interleave(blocks), device)
        self.first = _send((blocks.cumsum(0) - blocks).int(), device)


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to the device without waiting for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


@triton.jit
def address(entry_ptr, DTYPE: tl.constexpr, ALIGN: tl.constexpr):
    """Return the pointer whose value is an entry of a table."""
    return tl.multiple_of(tl.load(entry_ptr).to(tl.pointer_type(DTYPE)), ALIGN)
