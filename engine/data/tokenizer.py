"""Byte-level byte-pair encoding, GPT-2 style, with the `tokenizers` library.

Every byte is written as a printable character. GPT-2's regular expression cuts the text into pieces, and the most
frequent neighboring pairs inside the pieces are merged. Any text can be encoded, and decodes to itself.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.2; Sennrich, Haddow,
Birch 2015, "Neural Machine Translation of Rare Words with Subword Units", arXiv:1508.07909.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import takewhile
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from peakgpt.engine.data.documents import Document
from peakgpt.engine.data.encoding import cut_text, encode_parts
from peakgpt.engine.data.library_call import call, call_interruptibly
from peakgpt.engine.data.run_layout import model_folder
from peakgpt.engine.data.token_pieces import BYTE_ALPHABET, EMPTY, TokenPieces
from peakgpt.engine.data.tokenizer_files import CONFIG, TOKENIZER, read_folder

END_OF_TEXT = "<|endoftext|>"
MIN_VOCAB_SIZE = 257  # every byte, and the end of text
MAX_VOCAB_SIZE = 1 << 20  # the largest of published models are 2**18; the library allocates for all of it at once
MAX_WORD_BYTES = 2048  # the time of learning merges is quadratic in the longest word


class Tokenizer:
    """Converts text to token ids and back; `end_id` is the end-of-text id, included in `vocab_size`."""

    def __init__(
        self, library: tokenizers.Tokenizer, end_of_text: str = END_OF_TEXT,
        side_files: Mapping[str, bytes] | None = None,
    ):  # fmt: skip
        """
        Args:
            library: its truncation and padding are turned off.
            end_of_text: the token that ends a text; a word of the library.
            side_files: relative path -> content of the files that `save` writes besides tokenizer.json. None: a
                tokenizer_config.json for GPT-2's class.
        """
        end_id = library.token_to_id(end_of_text)
        if end_id is None:
            raise ValueError(f"tokenizer: got a vocabulary without {end_of_text!r}, expected it as the end of text")
        self.library, self.end_of_text, self.end_id = library, end_of_text, end_id
        self.pieces = TokenPieces(library)
        self._side_files = {CONFIG: _gpt2_config(end_of_text)} if side_files is None else dict(side_files)
        library.no_truncation()
        library.no_padding()
        cutter = library.pre_tokenizer
        self.can_cut = isinstance(cutter, pre_tokenizers.ByteLevel) and not cutter.add_prefix_space

    @property
    def vocab_size(self) -> int:
        return self.library.get_vocab_size()

    @cached_property
    def start_ids(self) -> list[int]:
        """The ids that `encode` puts before a text, such as BOS."""
        parts = call(self.library.encode, "a")
        count = len(list(takewhile(lambda sequence: sequence is None, parts.sequence_ids)))
        return parts.ids[:count]

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Encode text. A special token in the text, such as the end-of-text mark, becomes its id.

        Args:
            text: anything that UTF-8 can hold.
            add_special_tokens: add what the tokenizer puts around a text, such as BOS. GPT-2's adds nothing. A
                rendered chat template brings its own, so it is encoded without.
        Raises:
            ValueError: a lone surrogate, or the library fails, such as a regular expression that takes too long.
        """
        # A batch of one: `encode` takes twice as long, because it counts offsets, and holds the GIL all the time.
        return call(self.library.encode_batch_fast, [text], add_special_tokens=add_special_tokens)[0].ids

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """Encode texts on all cores; see `encode`."""
        encodings = call(self.library.encode_batch_fast, list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]

    def encode_documents(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        """Encode documents of training data on all cores; see `encode_parts`.

        Returns:
            An iterator of int64 arrays; their concatenation is the token stream.
        """
        parts = (("documents", Document.of("", text)) for text in texts)
        return (piece.ids for piece in encode_parts(parts, self) if piece.ids is not None)

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of all that decides the ids of a text."""
        return hashlib.sha256(call(self.library.to_str).encode()).hexdigest()

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids; the end-of-text id becomes its mark, bytes that are not UTF-8 become U+FFFD.

        An id beyond the vocabulary is empty text, as in transformers: many models have more rows than tokens.

        Raises:
            ValueError: an id below 0 or above 2**32 - 1.
        """
        stream = StreamDecoder(self)
        return b"".join(map(stream.next_bytes, map(int, ids))).decode(errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes that one token adds to a text; none for an id beyond the vocabulary."""
        return self.pieces[int(token)].later

    def save(self, folder: Path | str) -> None:
        """Write tokenizer.json and its side files, which transformers loads from a checkpoint folder."""
        call(self.library.save, str(Path(folder, TOKENIZER)))
        for name, content in self._side_files.items():
            Path(folder, name).parent.mkdir(exist_ok=True)
            Path(folder, name).write_bytes(content)

    @classmethod
    def load(cls, folder: Path | str) -> Tokenizer:
        """Read the tokenizer of a checkpoint folder, as transformers' AutoTokenizer does.

        Raises:
            ValueError: tokenizer.json is missing, a file is damaged, or the decoder is not supported.
        """
        files = read_folder(model_folder(folder))
        try:
            return cls(files.library, files.special_tokens.get("eos_token") or END_OF_TEXT, files.side_files)
        except ValueError as error:
            raise ValueError(f"tokenizer {Path(folder, TOKENIZER)}: {error}") from None


class StreamDecoder:
    """Decodes ids one at a time; the bytes of an incomplete character wait for the next id.

    The results of `feed` and `finish` together are `Tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._pieces, self._is_first, self._tail = tokenizer.pieces, True, b""
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> str:
        """Add one id; return the text that it completes, which may be empty."""
        return self._utf8.decode(self.next_bytes(token))

    def finish(self) -> str:
        """Return the rest of the text: U+FFFD if the last character is incomplete."""
        return self._utf8.decode(b"", final=True)

    def next_bytes(self, token: int) -> bytes:
        """Add one id; return the bytes that it adds to the text."""
        piece = self._pieces[token]
        if piece is EMPTY:
            return b""
        data = piece.first if self._is_first else self._tail + piece.later
        self._is_first, self._tail = False, piece.tail
        return data


class TokenOffsets(StreamDecoder):
    """Finds where each token begins in the decoded text, in characters (`text_offset` of OpenAI).

    A token that continues a character begins where that character begins. Example, with a token of two bytes and one
    of one byte for the euro sign, and then " cat":

        >>> offsets = TokenOffsets(tokenizer)
        >>> [offsets.locate(token) for token in tokenizer.encode("\u20ac cat")]
        [0, 0, 1]
    """

    def __init__(self, tokenizer: Tokenizer, start: int = 0):
        """
        Args:
            start: number of characters before the first token.
        """
        super().__init__(tokenizer)
        self.position = start  # characters that are complete

    def locate(self, token: int) -> int:
        """Add one id; return the position of the character that its first byte belongs to."""
        data = self.next_bytes(token)
        begun = len(self._utf8.decode(data[:1]))
        is_complete = begun and not self._utf8.getstate()[0]  # else the first byte waits for the rest of its character
        offset = self.position + begun - (1 if is_complete else 0)
        self.position += begun + len(self._utf8.decode(data[1:]))
        return offset


def token_offsets(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
    """Return for each token the position in `tokenizer.decode(ids)` where it begins, in characters."""
    offsets = TokenOffsets(tokenizer)
    return [offsets.locate(token) for token in ids]


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


def _gpt2_config(end_of_text: str) -> bytes:
    """Return a tokenizer_config.json for GPT-2's class."""
    config = {
        "tokenizer_class": "GPT2TokenizerFast",
        **dict.fromkeys(("bos_token", "eos_token", "unk_token"), end_of_text),
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
    }
    return (json.dumps(config, indent=2) + "\n").encode()
