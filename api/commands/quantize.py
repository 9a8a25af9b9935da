"""peakgpt quantize: round a checkpoint's weights to 8 or 4 bits. Prints their error, and the perplexity of a text."""

from __future__ import annotations

import argparse
from pathlib import Path

from peakgpt.engine.checkpoint.folder import TRAINING_STATE
from peakgpt.engine.checkpoint.model_folder import MODEL_FILES
from peakgpt.engine.checkpoint.quantized.folder import is_weights, read_format, write_quantized
from peakgpt.engine.checkpoint.quantized.packed_layers import PackedFormat
from peakgpt.engine.checkpoint.quantized.weights import quantize_state, rounding_error
from peakgpt.engine.data.adapter_source import is_adapter
from peakgpt.engine.data.gguf_header import is_gguf
from peakgpt.engine.data.model_source import NAMES, locate
from peakgpt.engine.data.text_file import read_text
from peakgpt.engine.data.tokenizer import Tokenizer
from peakgpt.engine.evaluation.score import Scorer, text_perplexity
from peakgpt.engine.gpt import GPT
from peakgpt.engine.model.quantized_linear import Format
from peakgpt.kernels.command_line import refuse_ignored
from peakgpt.kernels.ops.quantize import GROUPS

GROUP = 64  # default of --group


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="IN", help=f"model: {NAMES}")
    parser.add_argument("folder", metavar="OUT", help="folder to write; the other commands read it like any checkpoint")
    parser.add_argument("--bits", type=int, required=True, choices=(8, 4), help="bits per weight")
    parser.add_argument("--group", type=int, choices=GROUPS,
                        help=f"weights per scale, for 4 bits (default {GROUP})")  # fmt: skip
    parser.add_argument("--text", metavar="FILE", help="UTF-8 text to measure perplexity on; IN needs a tokenizer")


def run(args: argparse.Namespace) -> int:
    if args.bits == 8:
        refuse_ignored(args, ("group",), "with --bits 8, which has one scale for each row; expected it with --bits 4")
    args.source = locate(args.source, MODEL_FILES)
    if is_gguf(args.source):
        raise ValueError(f"quantize: IN is {args.source}, expected a folder: read the file with dequantize=True, and "
                         "save the model and its tokenizer in one")  # fmt: skip
    if is_adapter(args.source):
        raise ValueError(f"quantize: IN is {args.source}, an adapter, expected a model: write the merged one with "
                         "`peakgpt export --format safetensors`")  # fmt: skip
    if args.source.resolve() == Path(args.folder).resolve():
        raise ValueError(f"quantize: OUT is {args.folder}, expected another folder than IN")
    if not isinstance(read_format(args.source), PackedFormat | None):
        raise ValueError("quantize: IN has quantized weights of peakgpt already, expected floats, GPTQ or AWQ")
    quantization = Format(args.bits, args.group or GROUP)
    text = None if args.text is None else (Tokenizer.load(args.source), read_text(args.text))
    model = GPT.from_pretrained(args.source, dequantize=True)
    state = model.state_dict()
    rounded = quantize_state(state, quantization)
    write_quantized(args.source, args.folder, rounded, quantization)
    print(f"weights: relative error {rounding_error(state, rounded, quantization):.2%}, compared with those of IN")
    print(f"{args.folder}: {_size(args.folder) / 2**20:.1f} MiB, {_size(args.source) / 2**20:.1f} MiB before")
    if text:
        before, after = (text_perplexity(Scorer(m), *text) for m in (model, GPT.from_pretrained(args.folder)))
        print(f"perplexity of {before.tokens} tokens, windows of {before.window} by {before.stride}: "
              f"{before.value:.4f}, {after.value:.4f} after ({after.value / before.value - 1:+.2%})")  # fmt: skip
    return 0


def _size(folder: str) -> int:
    """Return the size of the weights of a folder, in bytes."""
    return sum(f.stat().st_size for f in Path(folder).iterdir() if is_weights(f) and f.name != TRAINING_STATE)
