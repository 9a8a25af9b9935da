"""Read the tokenizer files of a checkpoint folder as transformers' AutoTokenizer does.

    tokenizer.json              the tokenizer: words, added tokens, and the special tokens put around a text
    tokenizer_config.json       names of the special tokens, more added tokens, the class
    special_tokens_map.json     names of the special tokens, in older checkpoints
    added_tokens.json           more added tokens, in older checkpoints
    config.json                 the class, if tokenizer_config.json does not name it

transformers builds some classes anew from the words of tokenizer.json; `_CLASSES` has those of our families and Llama.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, normalizers, pre_tokenizers

from peakgpt.engine.data.library_call import call
from peakgpt.engine.data.text_file import read_text

TOKENIZER, CONFIG, SPECIAL_MAP, ADDED = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
)  # fmt: skip
CHAT_TEMPLATE, CHAT_TEMPLATES = "chat_template.jinja", "additional_chat_templates"
NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
GPT2_TOKENS = {**dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"), "pad_token": None}


@dataclass(frozen=True)
class TokenizerFolder:
    """The contents of a checkpoint's tokenizer files.

    Args:
        library: the tokenizer, with all added tokens.
        special_tokens: names and texts, such as {"eos_token": "</s>"}; a chat template sees them.
        side_files: relative path -> content of the files besides tokenizer.json, for saving.
    """

    library: tokenizers.Tokenizer
    special_tokens: dict[str, str]
    side_files: dict[str, bytes] = field(default_factory=dict)


def read_folder(folder: Path | str) -> TokenizerFolder:
    """Read the tokenizer of a checkpoint.

    Raises:
        ValueError: a file is missing or damaged.
    """
    path = Path(folder, TOKENIZER)
    if not path.exists():
        raise ValueError(f"tokenizer {path}: got {_without_tokenizer(Path(folder))}")
    text = _read_text(path)
    try:
        library = call(tokenizers.Tokenizer.from_str, text)
    except ValueError as error:
        reason = str(error).removeprefix("tokenizer: got ")[:300]
        raise ValueError(f"tokenizer {path}: got {reason}, expected a file saved by tokenizers") from None
    config = read_tokenizer_config(folder)
    name = _class_name(library, config, read_json(Path(folder, "config.json")))
    build, defaults = _CLASSES.get(name, (None, {}))
    if build is not None:
        build(library, config)
    padding = {"pad_token": library.padding["pad_token"]} if library.padding else {}
    named = {**padding, **defaults, **_named_tokens(config)}
    named = {key: named[key] for key in (*NAMED, *named) if key in named}  # the order in which they get ids
    try:
        _add_tokens(library, config, named)
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ValueError(f"tokenizer {Path(folder, CONFIG)}: got {error!r}, expected tokens to add") from None
    library.encode_special_tokens = config.get("split_special_tokens") is True
    texts = {key: text for key, value in named.items() if (text := token_text(value)) is not None}
    return TokenizerFolder(library, texts, _side_files(Path(folder)))


def read_tokenizer_config(folder: Path | str) -> dict[str, Any]:
    """Return tokenizer_config.json with the tokens of the older files merged in; empty if there is none.

    Raises:
        ValueError: a file is not a JSON object.
    """
    config = read_json(Path(folder, CONFIG))
    if "added_tokens_decoder" not in config:
        config |= read_json(Path(folder, SPECIAL_MAP))
        config["added_tokens"] = read_json(Path(folder, ADDED))
    return config


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; an absent file is an empty one.

    Raises:
        ValueError: the file is not a JSON object in UTF-8.
    """
    if not path.exists():
        return {}
    text = _read_text(path)
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"tokenizer {path}: got {error!r}, expected JSON") from None
    if not isinstance(data, dict):
        raise ValueError(f"tokenizer {path}: got {type(data).__name__}, expected JSON with one object")
    return data


def _read_text(path: Path) -> str:
    try:
        return read_text(path)
    except ValueError as error:
        raise ValueError(f"tokenizer {error}") from None


def _without_tokenizer(folder: Path) -> str:
    """Describe a folder without tokenizer.json, and the way out."""
    others = ("vocab.json", "merges.txt", "tokenizer.model", "vocab.txt", "tekken.json", "tiktoken.model")
    found = [name for name in others if Path(folder, name).exists()]
    if not found:
        return "No such file, expected one saved by tokenizers"
    return (
        f"No such file but {', '.join(found)}, an older format; expected tokenizer.json, which transformers writes: "
        f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
    )


def _side_files(folder: Path) -> dict[str, bytes]:
    names = [CONFIG, SPECIAL_MAP, ADDED, CHAT_TEMPLATE, *(f"{CHAT_TEMPLATES}/{p.name}" for p in _templates(folder))]
    return {name: Path(folder, name).read_bytes() for name in names if Path(folder, name).is_file()}


def _templates(folder: Path) -> list[Path]:
    return sorted(Path(folder, CHAT_TEMPLATES).glob("*.jinja"))


def read_chat_templates(folder: Path | str) -> dict[str, str]:
    """Return the chat templates of a checkpoint by name; the usual one is "default".

    Files come before the entry of tokenizer_config.json, which is one template or a list of named ones.

    Raises:
        ValueError: a file is damaged, or the entry has another form.
    """
    folder = Path(folder)
    files = {"default": folder / CHAT_TEMPLATE, **{path.stem: path for path in _templates(folder)}}
    try:
        found = {name: path.read_text(encoding="utf-8") for name, path in files.items() if path.is_file()}
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"chat template in {folder}: got {error}, expected UTF-8 text") from None
    entry = None if found else read_json(folder / CONFIG).get("chat_template")
    if isinstance(entry, str):
        return {"default": entry}
    try:
        named = {str(one["name"]): one["template"] for one in entry or []}
        assert all(isinstance(template, str) for template in named.values())
    except (TypeError, KeyError, AssertionError):
        raise ValueError(f"tokenizer {folder / CONFIG}: got chat_template {entry!r:.80}, expected text, or a list of "
                         "objects of name and template") from None  # fmt: skip
    return found or named


# ---- special and added tokens


def token_text(value: Any) -> str | None:
    """Return the text of a token that is written as a string or as an object; None for anything else."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def _named_tokens(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the special tokens of a config by name: the usual ones, then those of the model alone."""
    extra = config.get("extra_special_tokens")
    own = {key: value for key, value in config.items() if key.endswith("_token") and token_text(value)}
    usual = {key: config[key] for key in NAMED if key in config}
    return {**usual, **own, **(extra if isinstance(extra, dict) else {})}


def _add_tokens(library: tokenizers.Tokenizer, config: Mapping[str, Any], named: Mapping[str, Any]) -> None:
    """Add the tokens of a config that tokenizer.json lacks, in the order of their ids; special ones come last.

    The end of text is not added: a model cannot write a token that it does not have.
    """
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    values = [value for key, value in named.items() if key != "eos_token"]
    values += extra if isinstance(extra, list) else []
    special = {text: value for value in values if (text := token_text(value))}
    listed = config.get("added_tokens_decoder") or {}
    tokens = {int(token): _added_token(value) for token, value in listed.items()}
    for text, token in (config.get("added_tokens") or {}).items():
        tokens[int(token)] = AddedToken(text, special=text in special, normalized=text not in special)
    call(library.add_tokens, [tokens[token] for token in sorted(tokens)])
    known = {token.content for token in library.get_added_tokens_decoder().values()}
    missing = [_added_token(value, special=True) for text, value in special.items() if text not in known]
    call(library.add_tokens, missing)


def _added_token(value: Any, **flags) -> AddedToken:
    """Return a token that is written as a string, or as an object with its flags."""
    if isinstance(value, str):
        return AddedToken(value, **flags)
    return AddedToken(**{key: flag for key, flag in value.items() if key not in ("__type", "id")} | flags)


# ---- classes that transformers builds anew


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
_CLASSES: dict[str, tuple[Build, dict[str, str | None]]] = {
    "GPT2Tokenizer": (_gpt2, GPT2_TOKENS),
    "GPTNeoXTokenizer": (_gpt_neox, {**GPT2_TOKENS, "pad_token": "<|padding|>"}),
    "LlamaTokenizer": (_llama, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}),
}
_CLASS_OF_FAMILY = {
    **dict.fromkeys(("gpt2", "gpt_neo", "gptj", "opt"), "GPT2Tokenizer"),
    "gpt_neox": "GPTNeoXTokenizer",
    "llama": "LlamaTokenizer",
    **dict.fromkeys(("", "peakgpt")),  # the class that tokenizer_config.json names
}


def _class_name(library: tokenizers.Tokenizer, config: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    """Return the class that AutoTokenizer would take, without "Fast"; only names in `_CLASSES` matter."""
    family = str(model.get("model_type") or "")
    if family not in _CLASS_OF_FAMILY:  # such as mistral, which names Llama's class: tokenizer.json as it is
        return ""
    named = config.get("tokenizer_class") or model.get("tokenizer_class") or _CLASS_OF_FAMILY[family]
    name = str(named).removesuffix("Fast")
    is_bytes = isinstance(library.decoder, decoders.ByteLevel)  # Llama 3 names Llama 2's class
    return "" if name == "LlamaTokenizer" and is_bytes else name
