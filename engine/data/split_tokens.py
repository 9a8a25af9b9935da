"""A copy of a tokenizer for which a special token that is written in a text is text like any other."""

from __future__ import annotations

import json
from typing import Any

import tokenizers

from peakgpt.engine.data.library_call import call


def splitting_copy(library: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Return a copy that has no special tokens in texts, as with transformers' split_special_tokens.

    The library does not look for special tokens then. But a Unigram or word-level model that has them in its vocabulary
    would still find them; the copy has other names for them.
    """
    content = call(library.to_str)
    copy = _without_special_tokens(content)
    special = [(index, t.content) for index, t in library.get_added_tokens_decoder().items() if t.special]
    if not any(index in call(copy.encode, text, add_special_tokens=False).ids for index, text in special):
        return copy
    fields = json.loads(content)
    renamed = {text: f"\0{text}" for _, text in special if text != fields["model"].get("unk_token")}
    fields["model"]["vocab"] = _renamed(fields["model"]["vocab"], renamed)
    if "merges" in fields["model"]:  # a merge that makes a special token would find it too
        fields["model"]["merges"] = [merge for merge in fields["model"]["merges"] if _merged(merge) not in renamed]
    return _without_special_tokens(json.dumps(fields))


def _without_special_tokens(content: str) -> tokenizers.Tokenizer:
    copy = tokenizers.Tokenizer.from_str(content)
    copy.encode_special_tokens = True
    return copy


def _renamed(vocabulary: Any, names: dict[str, str]) -> Any:
    if isinstance(vocabulary, dict):
        return {names.get(word, word): index for word, index in vocabulary.items()}
    return [[names.get(word, word), score] for word, score in vocabulary]


def _merged(merge: str | list[str]) -> str:
    """Return the token that a merge of byte-pair encoding makes; older files have the pair as one string."""
    return "".join(merge.split(" ") if isinstance(merge, str) else merge)
