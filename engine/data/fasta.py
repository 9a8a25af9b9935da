"""FASTA: sequences of residues with header lines, and control tags made from the annotations of a header.

    >sp|P1|ZN1 Zinc finger OS=Homo sapiens GN=ZN1      UniProt: KEY=value, up to the next key
    >seq2 [family=zinc] [organism=Homo sapiens]        NCBI: [key=value]
    MKCPECGKSF                                         the residues, on one line or several

With the keys `family` and `organism`, the text of the second one is "<family=zinc><organism=Homo sapiens>MKCPECGKSF".
The tags are plain text in front of the sequence, so a prompt of tags generates sequences of their kind. Pearson and
Lipman 1988, PNAS 85, 2444 (FASTA); Madani et al. 2020, "ProGen", arXiv:2004.03497, section 3 (control tags).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

SUFFIXES = (".fasta", ".fa", ".faa", ".fas")
ANNOTATION = re.compile(r"\[(\w+)=([^\]]*)\]|(?<!\S)(\w+)=(.*?)(?=\s+\w+=|\s+\[|\s*$)")
RESIDUES = re.compile(r"[A-Za-z*-]+")  # IUPAC codes, a stop, a gap


def annotations(header: str) -> dict[str, str]:
    """Return the annotations of a header; of a key that occurs twice, the first."""
    found: dict[str, str] = {}
    for match in ANNOTATION.finditer(header):
        key, value = (match[1], match[2]) if match[1] else (match[3], match[4])
        found.setdefault(key, value.strip())
    return found


def control_tags(header: str, keys: Sequence[str]) -> str:
    """Return the tags of a sequence in the order of the keys; an annotation that is missing has no tag."""
    found = annotations(header)
    return "".join(f"<{key}={found[key]}>" for key in keys if found.get(key))


def fasta_records(lines: Iterable[str], place: str) -> Iterator[tuple[int, str, str]]:
    """Yield (number of the header's line, header without ">", sequence) of each record.

    Args:
        lines: of the file; blank lines are left out.
        place: of the file, for messages.
    Raises:
        ValueError: residues before the first header, a header without residues, or a line that is no sequence.
    """
    start, header, parts = 0, "", []
    for number, line in enumerate((line.strip() for line in lines), 1):
        if line.startswith(">"):
            if start:
                yield start, header, _sequence(place, start, parts)
            start, header, parts = number, line[1:].strip(), []
        elif line:
            if not start:
                raise ValueError(f"{place}:{number}: got {line!r:.40}, expected a header line, which begins with '>'")
            if not RESIDUES.fullmatch(line):
                raise ValueError(f"{place}:{number}: got {line!r:.40}, expected residues: letters, '*' and '-'")
            parts.append(line)
    if not start:
        raise ValueError(f"{place}: got no header line, expected FASTA: a line that begins with '>', then residues")
    yield start, header, _sequence(place, start, parts)


def _sequence(place: str, number: int, parts: list[str]) -> str:
    if not parts:
        raise ValueError(f"{place}:{number}: got a header without residues, expected a sequence after it")
    return "".join(parts)
