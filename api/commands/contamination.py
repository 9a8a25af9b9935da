"""peakgpt contamination: find the examples of an evaluation that a training corpus contains."""

from __future__ import annotations

import argparse
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

from peakgpt.engine.data.contamination import MAX_N, MIN_N, ContaminationCheck, Example
from peakgpt.engine.data.documents import ERRORS, ReadOptions
from peakgpt.engine.data.json_lines import new_json_lines
from peakgpt.engine.evaluation.corpus_overlap import corpus_documents
from peakgpt.engine.evaluation.example_file import read_examples
from peakgpt.heartbeat import enter_phase
from peakgpt.kernels.command_line import integer
from peakgpt.kernels.strict_json import dumps

SHOWN = 10  # dirty examples on the terminal; all are in the report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    sources = "files, folders, hf:NAME as in `peakgpt prepare`, folders that it wrote, or runs"
    parser.add_argument("corpus", nargs="+", metavar="CORPUS", help=sources)
    examples = "examples: JSON lines, JSON, a prompt file, or text with one a line; may be repeated"
    parser.add_argument("--eval", action="append", required=True, type=Path, metavar="FILE", help=examples)
    parser.add_argument("--eval-field", metavar="NAME", help="JSON field of an example (default: all its texts)")
    size = f"words in a run that is compared (default: {MIN_N} to {MAX_N}, as GPT-3's appendix C)"
    parser.add_argument("--ngram", type=integer(), metavar="N", help=size)
    parser.add_argument("--report", type=Path, metavar="FILE", help="write a JSON line for each example")
    parser.add_argument("--field", default="text", help='JSON field or Parquet column of the corpus (default "text")')
    errors = "invalid UTF-8 of the corpus is refused, or replaced by U+FFFD (default strict)"
    parser.add_argument("--errors", choices=ERRORS, default="strict", help=errors)

def run(args: argparse.Namespace) -> int:
    check = ContaminationCheck(
        (example for path in args.eval for example in read_examples(path, args.eval_field)), args.ngram
    )
    documents = corpus_documents(args.corpus, ReadOptions(field=args.field, errors=args.errors))
    with ExitStack() as files:
        report = files.enter_context(new_json_lines(args.report)) if args.report else None
        for document in documents:
            enter_phase(f"comparing document {check.documents + 1}, {document.name}")
            check.add(document)
        examples = check.finish()
        if report:
            for example in examples:
                report.write(_row(example))
    counts = Counter(example.status for example in examples)
    dirty = [example for example in examples if example.status == "dirty"]
    for example in dirty[:SHOWN]:
        print(f"{example.name}: {example.found} of {example.ngrams} runs of {check.n} words occur, in "
              f"{example.documents} documents, first in {example.document}: {example.ngram!r}")  # fmt: skip
    if len(dirty) > SHOWN:
        print(f"... and {len(dirty) - SHOWN} more; --report FILE lists all")
    print(f"{len(examples)} examples: {counts['dirty']} dirty, {counts['clean']} clean, {counts['short']} shorter than "
          f"{check.n} words; {check.documents} documents of the corpus")  # fmt: skip
    totals = {name: counts[name] for name in ("dirty", "clean", "short")}
    print(dumps({"examples": len(examples), **totals, "ngram": check.n, "documents": check.documents}))
    return 1 if dirty else 0


def _row(example: Example) -> dict[str, str | int | None]:
    return {"example": example.name, "status": example.status, "words": example.words, "ngrams": example.ngrams,
            "found": example.found, "ngram": example.ngram, "document": example.document,
            "documents": example.documents}  # fmt: skip
