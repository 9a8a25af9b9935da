"""Files of SentencePiece, `tokenizer.model`, converted for the `tokenizers` library: BPE and Unigram.

The file has the pieces with their scores, and says how a text is normalized: a table of characters, blanks that are
removed, a blank before the text. A blank is written as U+2581. A character without a piece is its bytes, such as
<0xE2>, if the model falls back to bytes.

Kudo and Richardson 2018, "SentencePiece: A simple and language independent subword tokenizer and detokenizer for Neural
Text Processing", arXiv:1808.06226.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers

from peakgpt.engine.data.library_call import call

SPACE = "▁"
UNIGRAM, BPE = 1, 2  # TrainerSpec.ModelType
CONTROL, USER_DEFINED = 3, 4  # ModelProto.SentencePiece.Type


def build_sentencepiece(data: bytes) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """Build a tokenizer from the content of a file.

    Returns:
        The tokenizer, and names and texts of its special tokens.
    Raises:
        ValueError: the file is damaged or has another algorithm, or a package is missing.
    """
    model = _parse(data)
    trainer = model.trainer_spec
    if trainer.model_type not in (UNIGRAM, BPE):
        raise ValueError(f"got a SentencePiece model of type {trainer.model_type}, expected unigram (1) or bpe (2)")
    library = tokenizers.Tokenizer(call(_unigram if trainer.model_type == UNIGRAM else _bpe, model))
    library.normalizer, library.decoder = _normalizer(model.normalizer_spec), _decoder(model)
    added = [piece for piece in model.pieces if piece.type in (CONTROL, USER_DEFINED)]
    call(library.add_tokens, [AddedToken(p.piece, normalized=False, special=p.type == CONTROL) for p in added])
    return library, {f"{name}_token": model.pieces[token].piece for name in ("bos", "eos", "unk")
                     if 0 <= (token := getattr(trainer, f"{name}_id")) < len(model.pieces)}  # fmt: skip


def _parse(data: bytes) -> Any:
    try:
        from google.protobuf.message import DecodeError
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise ValueError(f"got {error}, expected SentencePiece installed: pip install 'peakgpt[sentencepiece]'"
                         ) from None  # fmt: skip
    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError as error:
        raise ValueError(f"got {error}, expected a model of SentencePiece, or words of tiktoken") from None
    if not model.pieces:
        raise ValueError("got no pieces, expected a model of SentencePiece, or words of tiktoken")
    return model


def _unigram(model: Any) -> models.Unigram:
    scores = [(piece.piece, piece.score) for piece in model.pieces]
    return models.Unigram(scores, unk_id=model.trainer_spec.unk_id, byte_fallback=model.trainer_spec.byte_fallback)


def _bpe(model: Any) -> models.BPE:
    ids = {piece.piece: token for token, piece in enumerate(model.pieces)}
    merges = merges_by_score([(piece.piece, piece.score) for piece in model.pieces])
    return models.BPE(vocab=ids, merges=merges, unk_token=model.trainer_spec.unk_piece, fuse_unk=True,
                      byte_fallback=model.trainer_spec.byte_fallback)  # fmt: skip


def merges_by_score(pieces: Sequence[tuple[str, float]]) -> list[tuple[str, str]]:
    """Return every pair of pieces that makes a piece, for the piece of the highest score first.

    Args:
        pieces: texts and scores, in the order of their ids, which decides between equal scores.
    """
    texts = {text for text, _ in pieces}
    merges: list[tuple[str, str]] = []
    for text, _ in sorted(pieces, key=lambda piece: -piece[1]):
        pairs = [(text[:i], text[i:]) for i in range(1, len(text)) if text[:i] in texts and text[i:] in texts]
        merges += sorted(pairs, key=lambda pair: (len(pair[0]), len(pair[1])))
    return merges


def _normalizer(spec: Any) -> normalizers.Normalizer:
    parts: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        parts.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        parts += [normalizers.Replace(Regex(r"\A +"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        parts.append(normalizers.Prepend(SPACE))
    parts.append(normalizers.Replace(" ", SPACE))
    if spec.remove_extra_whitespaces:  # at the end also U+2581 of the text itself
        parts.append(normalizers.Replace(Regex(rf"{SPACE}+\z"), ""))
    return normalizers.Sequence(parts)


def _decoder(model: Any) -> decoders.Decoder:
    parts: list[decoders.Decoder] = [decoders.Replace(SPACE, " ")]
    if model.trainer_spec.byte_fallback:
        parts.append(decoders.ByteFallback())
    parts.append(decoders.Fuse())
    return decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if model.normalizer_spec.add_dummy_prefix else parts)
