"""The mask function of `attn_implementation="peakgpt"`, and the registration of that name in transformers.

The mask function returns a compact `Mask` instead of a (B, 1, T, S) tensor: causal or not, a window, a range of keys
for each sequence, offsets of packed documents. For any other pattern it returns the dense mask of transformers, which
is slower. A model that adds the mask to its scores itself (such as BLOOM) never calls our attention
function; `Mask.__radd__` then raises an error.

This module imports transformers. It is imported only when a user patches such a model or registers the name.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    prepare_padding_mask,
    sdpa_mask,
)

from peakgpt.dropin.attention_function import NAME, RECORDER, Mask, attention_forward, document_offsets

try:
    from transformers.utils.output_capturing import _active_collector
except ImportError:  # a version of transformers that passes output_attentions on
    _active_collector = None



def register_attention() -> None:
    """Register `attn_implementation="peakgpt"` for `from_pretrained` and `set_attn_implementation`.

    Raises:
        ImportError: transformers is not installed.
    """
    RECORDER.collector = _active_collector
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, mask_function)


# ---- the mask function


def mask_function(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function=causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **_: Any,
) -> Mask | Tensor:
    """Make the mask for one forward of a model. Arguments as in `transformers.masking_utils.sdpa_mask`.

    Returns:
        A `Mask`, or a dense bool tensor (B, 1, T, S) if `Mask` cannot express the pattern.
    """
    mask = None
    # With a static cache q_offset is a tensor, and the last key in the cache is not the last valid key.
    if not use_vmap and isinstance(q_offset, int):
        mask = _traced_pattern(mask_function, local_size, batch_size, q_length, device)
        # generate() needs a dense mask for a static cache, which cannot be recognized here if there is a window.
        generating = mask is not None and mask.window is not None and not torch.is_grad_enabled()
        if generating or (mask is not None and mask.causal and q_offset + q_length != kv_offset + kv_length):
            mask = None
    if mask is None:
        return sdpa_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, local_size,
            allow_is_causal_skip=False, allow_is_bidirectional_skip=False, use_vmap=use_vmap, device=device,
        )  # fmt: skip
    if attention_mask is None:
        return mask
    padded = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    return _with_padding(mask, padded[:, kv_offset : kv_offset + kv_length].to(torch.bool))


def _traced_pattern(function, local_size, batch: int, tokens: int, device) -> Mask | None:
    """Return the compact form of a mask function of transformers, or None for an unknown one."""
    if not torch.compiler.is_compiling():
        return _pattern(function)
    if function is causal_mask_function or function is bidirectional_mask_function:
        return Mask(function is causal_mask_function)
    # torch.compile cannot read closures. Without window and vmap, only packing combines two mask functions with "and".
    # Two neighbours that see each other belong to one document.
    if local_size is not None or function.__qualname__ != "and_masks.<locals>.and_mask":
        return None
    i = torch.arange(tokens, device=device)
    sequence = torch.arange(batch, device=device)[:, None]
    linked = function(sequence, sequence.new_zeros(()), i[None, 1:], i[None, :-1])
    return Mask(True, unpacked=linked.all())


def _pattern(function) -> Mask | None:
    if function is causal_mask_function or function is bidirectional_mask_function:
        return Mask(function is causal_mask_function)
    if function.__qualname__ != "and_masks.<locals>.and_mask":
        return None
    first, second = _closure_value(function, "mask_functions")
    match first.__qualname__.partition(".")[0], second.__qualname__.partition(".")[0]:
        case "sliding_window_overlay", "causal_mask_function":
            return Mask(True, window=_closure_value(first, "sliding_window"))
        case "packed_sequence_mask_function", "remap_positions_for_packed_sequence":
            base = _pattern(_closure_value(second, "mask_function"))
            return base and base._replace(documents=document_offsets(_closure_value(first, "packed_sequence_mask")))
    return None


def _closure_value(function, name: str) -> Any:
    """Return the value of a variable that a function closes over."""
    return function.__closure__[function.__code__.co_freevars.index(name)].cell_contents


def _with_padding(mask: Mask, live: Tensor) -> Mask:
    """Add padding to a mask; `live`, (B, S) bool, is true for valid keys."""
    if torch.compiler.is_compiling():
        return mask._replace(keys=live)
    if bool(live.all()):
        return mask
    length, start = live.sum(1), live.int().argmax(1)
    j = torch.arange(live.shape[1], device=live.device)
    is_range = (j >= start[:, None]) & (j < (start + length)[:, None]) == live
    return mask._replace(start=start, length=length) if bool(is_range.all()) else mask._replace(keys=live)
