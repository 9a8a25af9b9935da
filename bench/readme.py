"""Write the tables of README.md and docs/ from the committed results: `peakgpt bench readme`.

A table stands between two comments, <!-- results: NAME --> and <!-- end -->. Its rows are declared in document_tables.
Nothing between the comments is written by hand: tests/test_documents.py compares it with what this command writes.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from peakgpt.bench.chosen_runs import ANY, Group, History, Run, Shown, choose
from peakgpt.bench.document_tables import TABLES, Table

RESULTS = Path("bench", "results")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--root", type=Path, default=Path(), help="folder of the checkout (default: .)")


def run(args: argparse.Namespace) -> int:
    """
    Raises:
        ValueError: a table has no eligible run, a document lacks its comments, or there is no git history.
    """
    texts = written_documents(args.root)
    for path, text in texts.items():
        changed = path.read_text() != text
        if changed:
            path.write_text(text)
        print(f"{path}: {'written' if changed else 'unchanged'}")
    return 0


def written_documents(root: Path) -> dict[Path, str]:
    """Return path -> text of every document with its tables made anew."""
    runs, history = [Run.load(path) for path in sorted((root / RESULTS).glob("*.json"))], History.of(root)
    texts: dict[Path, str] = {}
    for table in TABLES:
        path = root / table.document
        texts[path] = _with_table(texts.get(path) or path.read_text(), table, render(table, runs, history))
    return texts


def render(table: Table, runs: Sequence[Run], history: History) -> str:
    """Return a table as Markdown, with the file, commit, machine and rounds of every group below it."""
    sources = _Sources(runs, history)
    lines = [table.headings, ["---"] * len(table.headings)]
    lines += [[cell if isinstance(cell, str) else cell(sources.find) for cell in row] for row in table.rows]
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([body, "", *sources.lines()])


@dataclass
class _Sources:
    """The groups that a table used."""

    runs: Sequence[Run]
    history: History

    def __post_init__(self) -> None:
        self.used: list[tuple[Group, Shown]] = []

    def find(self, group: Group) -> Shown:
        shown = next((shown for known, shown in self.used if known == group), None)
        if shown is None:
            shown = choose(group, self.runs, self.history)
            self.used.append((group, shown))
        return shown

    def lines(self) -> list[str]:
        """Return a line for each run: its file, commit and machine, then rounds, sizes and peaks of its groups."""
        by_file: dict[Path, list[tuple[Group, Shown]]] = {}
        for group, shown in self.used:
            by_file.setdefault(shown.run.path, []).append((group, shown))
        return [_source_line(groups) for _, groups in sorted(by_file.items())]


def _source_line(groups: Sequence[tuple[Group, Shown]]) -> str:
    first = groups[0][1]
    environment = first.run.environment
    where = [f"commit {first.commit[:12]}", environment["date"][:10], environment["device"]["name"],
             f"{environment['threads']} threads"]  # fmt: skip
    rows = [(group, shown.rows[group.contenders[0]]) for group, shown in groups]
    said = [f"{row.rounds} of {row.rounds + row.dropped} rounds" for _, row in rows if row.samples_s]
    said += [f"{key} {row.case[key]}" for group, row in rows for key, value in group.case.items() if value == ANY]
    said += [f"peak {row.peak_flops_s / 1e12:.3f} TFLOP/s in {row.dtype}" for _, row in rows if row.peak_flops_s]
    return f"- {first.run.path.name} ({', '.join(where)})" + (f": {', '.join(dict.fromkeys(said))}" if said else "")


def _with_table(text: str, table: Table, body: str) -> str:
    begin, end = f"<!-- results: {table.name} -->", "<!-- end -->"
    pattern = re.compile(rf"{re.escape(begin)}\n.*?{re.escape(end)}", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ValueError(f"{table.document}: expected {begin} and {end} once")
    replacement: Callable[[re.Match[str]], str] = lambda _: f"{begin}\n{body}\n{end}"  # noqa: E731
    return pattern.sub(replacement, text)
