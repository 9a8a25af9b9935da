"""peakgpt quantize: round a checkpoint's weights to 8 or 4 bits, with the perplexity before and after on a text."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch

from peakgpt.engine.checkpoint.quantized_folder import WEIGHT_FILES, read_format, write_quantized
from peakgpt.engine.checkpoint.quantized_weights import quantize_state
from peakgpt.engine.data.run_layout import model_folder
from peakgpt.engine.data.tokenizer import Tokenizer
from peakgpt.engine.gpt import GPT
from peakgpt.engine.model.quantized_linear import Format
from peakgpt.kernels.command_line import refuse_ignored
from peakgpt.kernels.ops.quantize import GROUPS

GROUP = 64  # default of --group
BATCH = 8  # windows per forward pass


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="IN", help="checkpoint folder, or folder of a run")
    parser.add_argument("folder", metavar="OUT", help="folder to write; the other commands read it like any checkpoint")
    parser.add_argument("--bits", type=int, required=True, choices=(8, 4), help="bits per weight")
    parser.add_argument("--group", type=int, choices=GROUPS,
                        help=f"weights per scale, for 4 bits (default {GROUP})")  # fmt: skip
    parser.add_argument("--text", metavar="FILE", help="UTF-8 text to measure perplexity on; IN needs a tokenizer")


def run(args: argparse.Namespace) -> int:
    if args.bits == 8:
        refuse_ignored(args, ("group",), "with --bits 8, which has one scale for each row; expected it with --bits 4")
    args.source = model_folder(args.source)
    if args.source.resolve() == Path(args.folder).resolve():
        raise ValueError(f"quantize: OUT is {args.folder}, expected another folder than IN")
    if present := read_format(args.source):
        raise ValueError(f"quantize: IN has weights of {present.bits} bits already, expected float weights")
    target = Path(args.folder)
    if target.is_dir() and (weights := sorted(f.name for f in target.iterdir() if f.name.startswith(WEIGHT_FILES))):
        raise ValueError(f"quantize: OUT has {weights[0]}, expected a folder without weights")
    quantization = Format(args.bits, args.group or GROUP)
    ids = None if args.text is None else _tokens(args.source, args.text)
    model = GPT.from_pretrained(args.source)
    write_quantized(args.source, args.folder, quantize_state(model.state_dict(), quantization), quantization)
    print(f"{args.folder}: {_size(args.folder) / 2**20:.1f} MiB, {_size(args.source) / 2**20:.1f} MiB before")
    if ids is not None:
        before, after = perplexity(model, ids), perplexity(GPT.from_pretrained(args.folder), ids)
        print(f"perplexity over {ids.numel() - 1} tokens: {before:.3f}, {after:.3f} after ({after / before - 1:+.2%})")
    return 0


@torch.no_grad()
def perplexity(model: GPT, ids: torch.Tensor) -> float:
    """Return exp of the mean loss over a text, in windows of block_size that do not overlap.

    Args:
        model: in evaluation mode.
        ids: (N,) int64, N at least 2.
    """
    size, total = model.config.block_size, 0.0
    pairs = [(ids[i : i + size], ids[i + 1 : i + size + 1]) for i in range(0, ids.numel() - 1, size)]
    pairs = [(x[: y.numel()], y) for x, y in pairs]
    full = [p for p in pairs if p[0].numel() == size]  # the last window may be shorter, and is its own batch
    batches = [full[i : i + BATCH] for i in range(0, len(full), BATCH)]
    for batch in [*batches, *([p] for p in pairs if p[0].numel() < size)]:
        x, y = (torch.stack(part) for part in zip(*batch, strict=True))
        total += float(model(x, y)) * y.numel()
    return math.exp(total / (ids.numel() - 1))


def _tokens(folder: str, path: str) -> torch.Tensor:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--text {path}: {error}, expected UTF-8") from None
    ids = torch.tensor(Tokenizer.load(folder).encode(text))
    if ids.numel() < 2:
        raise ValueError(f"--text {path}: got {ids.numel()} tokens, expected at least 2")
    return ids


def _size(folder: str) -> int:
    """Return the size of the weight files of a folder, in bytes."""
    return sum(f.stat().st_size for f in Path(folder).iterdir() if f.name.startswith(WEIGHT_FILES[:3]))
