"""What `patch` did, a row a module."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

REPLACED, PART, LEFT, KEPT = "replaced", "part of", "left", "kept"


@dataclass(frozen=True)
class Entry:
    """Args:
    module: its name in the model; "" is the model itself.
    kind: its class.
    status: "replaced"; "part of" what is replaced; "left", where peakgpt has an op but does not take it, or where it is
        not known what a module computes; "kept", where there is nothing to replace (containers, lookups, dropout).
    note: by which ops, of what, or why.
    """

    module: str
    kind: str
    status: str
    note: str = ""


@dataclass
class Report:
    """Args:
    entries: every module of the model.
    process: what changed outside of the model.
    check: the largest difference from the unpatched model, or why that was not looked at.
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
        """(name, entry, count): modules that differ by a number in their name only are one row."""
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

        table = Table("module", "class", "n", "", "by, or why", box=None, pad_edge=False)
        for name, e, count in self.rows():
            if e.status != KEPT:
                table.add_row(name or "(the model)", e.kind, str(count), e.status, e.note)
        console = Console(width=140, no_color=True)
        with console.capture() as text:
            console.print(table)
        kept = sum(e.status == KEPT for e in self.entries)
        said = [f"{len(self.replaced)} modules replaced, {len(self.left)} left, {kept} with nothing to replace",
                self.process, self.check and f"check: {self.check}"]  # fmt: skip
        return text.get() + "\n".join(filter(None, said))
