"""`attn_implementation="peakgpt"`: the attention function and the mask function that transformers asks for by name.

A mask stays what it says (`Mask`) instead of a (B, 1, T, S) tensor: causal or not, a window, a range of keys for each
sequence, offsets of packed documents. Where a pattern is none of these, transformers' own dense mask is added to the
scores, so that it is slower and never wrong. A model that would add a mask itself, and so never calls the function
here (BLOOM among others), meets `Mask.__radd__`, which raises.

This module imports transformers; nothing else of peakgpt does before it is asked to.
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

from peakgpt.dropin.attend import Mask, attention_forward

NAME = "peakgpt"


def register_attention() -> None:
    """Make `attn_implementation="peakgpt"` known to transformers, for `from_pretrained` and `set_attn_implementation`.

    Raises:
        ImportError: transformers is not installed.
    """
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, mask)


# ---- the mask function


def mask(
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
    """What transformers' create_*_mask functions ask for; arguments as in `transformers.masking_utils.sdpa_mask`.

    Returns:
        A `Mask`, or a dense bool (B, 1, T, S) where the pattern is none that it can say.
    """
    found = None
    if not use_vmap and isinstance(q_offset, int):  # a tensor: a static cache, whose end is not that of its keys
        found = _traced_pattern(mask_function, local_size, batch_size, q_length, device)
        # generate() wants a tensor for a static cache, and with a window nothing here tells that from any other cache.
        generating = found is not None and found.window is not None and not torch.is_grad_enabled()
        if generating or (found is not None and found.causal and q_offset + q_length != kv_offset + kv_length):
            found = None
    if found is None:
        return sdpa_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, local_size,
            allow_is_causal_skip=False, allow_is_bidirectional_skip=False, use_vmap=use_vmap, device=device,
        )  # fmt: skip
    if attention_mask is None:
        return found
    padded = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    return _with_keys(found, padded[:, kv_offset : kv_offset + kv_length].to(torch.bool))


def _traced_pattern(function, local_size, batch: int, tokens: int, device) -> Mask | None:
    """The pattern of a mask function of transformers; None for one that is not known."""
    if not torch.compiler.is_compiling():
        return _pattern(function)
    if function is causal_mask_function or function is bidirectional_mask_function:
        return Mask(function is causal_mask_function)
    # Closures can not be read here. Without a window and without vmap only packing makes a conjunction; two neighbours
    # that see each other are in one document.
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
    first, second = _cell(function, "mask_functions")
    match first.__qualname__.partition(".")[0], second.__qualname__.partition(".")[0]:
        case "sliding_window_overlay", "causal_mask_function":
            return Mask(True, window=_cell(first, "sliding_window"))
        case "packed_sequence_mask_function", "remap_positions_for_packed_sequence":
            base = _pattern(_cell(second, "mask_function"))
            return base and base._replace(documents=_offsets(_cell(first, "packed_sequence_mask")))
    return None


def _cell(function, name: str) -> Any:
    """The value of a variable that a closure holds."""
    return function.__closure__[function.__code__.co_freevars.index(name)].cell_contents


def _offsets(document: Tensor) -> Tensor:
    """(N + 1,) starts of the runs in (B, T) numbers of documents, rows after each other, and the end."""
    starts = torch.ones_like(document, dtype=torch.bool)
    starts[:, 1:] = document[:, 1:] != document[:, :-1]
    return torch.cat((starts.flatten().nonzero()[:, 0], starts.new_tensor([document.numel()], dtype=torch.long)))


def _with_keys(found: Mask, live: Tensor) -> Mask:
    """The pattern with the (B, S) live keys."""
    if torch.compiler.is_compiling():
        return found._replace(keys=live)
    if bool(live.all()):
        return found
    length, start = live.sum(1), live.int().argmax(1)
    j = torch.arange(live.shape[1], device=live.device)
    whole = (j >= start[:, None]) & (j < (start + length)[:, None]) == live
    return found._replace(start=start, length=length) if bool(whole.all()) else found._replace(keys=live)
