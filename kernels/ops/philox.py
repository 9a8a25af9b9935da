"""Philox4x32-7: four random words from a counter and a key, the same on every backend and in any order.

    c0, c1, c2, c3 = hi(B c2) ^ c1 ^ k0, lo(B c2), hi(A c0) ^ c3 ^ k1, lo(A c0)      each round
    k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85  mod 2^32                              after each round

Salmon, Moraes, Dror, Shaw 2011, "Parallel Random Numbers: As Easy as 1, 2, 3", SC11, section 3.3: seven rounds pass
BigCrush. The C++ version is csrc/simd/philox.h, the Triton version is `tl.philox(..., n_rounds=7)`.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 7
_WORD = 0xFFFFFFFF


def philox(counter: tuple[Tensor | int, Tensor | int, Tensor | int, Tensor | int], seed: Tensor) -> list[Tensor]:
    """Four random words for each counter.

    Args:
        counter: four words, integers or int64 tensors that broadcast together.
        seed: (1,) int64; its lower half is the key's first word.
    Returns:
        Four int64 tensors with values 0..2^32-1.
    """
    c0, c1, c2, c3 = (c + torch.zeros_like(seed) for c in counter)
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(ROUNDS):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # int64 overflow wraps, so all 64 bits are correct
        c0, c1, c2, c3 = ((b >> 32) & _WORD) ^ c1 ^ k0, b & _WORD, ((a >> 32) & _WORD) ^ c3 ^ k1, a & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return [c0, c1, c2, c3]
