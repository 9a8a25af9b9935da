"""Per-residue perplexity of the sequences of a FASTA file, given the control tags of their annotations.

    exp(- sum over all residues of log p(residue | tags, residues before it) / number of residues)

    python examples/protein/residue_perplexity.py runs/protein held_out.fasta --tags family organism

Without --tags the sequences stand alone. Works for any tokenizer: the log-probability of a sequence is divided by its
residues, not by its tokens. Madani et al. 2020, "ProGen", arXiv:2004.03497, section 4.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peakgpt.engine.evaluation.zero_shot import ZeroShot


def measure(
    zero: ZeroShot, path: Path, keys: Sequence[str], by: str | None = None
) -> dict[str, tuple[float, int, int]]:
    """Return for each value of the annotation `by`, and for "all": perplexity, sequences, residues."""
    from peakgpt.engine.data.fasta import annotations, control_tags, fasta_records
    from peakgpt.engine.data.text_file import read_text

    records = list(fasta_records(read_text(path).split("\n"), str(path)))
    scores = zero.continuations([(control_tags(header, keys), sequence) for _, header, sequence in records])
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0, 0])
    for (_, header, sequence), score in zip(records, scores, strict=True):
        for group in ("all", *([annotations(header).get(by, "")] if by else [])):
            sums[group] = [a + b for a, b in zip(sums[group], (score.total, 1, len(sequence)), strict=True)]
    return {group: (math.exp(-total / residues), int(count), int(residues))
            for group, (total, count, residues) in sums.items()}  # fmt: skip


def open_checkpoint(name: str) -> ZeroShot:
    """Load model and tokenizer. peakgpt is imported here, so that --help works without it."""
    from peakgpt import GPT, Tokenizer
    from peakgpt.engine.evaluation.score import Scorer
    from peakgpt.engine.evaluation.zero_shot import ZeroShot

    return ZeroShot(Scorer(GPT.from_pretrained(name)), Tokenizer.load(name))


def main() -> None:
    parser = argparse.ArgumentParser(description="Per-residue perplexity of a FASTA file.", allow_abbrev=False)
    parser.add_argument("checkpoint", help="model of proteins, such as a run of peakgpt train")
    parser.add_argument("file", type=Path, help="FASTA")
    parser.add_argument("--tags", nargs="+", default=[], metavar="KEY", help="annotations that are control tags")
    parser.add_argument("--by", metavar="KEY", help="also for each value of this annotation")
    args = parser.parse_args()
    try:
        results = measure(open_checkpoint(args.checkpoint), args.file, args.tags, args.by)
    except (ImportError, OSError, ValueError) as error:
        parser.exit(2, f"error: {error}\n")
    for group, (perplexity, count, residues) in results.items():
        print(f"{group}: perplexity {perplexity:.3f} per residue, {count} sequences, {residues} residues")


if __name__ == "__main__":
    main()
