"""The flags that choose the model of a benchmark: a preset, which may be cut to fewer layers or tokens."""

from __future__ import annotations

import argparse

from peakgpt.bench.case import sizes_text
from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.model.presets import preset
from peakgpt.kernels.command_line import integer


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --model, --layers and --vocab-size."""
    parser.add_argument("--model", default="gpt2", help="preset of docs/families.md (default gpt2, 124M)")
    parser.add_argument("--layers", type=integer(), metavar="N", help="keep only N layers of the preset")
    parser.add_argument("--vocab-size", type=integer(), metavar="N", help="instead of the preset's")


def chosen_model(args: argparse.Namespace) -> tuple[str, GPTConfig]:
    """Return the name of the model, with what was changed, and its config.

    Raises:
        ValueError: there is no such preset, or it has fewer layers.
    """
    changes = {"n_layer": args.layers, "vocab_size": args.vocab_size}
    changes = {name: value for name, value in changes.items() if value is not None}
    whole = preset(args.model)
    if args.layers is not None and args.layers > whole.n_layer:
        raise ValueError(f"bench: got --layers {args.layers}, expected at most the {whole.n_layer} of {args.model}")
    return ",".join(filter(None, (args.model, sizes_text(changes)))), preset(args.model, **changes)
