"""The token ids of rendered chats, in the forms that transformers' apply_chat_template returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers
import torch

from peakgpt.engine.data.template_sandbox import Rendered

# Arguments of transformers that would change the ids. They must not be taken for variables of the template.
UNSUPPORTED = ("sanitize_control_tokens", "padding", "truncation", "max_length", "tokenizer_kwargs")
TENSORS = {"pt": torch.tensor, "np": np.array}


def check_options(
    variables: Mapping[str, Any], return_tensors: str | None, return_assistant_tokens_mask: bool, has_dict: bool
) -> None:
    """Check the options of a call.

    Args:
        variables: of the template.
        has_dict: whether a dict of ids is returned.
    Raises:
        ValueError: an option that is not supported, or that would be ignored.
    """
    if unsupported := [name for name in UNSUPPORTED if name in variables]:
        raise ValueError(f"apply_chat_template: got {unsupported[0]}, which peakgpt does not support, expected none")
    if return_tensors not in (None, *TENSORS):
        raise ValueError(f"apply_chat_template: got return_tensors {return_tensors!r}, expected None, 'pt' or 'np'")
    if return_assistant_tokens_mask and not has_dict:
        raise ValueError("apply_chat_template: got return_assistant_tokens_mask without tokenize and return_dict, "
                         "expected both")  # fmt: skip


def model_inputs(
    chats: Sequence[tuple[Rendered, tokenizers.Encoding]], *, is_batch: bool, return_tensors: str | None,
    return_assistant_tokens_mask: bool,
) -> dict[str, Any]:  # fmt: skip
    """Return input_ids, attention_mask, and assistant_masks if asked for.

    Args:
        chats: each text and its tokens.
        is_batch: return one list for each chat, also for a single one.
        return_tensors: "pt" or "np", (B, T) int64. None: lists.
    Raises:
        ValueError: tensors of chats that have different numbers of tokens.
    """
    rows = {"input_ids": [encoding.ids for _, encoding in chats]}
    rows["attention_mask"] = [[1] * len(ids) for ids in rows["input_ids"]]
    if return_assistant_tokens_mask:
        rows["assistant_masks"] = [assistant_mask(*chat) for chat in chats]
    if return_tensors is None:
        return rows if is_batch else {name: values[0] for name, values in rows.items()}
    if len(counts := {len(ids) for ids in rows["input_ids"]}) > 1:
        raise ValueError(f"apply_chat_template: got chats of {min(counts)} to {max(counts)} tokens, expected the same "
                         "number for return_tensors, since they are not padded")  # fmt: skip
    return {name: TENSORS[return_tensors](values) for name, values in rows.items()}


def assistant_mask(rendered: Rendered, encoding: tokenizers.Encoding) -> list[int]:
    """Return 1 for each token of a `{% generation %}` block and 0 for all others."""
    mask = [0] * len(encoding.ids)
    for start, end in rendered.spans:
        if start < end and (first := encoding.char_to_token(start)) is not None:
            last = encoding.char_to_token(end - 1)
            stop = len(mask) if last is None else last + 1
            mask[first:stop] = [1] * (stop - first)
    return mask
