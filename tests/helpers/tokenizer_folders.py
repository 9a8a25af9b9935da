"""Tiny tokenizer folders of every file format that checkpoints bring."""

import base64
import json

import tokenizers
from hostile_texts import PIECES
from tiny_tokenizers import ALPHABET, BUILDERS, SPECIAL, TEXT
from tokenizers import AddedToken, models, pre_tokenizers, processors, trainers

from peakgpt.engine.data.token_pieces import BYTE_ALPHABET

NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
GENERIC = {"tokenizer_class": "PreTrainedTokenizerFast", **NAMES}
ADDED = {  # ids are far above those of the words, which the library does not mind
    "2000": {"content": "<tool>", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False,
             "special": True},
}  # fmt: skip


def write_json(folder, **contents):
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


# ---- tokenizer.json


def fast(kind, **config):
    """A writer of a tokenizer.json that puts <s> before a text and </s> after it."""

    def write(folder):
        made = BUILDERS[kind]()
        made.add_special_tokens(SPECIAL)
        ids = [(text, made.token_to_id(text)) for text in ("<s>", "</s>")]
        made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ids)
        made.add_tokens([AddedToken("<tool>", special=True, normalized=False)])
        made.save(str(folder / "tokenizer.json"))
        write_json(folder, tokenizer_config={**GENERIC, **config})

    return write


# ---- vocab.json and merges.txt


def write_merges(folder, library):
    """Write the words and merges of a tokenizer as OpenAI did."""
    model = json.loads(library.to_str())["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")


def gpt2_merges(folder):
    write_merges(folder, BUILDERS["byte_level"]())
    write_json(folder, config={"model_type": "gpt2"})


def opt_merges(folder):
    """OPT: </s> before every text."""
    write_merges(folder, BUILDERS["byte_level"]())
    special = {**dict.fromkeys(("bos_token", "eos_token", "unk_token"), "</s>"), "pad_token": "<pad>"}
    write_json(folder, config={"model_type": "opt"}, special_tokens_map=special,
               tokenizer_config={"add_bos_token": True, "tokenizer_class": "GPT2Tokenizer", **special})  # fmt: skip


def gpt1_merges(folder):
    write_merges(folder, BUILDERS["gpt1"]())
    write_json(folder, config={"model_type": "openai-gpt"})


# ---- tokenizer.model


def train_sentencepiece(path, **options):
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in TEXT for line in text.split("\n")]), model_writer=model,
        minloglevel=9, hard_vocab_limit=False, **options,
    )  # fmt: skip
    path.write_bytes(model.getvalue())


LLAMA = {"model_type": "bpe", "byte_fallback": True, "vocab_size": 340, "normalization_rule_name": "identity",
         "remove_extra_whitespaces": False, "split_digits": True, "allow_whitespace_only_pieces": True}  # fmt: skip


def llama_sentencepiece(folder, **config):
    """Llama 2: <s> before every text."""
    train_sentencepiece(folder / "tokenizer.model", **LLAMA)
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, **NAMES, **config}
    write_json(folder, config={"model_type": "llama"}, tokenizer_config=config)


def legacy_llama_sentencepiece(folder):
    llama_sentencepiece(folder, legacy=True, added_tokens_decoder=ADDED)


def unigram_sentencepiece(folder):
    options = {"model_type": "unigram", "vocab_size": 120, "user_defined_symbols": ["<tool>"]}
    train_sentencepiece(folder / "tokenizer.model", **options)


def bpe_sentencepiece(folder):
    train_sentencepiece(folder / "tokenizer.model", **LLAMA)


# ---- tiktoken


def write_tiktoken(path):
    """Write a byte-level vocabulary as tiktoken does; return word -> rank.

    Its words cross the pieces that any expression cuts, so another expression gives other ids. The last word is not
    reached by merges.
    """
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(vocab_size=1000, initial_alphabet=ALPHABET, show_progress=False)
    library.train_from_iterator([*TEXT, *(text + text for text in PIECES if len(text) < 60 and text != "zqx")], trainer)
    words = library.get_vocab()
    names = [*sorted(words, key=words.get), "zqx"]
    ranks = {bytes(map(BYTE_ALPHABET.__getitem__, name)): rank for rank, name in enumerate(names)}
    path.write_bytes(b"".join(base64.b64encode(word) + b" %d\n" % rank for word, rank in ranks.items()))
    return ranks


def llama3_tiktoken(folder):
    """Llama 3: words of tiktoken in tokenizer.model, special tokens above a gap."""
    count = len(write_tiktoken(folder / "tokenizer.model"))
    listed = {count + 2 * i: {"content": text, "special": True} for i, text in enumerate(["<s>", "</s>", "<tool>"])}
    write_json(folder, tokenizer_config={**GENERIC, "added_tokens_decoder": listed, "add_bos_token": True})


CLEAN = {"clean_up_tokenization_spaces": True}
# Those that transformers reads too.
FOLDERS = {
    **{f"{kind} json": fast(kind) for kind in BUILDERS},
    **{f"{kind} clean": fast(kind, **CLEAN) for kind in ("byte_level", "unigram", "wordpiece", "word_level")},
    "gpt1 forced clean": fast(
        "gpt1", clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output=True, **CLEAN
    ),
    **{write.__name__: write for write in (gpt2_merges, opt_merges, gpt1_merges, llama_sentencepiece,
                                           legacy_llama_sentencepiece, llama3_tiktoken)},
}  # fmt: skip
