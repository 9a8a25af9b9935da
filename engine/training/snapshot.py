"""Snapshot: copies of tensors in host memory, which a thread writes to the disk while the training changes them."""

from __future__ import annotations

import errno
from collections.abc import Iterable

import torch
from torch import Tensor


class Snapshot:
    """Memory for one copy of every tensor. The next copy uses the same memory."""

    def __init__(self, device: torch.device):
        """
        Args:
            device: that trains. From CUDA the copies run while the host continues.
        """
        self._is_cuda, self._buffers = device.type == "cuda", {}
        self._copied: torch.cuda.Event | None = None

    def take(self, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Copy tensors to the host; from CUDA the copies are complete after `wait`.

        Returns:
            Contiguous tensors by name. The next call with these names overwrites them.
        Raises:
            OSError: not enough memory.
        """
        copies = {}
        for name, tensor in tensors:
            buffer = self._buffers.get(name)
            if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                buffer = self._buffers[name] = self._new_buffer(tensor)
            copies[name] = buffer.copy_(tensor.detach(), non_blocking=True)
        if self._is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()
        return copies

    def _new_buffer(self, tensor: Tensor) -> Tensor:
        try:
            return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._is_cuda)
        except (MemoryError, RuntimeError) as error:  # torch's allocators raise RuntimeError
            reason = str(error).partition("\n")[0]
            raise OSError(errno.ENOMEM, f"a copy of {tensor.nbytes} bytes does not fit into memory: {reason}") from None

    def wait(self) -> None:
        """Wait until the copies are complete."""
        if self._copied is not None:
            self._copied.synchronize()
