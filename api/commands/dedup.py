"""peakgpt dedup: remove exact and near-duplicate documents from a corpus, and report what was removed."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from dataclasses import asdict, fields
from pathlib import Path

from peakgpt.engine.data.deduplicate import Deduplicator, NearDuplicates
from peakgpt.engine.data.documents import ERRORS, ReadOptions
from peakgpt.engine.data.json_lines import new_json_lines
from peakgpt.engine.data.sources import open_sources
from peakgpt.heartbeat import enter_phase
from peakgpt.kernels.command_line import integer, number, refuse_ignored
from peakgpt.kernels.strict_json import dumps

DEFAULTS = NearDuplicates()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    sources = "files, folders, or hf:NAME, as in `peakgpt prepare`"
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help=sources)
    parser.add_argument("-o", "--output", type=Path, metavar="FILE",
                        help="write the documents that are kept, as JSON lines with name and text")  # fmt: skip
    report = "write a JSON line for each removed document: its name, the kept one, the similarity"
    parser.add_argument("--report", type=Path, metavar="FILE", help=report)
    parser.add_argument("--exact", action="store_true", help="remove exact duplicates only")
    parser.add_argument("--threshold", type=number(high=1),
                        help=f"similarity from which a document is removed (default {DEFAULTS.threshold})")  # fmt: skip
    parser.add_argument("--shingle", type=integer(), help=f"words in a shingle (default {DEFAULTS.shingle})")
    parser.add_argument("--num-perm", type=integer(2, 1 << 16),
                        help=f"minimum hashes of a document (default {DEFAULTS.num_perm})")  # fmt: skip
    parser.add_argument("--field", default="text", help='JSON field or Parquet column of the text (default "text")')
    parser.add_argument("--errors", choices=ERRORS, default="strict",
                        help="invalid UTF-8 is refused, or replaced by U+FFFD (default strict)")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    names = [field.name for field in fields(NearDuplicates)]
    if args.exact:
        refuse_ignored(args, names, "with --exact, expected one of them")
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    near = None if args.exact else NearDuplicates(**given)
    sources = open_sources(args.sources, ReadOptions(field=args.field, errors=args.errors))
    deduplicator, removed, exact = Deduplicator(near), 0, 0
    if args.output is not None and args.output == args.report:
        raise ValueError(f"--report: got {args.report} as --output too, expected another file")
    with ExitStack() as files:
        output = files.enter_context(new_json_lines(args.output)) if args.output else None
        report = files.enter_context(new_json_lines(args.report)) if args.report else None
        for number, document in enumerate((document for source in sources for document in source), 1):
            enter_phase(f"comparing document {number}, {document.name}, {removed} removed")
            duplicate = deduplicator.check(document)
            if duplicate is None:
                if output:
                    output.write_document(document)
                continue
            removed, exact = removed + 1, exact + duplicate.exact
            if report:
                report.write(asdict(duplicate))
    kept = len(deduplicator.names)
    print(f"kept {kept} of {kept + removed} documents; removed {exact} exact and {removed - exact} near duplicates")
    bands, rows = deduplicator.bands or (None, None)
    settings = {**asdict(near), "bands": bands, "rows": rows} if near else {}
    print(dumps({"documents": kept + removed, "kept": kept, "exact": exact, "near": removed - exact, **settings}))
    return 0
