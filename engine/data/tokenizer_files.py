"""Read the tokenizer files of a checkpoint folder as transformers' AutoTokenizer does.

    tokenizer.json              the tokenizer: words, added tokens, and the special tokens put around a text; or an
                                older format, see vocabulary_files.py
    tokenizer_config.json       names of the special tokens, more added tokens, the class
    special_tokens_map.json     names of the special tokens, in older checkpoints
    added_tokens.json           more added tokens, in older checkpoints
    config.json                 the class, if tokenizer_config.json does not name it
    chat_template.jinja         the chat template; more, by name, in additional_chat_templates/. Older checkpoints have
                                them in tokenizer_config.json or chat_template.json
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, models, processors

from peakgpt.engine.data.adapter_source import ADAPTER_CONFIG, base_of, is_adapter
from peakgpt.engine.data.gguf_header import is_gguf
from peakgpt.engine.data.gguf_tokenizer import has_gguf_tokenizer, read_gguf_tokenizer
from peakgpt.engine.data.hub import HubFiles
from peakgpt.engine.data.library_call import call
from peakgpt.engine.data.model_source import locate
from peakgpt.engine.data.text_file import read_text
from peakgpt.engine.data.tokenizer_classes import CLASSES, class_name
from peakgpt.engine.data.tokenizer_names import (
    ADDED,
    CHAT_TEMPLATE,
    CHAT_TEMPLATES,
    CONFIG,
    MODEL,
    OLD_CHAT_TEMPLATE,
    SPECIAL_MAP,
    TIKTOKEN,
    TOKENIZER,
    TOKENIZER_FILES,
    VOCAB,
)
from peakgpt.engine.data.vocabulary_files import Vocabulary, read_vocabulary

WANTED = HubFiles((*TOKENIZER_FILES, ADAPTER_CONFIG))  # of a model of the hub
NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
GENERIC_CLASS = "PreTrainedTokenizerFast"  # of which transformers builds nothing anew


@dataclass(frozen=True)
class TokenizerFolder:
    """The contents of a checkpoint's tokenizer files.

    Args:
        source: name of the file with the words.
        library: the tokenizer, with all added tokens.
        special_tokens: names and texts, such as {"eos_token": "</s>"}; a chat template sees them.
        chat_templates: names and Jinja; the usual name is "default".
        clean_up_tokenization_spaces: whether decoded texts have no space before punctuation.
        side_files: relative path -> content of the files besides tokenizer.json, for saving.
    """

    source: str
    library: tokenizers.Tokenizer
    special_tokens: dict[str, str]
    chat_templates: dict[str, str]
    clean_up_tokenization_spaces: bool = False
    side_files: dict[str, bytes] = field(default_factory=dict)


def read_folder(folder: Path | str) -> TokenizerFolder:
    """Read the tokenizer of a checkpoint: a folder, or a .gguf file.

    Raises:
        ValueError: a file is missing or damaged, or of SentencePiece, which is not installed.
    """
    folder = Path(folder)
    if is_gguf(folder):
        gguf = read_gguf_tokenizer(folder)
        return TokenizerFolder(
            folder.name, gguf.library, gguf.special_tokens, gguf.chat_templates, side_files={CONFIG: gguf.config_file}
        )
    config = read_tokenizer_config(folder)
    vocabulary = read_vocabulary(folder, config)
    library, model = vocabulary.library, read_json(folder / "config.json")
    name = class_name(library, config, model)
    named = _build(vocabulary, name, config)
    try:
        _add_tokens(library, config, named)
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ValueError(f"tokenizer {folder / CONFIG}: got {error!r}, expected tokens to add") from None
    library.encode_special_tokens = config.get("split_special_tokens") is True
    texts = {key: text for key, value in named.items() if (text := token_text(value)) is not None}
    if vocabulary.source != TOKENIZER:
        _add_template(library, config, texts)
    files = _side_files(folder)
    if vocabulary.source != TOKENIZER:
        files[CONFIG] = _config_file(config, GENERIC_CLASS, texts)
    elif CONFIG not in files or name != class_name(library, config, {}):
        files[CONFIG] = _config_file(config, name or GENERIC_CLASS, texts)
    templates = _chat_templates(folder, config)
    return TokenizerFolder(vocabulary.source, library, texts, templates, _cleans_up(library, config), files)


def tokenizer_folder(folder: Path) -> Path:
    """Return the folder that has a model's tokenizer: of an adapter without one that of its base model."""
    if not is_adapter(folder) or has_tokenizer(folder):
        return folder
    base, revision = base_of(folder)
    return tokenizer_folder(locate(base, WANTED, revision))


def has_tokenizer(folder: Path) -> bool:
    """Return whether a checkpoint has a tokenizer: a file with words, or metadata of a .gguf file."""
    if is_gguf(folder):
        return has_gguf_tokenizer(folder)
    names = (TOKENIZER, MODEL, TIKTOKEN, VOCAB)
    return any((folder / name).exists() for name in names) or any(folder.glob("*.tiktoken"))


def _build(vocabulary: Vocabulary, name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Build the parts of a class anew; return the special tokens by name, in the order in which they get ids.

    Where no file names a class that fits the words, a special token of the default class may be absent.
    """
    library, defaults = vocabulary.library, dict[str, str | None](vocabulary.special_tokens)
    if built := CLASSES.get(name if name in vocabulary.classes else vocabulary.default_class):
        build, defaults = built
        build(library, config)
    if name not in vocabulary.classes:
        defaults = {key: text for key, text in defaults.items() if text and library.token_to_id(text) is not None}
    padding = {"pad_token": library.padding["pad_token"]} if library.padding else {}
    named = {**padding, **defaults, **_named_tokens(config)}
    return {key: named[key] for key in (*NAMED, *named) if key in named}


def _add_template(library: tokenizers.Tokenizer, config: Mapping[str, Any], texts: Mapping[str, str]) -> None:
    """Put tokens around a text as add_bos_token and add_eos_token say.

    transformers reads both only without tokenizer.json, which says itself what is put around a text.
    """
    if "add_bos_token" not in config and "add_eos_token" not in config:
        return
    around = [texts.get(f"{name}_token", "") if config.get(f"add_{name}_token") else "" for name in ("bos", "eos")]
    tokens = [(text, token) for text in around if (token := library.token_to_id(text)) is not None]
    parts = [around[0], "$A", around[1]]
    library.post_processor = processors.TemplateProcessing(
        single=[part for part in parts if part], special_tokens=list(dict.fromkeys(tokens))
    )


def _cleans_up(library: tokenizers.Tokenizer, config: Mapping[str, Any]) -> bool:
    forced = config.get("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output")
    return bool(config.get("clean_up_tokenization_spaces") and (forced or not isinstance(library.model, models.BPE)))


def _config_file(config: Mapping[str, Any], name: str, texts: Mapping[str, str]) -> bytes:
    """Return a tokenizer_config.json that names the class, so that the folder of another model means the same."""
    content = {key: value for key, value in config.items() if key != "added_tokens"}
    return f"{json.dumps({**texts, **content, 'tokenizer_class': name}, indent=2)}\n".encode()


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


def _side_files(folder: Path) -> dict[str, bytes]:
    named = (f"{CHAT_TEMPLATES}/{path.name}" for path in _templates(folder))
    names = [CONFIG, SPECIAL_MAP, ADDED, CHAT_TEMPLATE, OLD_CHAT_TEMPLATE, *named]
    return {name: Path(folder, name).read_bytes() for name in names if Path(folder, name).is_file()}


def _templates(folder: Path) -> list[Path]:
    return sorted(Path(folder, CHAT_TEMPLATES).glob("*.jinja"))


def _chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Return the chat templates of a checkpoint by name.

    Files come before the entry of a JSON file, which is one template or a list of named ones.

    Raises:
        ValueError: a file is damaged, or the entry has another form.
    """
    files = {"default": folder / CHAT_TEMPLATE, **{path.stem: path for path in _templates(folder)}}
    try:
        found = {name: path.read_text(encoding="utf-8") for name, path in files.items() if path.is_file()}
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"chat template in {folder}: got {error}, expected UTF-8 text") from None
    if found:
        return found
    source, entry = CONFIG, config.get("chat_template")
    if entry is None:
        source, entry = OLD_CHAT_TEMPLATE, read_json(folder / OLD_CHAT_TEMPLATE).get("chat_template")
    if isinstance(entry, str):
        return {"default": entry}
    try:
        named = {str(one["name"]): one["template"] for one in entry or []}
        assert all(isinstance(template, str) for template in named.values())
    except (TypeError, KeyError, AssertionError):
        raise ValueError(f"tokenizer {folder / source}: got chat_template {entry!r:.80}, expected text, or a list of "
                         "objects of name and template") from None  # fmt: skip
    return named


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
