"""How llama.cpp cuts a text into pieces before byte-pair encoding, by the name in tokenizer.ggml.pre.

The expressions are applied one after the other, each to the pieces of the one before. They are those of
llama-vocab.cpp of llama.cpp, where it has replaced them with slower equivalents those of the published tokenizer.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from tokenizers import Regex, normalizers, pre_tokenizers


class PreTokenizer(NamedTuple):
    """One way to cut a text.

    Args:
        patterns: expressions whose matches are pieces, and so is what is between them.
        nfc: whether the published tokenizers normalize a text first, which llama.cpp does not.
        ignore_merges: whether a piece that is a token needs no merges.
        add_bos: whether a text begins with BOS if the file does not say it.
    """

    patterns: tuple[str, ...]
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _cased(suffix: str, digits: str) -> str:
    """Return the expression of GPT-4o's family: words end where lower case changes to upper case."""
    start = r"[^\r\n\p{L}\p{N}]?"
    words = f"{start}{_UPPER}*{_LOWER}+{suffix}|{start}{_UPPER}+{_LOWER}*{suffix}"
    return f"{words}|{digits}|{_CASED_REST}"


_PLAIN = PreTokenizer((_GPT2,))
_NEOX = PreTokenizer((_GPT2,), nfc=True)
_DIGITS = PreTokenizer((r"\p{N}", _GPT2))
_BLOOM = PreTokenizer((r" ?[^(\s|.,!?…。，、।۔،)]+",))  # noqa: RUF001
_THREE_DIGITS = PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True)
_ONE_DIGIT = PreTokenizer((_QWEN2,), nfc=True)
_O200K = PreTokenizer((_cased("(?i:'s|'t|'re|'ve|'m|'ll|'d)?", r"\p{N}{1,3}"),))
PRE_TOKENIZERS = {
    "gpt-2": _PLAIN, "phi-2": _PLAIN, "jais": _PLAIN, "olmo": _NEOX, "mpt": _NEOX,
    "starcoder": _DIGITS, "smollm": _DIGITS, "refact": _DIGITS, "command-r": _DIGITS, "codeshell": _DIGITS,
    "exaone": _DIGITS, "minerva-7b": _DIGITS,
    "bloom": _BLOOM, "gpt3-finnish": _BLOOM, "poro-chat": _BLOOM,
    "llama-bpe": _THREE_DIGITS, "llama3": _THREE_DIGITS, "llama-v3": _THREE_DIGITS, "falcon3": _THREE_DIGITS,
    "pixtral": _THREE_DIGITS, "midm-2.0": _THREE_DIGITS,
    "dbrx": PreTokenizer((_LLAMA3,)), "smaug-bpe": PreTokenizer((_LLAMA3,)),
    "qwen2": _ONE_DIGIT, "deepseek-r1-qwen": PreTokenizer((_QWEN2,)), "megrez": PreTokenizer((_QWEN2,)),
    "stablelm2": PreTokenizer((_QWEN2,)),
    "tekken": PreTokenizer((_cased("", r"\p{N}"),), ignore_merges=True, add_bos=True),
    "gpt-4o": _O200K, "llama4": _O200K,
    "falcon": PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
    "deepseek-coder": PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}")),
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
}  # fmt: skip


def build_pre_tokenizer(pre: PreTokenizer) -> pre_tokenizers.PreTokenizer:
    """Return the pre-tokenizer of the `tokenizers` library for a byte-level vocabulary."""
    if pre.patterns == (_GPT2,):  # the library has it, and it is known to cut only at blanks
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def build_normalizer(pre: PreTokenizer) -> normalizers.Normalizer | None:
    """Return the normalizer that belongs to it, if there is one."""
    return normalizers.NFC() if pre.nfc else None


def pre_tokenizer_name(tokenizer: Mapping[str, Any]) -> str | None:
    """Return the name of the row that cuts a text as a tokenizer of the library does; None if no row does.

    Args:
        tokenizer: the content of a tokenizer.json.
    """
    patterns = _patterns(tokenizer.get("pre_tokenizer") or {})
    fitting = {name: pre for name, pre in PRE_TOKENIZERS.items() if patterns and pre.patterns == tuple(patterns)}
    ignores = tokenizer["model"].get("ignore_merges") is True
    nfc = (tokenizer.get("normalizer") or {}).get("type") == "NFC"
    misfit = {name: (pre.ignore_merges != ignores, pre.nfc != nfc) for name, pre in fitting.items()}
    return min(misfit, key=misfit.__getitem__, default=None)


def _patterns(part: Mapping[str, Any]) -> list[str] | None:
    """Return the expressions of a pre-tokenizer; None for one that they cannot express."""
    kind = part.get("type")
    if kind == "Sequence":
        lists = [_patterns(one) for one in part["pretokenizers"]]
        return None if None in lists else [pattern for patterns in lists if patterns for pattern in patterns]
    if kind == "ByteLevel" and not part["add_prefix_space"]:
        return [_GPT2] if part["use_regex"] else []
    if kind == "Digits" and part["individual_digits"]:
        return [r"\p{N}"]
    is_plain = kind == "Split" and part["behavior"] in ("Isolated", "Removed") and "Regex" in part["pattern"]
    # tiktoken's way: the matches are the pieces, and nothing is between them
    removed = is_plain and part["behavior"] == "Removed"
    return [part["pattern"]["Regex"]] if is_plain and removed == part["invert"] else None
