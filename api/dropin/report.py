"""The report of `patch`: one entry for each module."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

REPLACED, PART, LEFT, KEPT = "replaced", "part of", "left", "kept"


@dataclass(frozen=True)
class Entry:
    """What happened to one module.

    Args:
        module: name of the module in the model; "" is the model itself.
        kind: name of its class.
        status: "replaced": runs on peakgpt's ops. "part of": its parent replaces its work. "left": not replaced,
            although peakgpt has an op for it or the module is unknown. "kept": needs no
            replacement (containers, embeddings, dropout).
        note: the ops, the parent, or the reason.
    """

    module: str
    kind: str
    status: str
    note: str = ""


@dataclass
class Report:
    """The result of `patch`. Print it for a table.

    Args:
        entries: one for each module of the model.
        process: what changed in the process outside of the model; "" if nothing did.
        check: the largest difference from the unpatched model, or why it was not checked.
    """

    entries: list[Entry] = field(default_factory=list)
    process: str = ""
    check: str = ""

    @property
    def replaced(self) -> list[Entry]:
        return [e for e in self.entries if e.status == REPLACED]

    @property
    def left(self) -> list[Entry]:
        return [e for e in self.entries if e.status == LEFT]

    def rows(self) -> Iterator[tuple[str, Entry, int]]:
        """Yield (name, entry, count). Modules whose names differ in a number only share one row."""
        groups: dict[tuple, list[Entry]] = {}
        for e in self.entries:
            name, note = (re.sub(r"\b\d+\b", "*", text) for text in (e.module, e.note))
            groups.setdefault((name, e.kind, e.status, note), []).append(e)
        for (name, _, _, note), same in groups.items():
            many = len(same) > 1
            yield name if many else same[0].module, replace(same[0], note=note) if many else same[0], len(same)

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        table = Table("module", "class", "n", "", "ops, or reason", box=None, pad_edge=False)
        for name, e, count in self.rows():
            if e.status != KEPT:
                table.add_row(name or "(the model)", e.kind, str(count), e.status, e.note)
        console = Console(width=140, no_color=True)
        with console.capture() as text:
            console.print(table)
        kept = sum(e.status == KEPT for e in self.entries)
        lines = [f"{len(self.replaced)} modules replaced, {len(self.left)} left, {kept} need no replacement",
                self.process, self.check and f"check: {self.check}"]  # fmt: skip
        return text.get() + "\n".join(filter(None, lines))
