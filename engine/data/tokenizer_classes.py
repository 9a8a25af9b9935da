"""The tokenizer classes that transformers builds anew from the words of a vocabulary.

AutoTokenizer takes the words and merges of tokenizer.json, or of an older file, and builds the rest itself for these
classes: normalizer, pre-tokenizer, decoder. The table has the classes of our families, and Llama's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

GPT2_TOKENS = {**dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"), "pad_token": None}
WORD_END = "</w>"  # of GPT-1's words


def _openai_gpt(library: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
    library.normalizer = normalizers.BertNormalizer(lowercase=True)
    library.pre_tokenizer, library.decoder = pre_tokenizers.BertPreTokenizer(), decoders.BPEDecoder(suffix=WORD_END)


def _gpt2(library: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
    library.normalizer = None
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=config.get("add_prefix_space") is True)
    library.decoder = decoders.ByteLevel()


def _gpt_neox(library: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
    _gpt2(library, config)
    library.normalizer, library.post_processor = normalizers.NFC(), None


def _llama(library: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
    prefix = config.get("add_prefix_space") is not False
    scheme = "never" if not prefix else "always" if config.get("legacy") else "first"
    library.normalizer = None
    library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    library.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if prefix else parts)


Build = Callable[[tokenizers.Tokenizer, Mapping[str, Any]], None]
# Class, without "Fast" -> how it is built, and names and texts of its special tokens where no file names them.
CLASSES: dict[str, tuple[Build, dict[str, str | None]]] = {
    "OpenAIGPTTokenizer": (_openai_gpt, {"unk_token": "<unk>"}),
    "GPT2Tokenizer": (_gpt2, GPT2_TOKENS),
    "GPTNeoXTokenizer": (_gpt_neox, {**GPT2_TOKENS, "pad_token": "<|padding|>"}),
    "LlamaTokenizer": (_llama, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}),
}
_CLASS_OF_FAMILY = {
    "openai-gpt": "OpenAIGPTTokenizer",
    **dict.fromkeys(("gpt2", "gpt_neo", "gptj", "opt"), "GPT2Tokenizer"),
    "gpt_neox": "GPTNeoXTokenizer",
    "llama": "LlamaTokenizer",
    **dict.fromkeys(("", "peakgpt")),  # the class that tokenizer_config.json names
}


def class_name(library: tokenizers.Tokenizer, config: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    """Return the class that AutoTokenizer would take, if it is one of `CLASSES`, else "".

    Args:
        library: the tokenizer of tokenizer.json or of an older file.
        config, model: contents of tokenizer_config.json and config.json.
    """
    family = str(model.get("model_type") or "")
    if family not in _CLASS_OF_FAMILY:  # such as mistral, which names Llama's class: tokenizer.json as it is
        return ""
    named = config.get("tokenizer_class") or model.get("tokenizer_class") or _CLASS_OF_FAMILY[family]
    name = str(named).removesuffix("Fast")
    is_bytes = isinstance(library.decoder, decoders.ByteLevel)  # Llama 3 names Llama 2's class
    return "" if name not in CLASSES or (name == "LlamaTokenizer" and is_bytes) else name


def class_of_merges(model: models.BPE) -> str:
    """Return the class of a folder that names none, with vocab.json and merges.txt."""
    return "OpenAIGPTTokenizer" if model.end_of_word_suffix else "GPT2Tokenizer"
