"""Write a FASTA file of sequences from a small grammar: three families with a motif each, and two organisms.

    zinc     M body { C x x C x12 H x x x H } body     two or three zinc fingers
    coil     M body { L x6 }4..6 body                  a leucine zipper
    ploop    M body G x4 G K (S or T) body             the P-loop of ATPases

x is a residue of the organism, whose composition differs: a thermophile has more charged residues. The sequences are
invented; only the motifs are those of real proteins (PROSITE PS00028, PS00029, PS00017).

    python examples/protein/grammar.py proteins.fasta --count 2000
"""

from __future__ import annotations

import argparse
import random
import re
from pathlib import Path

MOTIFS = {
    "zinc": re.compile(r"C.{2}C.{12}H.{3}H"),
    "coil": re.compile(r"L.{6}L.{6}L.{6}L"),
    "ploop": re.compile(r"G.{4}GK[ST]"),
}
# Residues between motifs. C, H, G, K and L are rare, so that a motif seldom occurs by chance.
ORGANISMS = {"mesophile": "AAQQNNSSTTVVDEPFY", "thermophile": "EEEEDDRRRRIIVVAPY"}
WIDTH = 60  # residues a line


def family_of(sequence: str) -> str | None:
    """Return the family whose motif a sequence has; None if it has none or several."""
    found = [family for family, motif in MOTIFS.items() if motif.search(sequence)]
    return found[0] if len(found) == 1 else None


def draw(family: str, organism: str, rng: random.Random) -> str:
    """Return a sequence of a family."""

    def some(count: int) -> str:
        return "".join(rng.choices(ORGANISMS[organism], k=count))

    if family == "zinc":
        core = "".join(f"C{some(2)}C{some(12)}H{some(3)}H{some(4)}" for _ in range(rng.randint(2, 3)))
    elif family == "coil":
        core = "".join(f"L{some(6)}" for _ in range(rng.randint(4, 6)))
    else:
        core = f"G{some(4)}GK{rng.choice('ST')}"
    return f"M{some(rng.randint(4, 12))}{core}{some(rng.randint(4, 12))}"


def write_fasta(path: Path, count: int, seed: int) -> None:
    """Write `count` sequences of all families and organisms in turn."""
    rng = random.Random(seed)
    kinds = [(family, organism) for family in MOTIFS for organism in ORGANISMS]
    with open(path, "w", encoding="ascii") as file:
        for number in range(count):
            family, organism = kinds[number % len(kinds)]
            sequence = draw(family, organism, rng)
            file.write(f">p{number} [family={family}] [organism={organism}]\n")
            for start in range(0, len(sequence), WIDTH):
                file.write(f"{sequence[start : start + WIDTH]}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a FASTA file of invented proteins.", allow_abbrev=False)
    parser.add_argument("path", type=Path)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_fasta(args.path, args.count, args.seed)
    print(f"{args.count} sequences in {args.path}")


if __name__ == "__main__":
    main()
