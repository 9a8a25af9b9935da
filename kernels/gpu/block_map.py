"""Many tensors in one launch: the table of their addresses, and which program works on which block of which tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from peakgpt.kernels.core.foreach import Call, address_table

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
AOT_TYPES = {"table_ptr": "*i64", "row_ptr": "*i32", "first_ptr": "*i32"}  # of the arguments, for aot_cases


class BlockMap:
    """The blocks of all tensors of a table, for a kernel whose programs take one block each.

    Attributes:
        table: (rows, columns) int64, from `address_table`.
        row: (count,) int32, the row of each block.
        first: (rows,) int32, the first block of each row.
        count: number of blocks.
        align: 16 if every address is a multiple of 16 bytes, else 1: a kernel then loads 16 bytes at a time.
    """

    def __init__(self, calls: Sequence[Call], block: int):
        device, table = calls[0][0].device, address_table(calls)
        blocks = -(-table[:, 0] // block)
        rows = torch.arange(len(calls), dtype=torch.int32)
        self.count, self.align = int(blocks.sum()), 1 if (table[:, 1:_wide(calls)] % 16).any() else 16
        self.table = _send(table, device)
        self.row = _send(rows.repeat_interleave(blocks), device)
        self.first = _send((blocks.cumsum(0) - blocks).int(), device)


def _wide(calls: Sequence[Call]) -> int:
    """Return the number of leading columns whose tensors are read in blocks: all but a trailing scalar."""
    scalar = calls[0][-1] is not None and calls[0][-1].dim() == 0 and len(calls[0]) > 1
    return 1 + len(calls[0]) - scalar


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to the device without waiting for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


@triton.jit
def address(entry_ptr, DTYPE: tl.constexpr, ALIGN: tl.constexpr):
    """Return the pointer whose value is an entry of a table."""
    return tl.multiple_of(tl.load(entry_ptr).to(tl.pointer_type(DTYPE)), ALIGN)
