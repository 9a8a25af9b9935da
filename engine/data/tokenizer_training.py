"""Learn a byte-level vocabulary of merges from text: byte-pair encoding, GPT-2 style.

Every byte is written as a printable character. GPT-2's regular expression cuts the text into pieces, and the most
frequent neighboring pairs inside the pieces are merged. Any text can be encoded, and decodes to itself.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.2; Sennrich, Haddow,
Birch 2015, "Neural Machine Translation of Rare Words with Subword Units", arXiv:1508.07909.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from peakgpt.engine.data.encoding import cut_text
from peakgpt.engine.data.library_call import call_interruptibly
from peakgpt.engine.data.token_pieces import BYTE_ALPHABET
from peakgpt.engine.data.tokenizer import END_OF_TEXT, Tokenizer

MIN_VOCAB_SIZE = 257  # every byte, and the end of text
MAX_VOCAB_SIZE = 1 << 20  # the largest of published models are 2**18; the library allocates for all of it at once
MAX_WORD_BYTES = 2048  # the time of learning merges is quadratic in the longest word


def train_tokenizer(
    texts: Iterable[str], vocab_size: int = 4096, *, report: Callable[[str], None] | None = None
) -> Tokenizer:
    """Learn a vocabulary of merges from text.

    Args:
        texts: the documents of the training split.
        vocab_size: bytes, end of text and merges together; a short text may give a smaller vocabulary.
        report: called with a line about the progress every 10 s.
    Raises:
        ValueError: vocab_size is not from 257 to 2**20.
    """
    if not MIN_VOCAB_SIZE <= vocab_size <= MAX_VOCAB_SIZE:
        raise ValueError(f"vocab_size: got {vocab_size}, expected at least {MIN_VOCAB_SIZE} (256 bytes, end of text) "
                         f"and at most {MAX_VOCAB_SIZE}")  # fmt: skip
    texts = list(texts)
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    if any(map(_may_have_long_word, texts)):
        library.pre_tokenizer = _cutting_long_words(library.pre_tokenizer)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(BYTE_ALPHABET),
        show_progress=False,
    )
    _learn_merges(library, trainer, texts, report)
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return Tokenizer(library)


def _learn_merges(
    library: tokenizers.Tokenizer, trainer: trainers.Trainer, texts: list[str], report: Callable[[str], None] | None
) -> None:
    stop, read_chars, total = threading.Event(), 0, sum(map(len, texts))

    def pieces() -> Iterator[str]:
        nonlocal read_chars
        for text in texts:
            for piece, _ in cut_text([text]):
                if stop.is_set():
                    return
                read_chars += len(piece)
                yield piece

    def progress(seconds: float) -> None:
        doing = "learns merges" if read_chars == total else "reads text"
        if report:
            report(f"tokenizer: {doing}, {read_chars / 1e6:.1f} of {total / 1e6:.1f} million characters read, "
                   f"{seconds:.0f} s")  # fmt: skip

    call_interruptibly(library.train_from_iterator, pieces(), trainer, report=progress, stop=stop)


def _may_have_long_word(text: str) -> bool:
    """Return False if no word of the text has more than MAX_WORD_BYTES bytes; quick, and sometimes True without need.

    A word is visible characters or blanks alone. A long one has at least a quarter of MAX_WORD_BYTES characters, so it
    fills one of the blocks of half that size. Python takes U+001C to U+001F for blanks, GPT-2's expression does not.
    """
    if any(char in text for char in "\x1c\x1d\x1e\x1f"):
        return True
    size = MAX_WORD_BYTES // 8
    blocks = (text[start : start + size] for start in range(0, len(text), size))
    return any(len(block) == size and block.split() in ([], [block]) for block in blocks)


def _cutting_long_words(words: pre_tokenizers.PreTokenizer) -> pre_tokenizers.PreTokenizer:
    """Cut words, whose bytes are characters here, at MAX_WORD_BYTES; shorter ones stay as they are."""
    chunks = Regex(rf"[\s\S]{{1,{MAX_WORD_BYTES}}}")
    return pre_tokenizers.Sequence([words, pre_tokenizers.Split(chunks, "isolated")])
