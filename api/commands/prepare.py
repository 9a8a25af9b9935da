"""peakgpt prepare: turn text, or token files of nanoGPT and llm.c, into token shards."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from peakgpt.engine.data.corpus import STREAMS, load_corpus
from peakgpt.engine.data.data_config import VOCAB
from peakgpt.engine.data.dataset import tokenizer_for
from peakgpt.engine.data.documents import ERRORS, ReadOptions
from peakgpt.engine.data.prepare import check_folder, prepare, prepare_tokens
from peakgpt.engine.data.shards import TokenShards
from peakgpt.engine.data.sources import PREFIX
from peakgpt.engine.data.split import VALIDATION_SHARE
from peakgpt.engine.data.token_files import find_token_files, is_token_source
from peakgpt.engine.data.tokenizer import Tokenizer
from peakgpt.heartbeat import enter_phase
from peakgpt.kernels.command_line import integer, number, refuse_ignored

LINE_S = 5.0  # between two lines of progress where the output is no terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sources", nargs="+", metavar="SOURCE",
                        help="text, code, .jsonl or .parquet, also with .gz or .zst; folders of them; hf:NAME; or .bin "
                             "token files of nanoGPT and llm.c, or their folder")  # fmt: skip
    parser.add_argument("--out", required=True, metavar="FOLDER",
                        help="folder of the shards; the same command goes on after a kill")  # fmt: skip
    parser.add_argument("--tokenizer", metavar="FOLDER", help="folder with a tokenizer, such as a checkpoint's")
    parser.add_argument("--vocab", type=integer(),
                        help=f"vocabulary of the tokenizer to train (default {VOCAB}), or of .bin files")  # fmt: skip
    parser.add_argument("--end-id", type=integer(0), help="the id that ends a document in .bin files, such as 50256")
    parser.add_argument("--field", help="JSON field or Parquet column of the text (default text)")
    parser.add_argument("--errors", choices=ERRORS, help="invalid UTF-8 is refused, or replaced (default strict)")
    parser.add_argument("--tags", nargs="+", metavar="KEY",
                        help="annotations of FASTA headers that become control tags before a sequence")  # fmt: skip
    parser.add_argument("--validation", nargs="+", metavar="SOURCE", help="for validation (default: a share)")
    parser.add_argument("--validation-share", type=number(high=0.99),
                        help=f"share of the text for validation (default {VALIDATION_SHARE:g})")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    if args.validation is not None:
        refuse_ignored(args, ["validation_share"], "with --validation, expected one of them")
    check_folder(args.out)
    share = VALIDATION_SHARE if args.validation_share is None else args.validation_share
    named = [*args.sources, *(args.validation or ())]
    are_tokens = [not name.startswith(PREFIX) and is_token_source(Path(name)) for name in named]
    if all(are_tokens):
        shards = _prepare_tokens(args, share)
    elif any(are_tokens):
        raise ValueError(f"sources: got token files, such as {named[are_tokens.index(True)]}, and text, expected one "
                         "kind")  # fmt: skip
    else:
        shards = _prepare_text(args, share)
    for name, stream in zip(STREAMS, shards, strict=True):
        documents = "" if stream.documents is None else f" in {stream.documents:,} documents"
        bytes_per_token = "" if stream.text_bytes is None else f", {stream.bytes_per_token:.2f} bytes per token"
        print(f"{name}: {len(stream):,} tokens{documents}{bytes_per_token}, digest {stream.digest[:12]}")
    print(f"next: peakgpt train --dataset {args.out}")
    return 0


def _prepare_text(args: argparse.Namespace, share: float) -> tuple[TokenShards, TokenShards]:
    refuse_ignored(args, ["end_id"], "with text, expected it with .bin files only")
    if args.tokenizer is not None:
        refuse_ignored(args, ["vocab"], "with --tokenizer, expected one of them")
        tokenizer = Tokenizer.load(args.tokenizer)
    options = ReadOptions(field=args.field or "text", errors=args.errors or "strict", tags=tuple(args.tags or ()))
    enter_phase("checking the text")
    corpus = load_corpus(args.sources, validation=args.validation, share=share, options=options)
    print(f"corpus: {corpus}")
    if args.tokenizer is None:
        enter_phase("training the tokenizer")
        tokenizer = tokenizer_for(corpus, args.vocab, print)
    enter_phase("encoding the text")
    with _progress(corpus.size_bytes) as progress:
        return prepare(corpus, tokenizer, args.out, progress=progress)


def _prepare_tokens(args: argparse.Namespace, share: float) -> tuple[TokenShards, TokenShards]:
    refuse_ignored(args, ["field", "errors", "tags"], "with .bin files, expected it with text only")
    tokenizer, end_id = None, args.end_id
    if args.tokenizer is not None:
        tokenizer = Tokenizer.load(args.tokenizer)
        end_id = tokenizer.end_id if end_id is None else end_id
    vocab = args.vocab or (tokenizer and tokenizer.vocab_size)
    if vocab is None:
        raise ValueError("token files: got neither --vocab nor --tokenizer, expected the size of their vocabulary")
    if end_id is not None and end_id >= vocab:
        raise ValueError(f"--end-id: got {end_id}, expected an id below the vocabulary of {vocab}")
    validation = None if args.validation is None else [Path(name) for name in args.validation]
    files = find_token_files([Path(name) for name in args.sources], validation, share)
    enter_phase("copying the tokens")
    with _progress(None) as progress:
        return prepare_tokens(files, args.out, vocab_size=vocab, end_id=end_id, tokenizer=tokenizer, progress=progress)


@contextmanager
def _progress(total_bytes: int | None) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on a terminal, and a line every LINE_S seconds elsewhere."""
    start_s = line_s = time.monotonic()

    def print_line(done_bytes: int, tokens: int) -> None:
        nonlocal line_s
        now_s = time.monotonic()
        if now_s - line_s >= LINE_S:
            line_s = now_s
            share = "" if total_bytes is None else f" of {total_bytes / 1e6:,.0f}"
            print(f"{done_bytes / 1e6:,.0f}{share} MB, {tokens:,} tokens, {tokens / (now_s - start_s):,.0f} tok/s")

    if not sys.stdout.isatty():
        yield print_line
        return
    with Progress(BarColumn(), TextColumn("{task.fields[tokens]:,} tokens"), TimeRemainingColumn()) as bar:
        task = bar.add_task("", total=total_bytes, tokens=0)
        yield lambda done_bytes, tokens: bar.update(task, completed=done_bytes, tokens=tokens)
