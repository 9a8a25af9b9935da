"""The attention function of `attn_implementation="peakgpt"`, and the compact mask that it takes.

`mask_function.py` makes the masks and registers both functions in transformers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peakgpt.dropin.attention_weights import attention_and_weights
from peakgpt.dropin.intact import dropout_rate
from peakgpt.kernels.ops.attention import attention

NAME = "peakgpt"  # attn_implementation
# Keyword arguments that models pass to every attention function and that do not change attention.
IGNORED_KEYWORDS = frozenset({
    "position_ids", "cache_position", "use_cache", "num_items_in_batch", "ignore_index", "shift_labels",
    "output_hidden_states", "output_router_logits", "return_dict", "max_length_q", "max_length_k", "cu_seq_lens_k",
})  # fmt: skip
NO_MASK_ARITHMETIC = (
    'this model applies its mask itself, so that attn_implementation="peakgpt" would never run: '
    'got a model without AttentionInterface, expected peakgpt.patch(model) or attn_implementation="eager"'
)


class Mask(NamedTuple):
    """A (B, 1, T, S) attention mask in compact form. For T != S the last query is aligned with the last key.

    Args:
        causal: query i does not see later keys.
        window: number of keys that a query sees, its own position included.
        start, length: (B,) int64, the range of valid keys of each sequence.
        keys: (B, S) bool, valid keys. Used if they are not one range, and under torch.compile, which cannot read them.
        documents: (N + 1,) int64 offsets of packed documents in the B * T tokens of the batch.
        unpacked: bool tensor that must be true at run time, which is asserted. torch.compile cannot read position_ids,
            so they must not hold packed documents.
    """

    causal: bool
    window: int | None = None
    start: Tensor | None = None
    length: Tensor | None = None
    keys: Tensor | None = None
    documents: Tensor | None = None
    unpacked: Tensor | None = None

    ndim = 0  # Falcon adds ALiBi to masks of 4 dimensions

    def to(self, *_):
        """Return the mask itself: MPT converts its mask to bool."""
        return self

    def __radd__(self, other):
        raise TypeError(NO_MASK_ARITHMETIC)

    __add__ = __radd__

    def __getattr__(self, name: str):  # called if a model uses the mask as a tensor
        raise AttributeError(NO_MASK_ARITHMETIC)


def is_known_mask(mask: Any) -> bool:
    """Return whether `attention_forward` takes this mask. set_attn_implementation may select a function with others."""
    return mask is None or isinstance(mask, Mask) or (isinstance(mask, Tensor) and mask.dim() == 4)


class _Recorder:
    """Tells whether transformers collects the attention weights of this call.

    Some models do not pass output_attentions on to the attention function. `register_attention` sets `collector` to
    the variable in which transformers keeps what it collects.
    """

    collector: Any = None

    def wants_weights(self) -> bool:
        outputs = None if self.collector is None else self.collector.get()
        return bool(outputs) and "attentions" in outputs


RECORDER = _Recorder()


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Mask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    position_bias: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    seq_idx: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    output_attentions: bool | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """Compute attention for a module of transformers, with the signature of its AttentionInterface.

    Args:
        module: the attention module. Only its `is_causal` is read.
        query: (B, H, T, D). key, value: (B, K, S, D).
        attention_mask: a Mask; or a dense (B or 1, H or 1, T, S) tensor, bool or additive; or None. With
            None the mask is causal if `is_causal` (default: that of the module) is true. A single query then sees all
            keys. For 1 < T < S only the first T keys are used: a prompt in a static cache.
        dropout, scaling: `dropout` and `scale` of `peakgpt.attention`. scaling None means 1 / sqrt(D).
        position_bias: (1 or B, H, T, S), added to the scores. It receives a gradient.
        cu_seq_lens_q: (N + 1,) offsets of packed documents, for B = 1. Overrides documents derived from position_ids.
        seq_idx: (B, T) integers, the number of the packed document of each token. Used if neither cu_seq_lens_q nor
            position_ids give the documents.
        softcap, s_aux: `softcap` and `sinks` of `peakgpt.attention`.
        output_attentions: return the attention weights too. Eager torch computes them, in (T, S) memory.
        others: arguments in IGNORED_KEYWORDS are ignored; any other that is not None or False raises.
    Returns:
        (B, T, H, D), and the attention weights, (B, H, T, S) after dropout, or None if they are not required.
    Raises:
        ValueError: an unknown option, or a combination that is not supported.
    """
    _reject_unknown(others)
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    queries = q.shape[1]
    if attention_mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if causal and 1 < queries < k.shape[1]:
            k, v = k[:, :queries], v[:, :queries]
            position_bias = None if position_bias is None else position_bias[..., :queries]
        attention_mask = Mask(causal, sliding_window if causal else None)
    if seq_idx is not None and cu_seq_lens_q is None and isinstance(attention_mask, Mask):
        attention_mask = with_documents(attention_mask, seq_idx)
    return masked_attention(
        q, k, v, attention_mask, position_bias, cu_seq_lens_q, scale=scaling, softcap=softcap, dropout=dropout,
        sinks=s_aux, weights=bool(output_attentions) or RECORDER.wants_weights(),
    )  # fmt: skip


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | Tensor,
    bias: Tensor | None = None,
    documents: Tensor | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    dropout: float | nn.Module = 0.0,
    window: int | None = None,
    alibi: Tensor | None = None,
    sinks: Tensor | None = None,
    weights: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Call `peakgpt.attention` on (B, T, H, D) tensors with a compact or dense mask.

    Args:
        dropout: a rate, or the module that drops attention weights.
        weights: return the weights too.
    Returns:
        (B, T, H, D), and the weights, (B, H, T, S), or None. A query that sees no key gives zeros in both.
    """
    if isinstance(mask, Tensor):
        if documents is not None:
            raise ValueError("attention: got a dense mask and packed documents, expected one of them")
        bias, mask = _sum(bias, additive_mask(mask, q)), Mask(False)
    windows = [w for w in (window, mask.window) if w is not None]
    documents = mask.documents if documents is None else documents
    options = {"causal": mask.causal, "window": min(windows) if windows else None, "scale": scale, "softcap": softcap,
               "alibi": alibi, "sinks": sinks, "kv_start": mask.start, "kv_len": mask.length,
               "cu_seqlens": documents}  # fmt: skip
    if mask.unpacked is not None and documents is None:
        torch._assert_async(mask.unpacked, "packed position_ids while compiling: expected cu_seq_lens_q with them")
    if documents is not None and not (bias is mask.start is mask.keys is None):
        raise ValueError("attention: got packed documents with padding or a position bias, expected neither")
    if mask.keys is not None:
        bias = _sum(bias, additive_mask(mask.keys[:, None, None], q))
    bias = expand_bias(bias, q, k)
    rate = dropout_rate(dropout) if isinstance(dropout, nn.Module) else dropout
    if weights or rate is None:
        y, p = attention_and_weights(q, k, v, bias=bias, dropout=dropout, **options)
        return y, p if weights else None
    if documents is None:
        options["causal"] &= q.shape[1] > 1  # one query sees every key, and backends are faster without a mask
        return attention(q, k, v, bias=bias, dropout=rate, **options), None
    packed = [t.reshape(1, -1, *t.shape[2:]) for t in (q, k, v)]
    return attention(*packed, dropout=rate, **options).view(q.shape), None


def _reject_unknown(others: dict[str, Any]) -> None:
    for name, value in others.items():
        if value is not None and value is not False and name not in IGNORED_KEYWORDS:
            raise ValueError(
                f'attn_implementation="peakgpt": got {name}={type(value).__name__}, expected None: '
                "peakgpt does not know this option"
            )


def additive_mask(mask: Tensor, q: Tensor) -> Tensor:
    """Return a mask to be added to the scores of queries q, -inf for what is masked.

    Args:
        mask: bool, True for live keys; or additive, with -inf or the lowest value of its dtype for masked keys.
    """
    if mask.dtype == torch.bool:
        kind = q.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else q.dtype
        return mask.new_zeros(mask.shape, dtype=dtype).masked_fill(~mask, float("-inf"))
    # Half of the lowest value: in float16 a model may have added a position bias to its mask. A weight under it is 0
    # anyway, except for a query that sees no key.
    return mask.masked_fill(mask <= torch.finfo(mask.dtype).min / 2, float("-inf"))


def with_documents(mask: Mask, numbers: Tensor) -> Mask:
    """Add packed documents to a mask that has none; `numbers`, (B, T), has the number of the document of each token."""
    if mask.documents is not None:
        return mask
    if torch.compiler.is_compiling():  # the number of documents would be the length of a tensor
        unpacked = (numbers[:, 1:] == numbers[:, :-1]).all()
        return mask._replace(unpacked=unpacked if mask.unpacked is None else unpacked & mask.unpacked)
    return mask._replace(documents=document_offsets(numbers))


def document_offsets(numbers: Tensor) -> Tensor:
    """Turn document numbers, (B, T), into offsets, (N + 1,), over the flattened batch."""
    starts = torch.ones_like(numbers, dtype=torch.bool)
    starts[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
    return torch.cat((starts.flatten().nonzero()[:, 0], starts.new_tensor([numbers.numel()], dtype=torch.long)))


def _sum(bias: Tensor | None, mask: Tensor) -> Tensor:
    return mask if bias is None else bias + mask


def expand_bias(bias: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """Expand the bias to all queries and keys, as a view without new memory."""
    return None if bias is None else bias.expand(-1, -1, q.shape[1], k.shape[1])
