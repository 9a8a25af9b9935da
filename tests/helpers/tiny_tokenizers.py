"""Tiny tokenizers of every kind that checkpoints bring, trained on a few words by the `tokenizers` library."""

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

TEXT = ["the canary sings a song, é and 日本 more", "Hello world! naïve Straße", "def f(x):\n    return x + 1\n",
        "x ' y , it 's . don n't ? I 'm ! we 've you 're"] * 4
SPECIAL = ["<unk>", "<s>", "</s>"]
ALPHABET = pre_tokenizers.ByteLevel.alphabet()
LLAMA = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]


def byte_level():
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    library.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=320, special_tokens=SPECIAL, show_progress=False,
                                                          initial_alphabet=ALPHABET))  # fmt: skip
    return library


def _bpe_with_fallback():
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    library = tokenizers.Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    library.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=360, show_progress=False, limit_alphabet=30,
                                                          special_tokens=[*SPECIAL, *fallback]))  # fmt: skip
    model = models.BPE(vocab=library.get_vocab(), merges=_merges(library), byte_fallback=True, fuse_unk=True,
                       unk_token="<unk>")  # fmt: skip
    fresh = tokenizers.Tokenizer(model)  # the bytes are words of the model, not added tokens
    fresh.add_special_tokens(SPECIAL)
    return fresh


def _merges(library):
    import json

    merges = json.loads(library.to_str())["model"]["merges"]
    return [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in merges]


def llama():
    """Llama 2: a normalizer writes blanks as U+2581, and unknown characters are bytes."""
    library = _bpe_with_fallback()
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.decoder = decoders.Sequence([*LLAMA, decoders.Strip(" ", 1, 0)])
    return library


def gemma():
    """As Llama 2, without a blank before the text; runs of blanks are added tokens that the model has too."""
    library = _bpe_with_fallback()
    library.normalizer, library.decoder = normalizers.Replace(" ", "▁"), decoders.Sequence(LLAMA)
    library.add_tokens([tokenizers.AddedToken("▁▁", normalized=False)])
    return library


def unigram():
    library = tokenizers.Tokenizer(models.Unigram())
    library.pre_tokenizer, library.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    library.train_from_iterator(TEXT, trainers.UnigramTrainer(vocab_size=120, special_tokens=SPECIAL, unk_token="<unk>",
                                                              show_progress=False))  # fmt: skip
    return library


def wordpiece():
    library = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
    library.pre_tokenizer, library.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    library.train_from_iterator(TEXT, trainers.WordPieceTrainer(vocab_size=160, special_tokens=SPECIAL,
                                                                show_progress=False))  # fmt: skip
    return library


def gpt1():
    """GPT-1: lower case, and the end of a word is a part of its last token."""
    library = tokenizers.Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<unk>"))
    library.normalizer = normalizers.BertNormalizer(lowercase=True)
    library.pre_tokenizer, library.decoder = pre_tokenizers.BertPreTokenizer(), decoders.BPEDecoder()
    library.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=160, special_tokens=SPECIAL, show_progress=False,
                                                          end_of_word_suffix="</w>"))  # fmt: skip
    return library


def word_level():
    """Words without a decoder, which the library joins by blanks."""
    library = tokenizers.Tokenizer(models.WordLevel(unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.train_from_iterator(TEXT, trainers.WordLevelTrainer(special_tokens=SPECIAL, show_progress=False))
    return library


BUILDERS = {f.__name__: f for f in (byte_level, llama, gemma, unigram, wordpiece, gpt1, word_level)}
EXACT = ("byte_level", "llama", "gemma")  # every text decodes to itself
