"""The three tokens that GPT-1's input transformations add to a vocabulary, after its last token:

    _start_   before the first text        _delimiter_   between two texts        _classify_   after the last text

The head reads the hidden state of _classify_. Radford et al. 2018, "Improving Language Understanding by Generative
Pre-Training", section 3.3; the names and their order are those of the published code, finetune-transformer-lm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import tokenizers
from tokenizers import AddedToken, processors

from peakgpt.engine.data.library_call import call
from peakgpt.engine.data.tokenizer import Tokenizer

START, DELIMITER, EXTRACT = SPECIAL_TOKENS = ("_start_", "_delimiter_", "_classify_")


@dataclass(frozen=True)
class TaskTokens:
    """A tokenizer with the added tokens, and their ids.

    Args:
        tokenizer: `encode` of one text gives the sequence of a task with one text.
        before: ids that the tokenizer itself puts before each text, such as BOS.
        start, delimiter, extract: the added tokens.
        pad: fills the end of a row. It is not `extract`, which must be the last token that is no padding.
        first_new: ids from this one on have no trained embedding.
        has_extract: whether a sequence ends with `extract`.
    """

    tokenizer: Tokenizer
    before: tuple[int, ...]
    start: int
    delimiter: int
    extract: int
    pad: int
    first_new: int
    has_extract: bool = True

    def sequence(self, *texts: Sequence[int]) -> list[int]:
        """Return the ids of a sequence: those of all texts, with the tokens around and between them."""
        ids = [*self.before, self.start]
        for number, text in enumerate(texts):
            ids += [self.delimiter, *text] if number else text
        return [*ids, self.extract] if self.has_extract else ids

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode texts without anything around them. A special token that is written in a text stays text."""
        return self.tokenizer.encode_batch(texts, add_special_tokens=False, split_special_tokens=True)


def add_task_tokens(source: Tokenizer, *, has_extract: bool = True) -> TaskTokens:
    """Return a copy of a tokenizer with the tokens of the tasks; those that it has already are kept.

    The copy writes them around one text and between two, so that transformers makes the same sequences from its files.

    Args:
        source: not changed.
        has_extract: whether a sequence ends with the token that the head reads.
    Raises:
        ValueError: the vocabulary has gaps, and a new token would get the id of another one.
    """
    old = {text: token for text in SPECIAL_TOKENS if (token := source.library.token_to_id(text)) is not None}
    before = [token for token in source.start_ids if token not in old.values()]  # the source may be such a copy
    library = tokenizers.Tokenizer.from_str(call(source.library.to_str))
    call(library.add_special_tokens, [AddedToken(text, normalized=False) for text in SPECIAL_TOKENS])
    ids = {text: library.token_to_id(text) for text in SPECIAL_TOKENS}
    for text in ids.keys() - old.keys():
        if ids[text] < source.vocab_size:
            raise ValueError(f"tokenizer: got id {ids[text]} for the new token {text}, expected {source.vocab_size} or "
                             "more: the vocabulary has gaps")  # fmt: skip
    names = [library.id_to_token(token) for token in before]
    library.post_processor = _template(names, {**ids, **dict(zip(names, before, strict=True))}, has_extract)
    pad = source.chat.special_tokens.get("pad_token") or source.end_of_text or START
    return TaskTokens(
        source.extended(library, {"pad_token": pad}), tuple(before), *ids.values(), pad=library.token_to_id(pad),
        first_new=source.vocab_size, has_extract=has_extract,
    )  # fmt: skip


def _template(before: Sequence[str], ids: Mapping[str, int], has_extract: bool) -> processors.TemplateProcessing:
    """Return a post-processor that writes the sequence of one text, and of two.

    Args:
        before: tokens before `_start_`.
        ids: of all tokens that it writes.
        has_extract: whether a sequence ends with the token that the head reads.
    """
    single = [*before, START, "$A"]
    end = [EXTRACT] if has_extract else []
    tokens = [(text, token) for text, token in ids.items()]
    return processors.TemplateProcessing(
        single=[*single, *end], pair=[*single, DELIMITER, "$B", *end], special_tokens=tokens
    )
