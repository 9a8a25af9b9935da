"""peakgpt export: write a model in the format of another engine: a .gguf file for llama.cpp."""

from __future__ import annotations

import argparse
from pathlib import Path

from peakgpt.engine.checkpoint.gguf.export import DTYPES, import_gguf, write_gguf
from peakgpt.engine.checkpoint.model_folder import MODEL_FILES
from peakgpt.engine.data.gguf_vocabulary import tokenizer_metadata
from peakgpt.engine.data.model_source import NAMES, locate
from peakgpt.engine.data.tokenizer import END_OF_TEXT
from peakgpt.engine.data.tokenizer_files import has_tokenizer, read_folder, tokenizer_folder
from peakgpt.engine.gpt import GPT

FORMATS = ("gguf",)
DTYPE = "f16"  # default of --dtype, as of llama.cpp's converter


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="MODEL", help=f"model: {NAMES}")
    parser.add_argument("file", metavar="OUT", help="new file to write, such as model.gguf")
    parser.add_argument("--format", required=True, choices=FORMATS, help="gguf: llama.cpp's; needs peakgpt[gguf]")
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPE, help=f"of the matrices (default {DTYPE})")


def run(args: argparse.Namespace) -> int:
    import_gguf()  # raises before the model is loaded
    folder = locate(args.source, MODEL_FILES)
    model = GPT.from_pretrained(folder, dequantize=True).merge_and_unload()
    tokenizer, folder = None, tokenizer_folder(folder)
    if has_tokenizer(folder):
        files = read_folder(folder)
        special = {"eos_token": END_OF_TEXT, **files.special_tokens}
        tokenizer = tokenizer_metadata(files.library, special, files.chat_templates, model.config.vocab_size)
    name = write_gguf(args.file, model.config, model.state_dict(), tokenizer, args.dtype)
    size = Path(args.file).stat().st_size
    words = "with its tokenizer" if tokenizer else "without a tokenizer, as MODEL has none"
    print(f"{args.file}: {name} of llama.cpp, {args.dtype}, {size / 2**20:.1f} MiB, {words}")
    return 0
