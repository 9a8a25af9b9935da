"""peakgpt export: write a model, with its adapter merged, as a .gguf file for llama.cpp or a folder of transformers."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from peakgpt.engine.checkpoint.gguf.export import DTYPES, import_gguf, write_gguf
from peakgpt.engine.checkpoint.model_folder import MODEL_FILES
from peakgpt.engine.data.gguf_vocabulary import tokenizer_metadata
from peakgpt.engine.data.model_source import NAMES, locate
from peakgpt.engine.data.tokenizer import END_OF_TEXT, Tokenizer
from peakgpt.engine.data.tokenizer_files import has_tokenizer, read_folder, tokenizer_folder
from peakgpt.engine.gpt import GPT

FORMATS = ("gguf", "safetensors")
DTYPE = {"gguf": "f16", "safetensors": "bf16"}  # defaults of --dtype: llama.cpp's converter's, and that of training
TORCH_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="MODEL", help=f"model, or an adapter, which is merged: {NAMES}")
    parser.add_argument("file", metavar="OUT", help="new file to write, such as model.gguf; of safetensors a folder")
    parser.add_argument("--format", required=True, choices=FORMATS,
                        help="gguf: llama.cpp's; needs peakgpt[gguf]. safetensors: transformers'")  # fmt: skip
    parser.add_argument("--dtype", choices=DTYPES, help="of the matrices (default: f16 for gguf, bf16 for safetensors)")


def run(args: argparse.Namespace) -> int:
    dtype = args.dtype or DTYPE[args.format]
    if args.format == "safetensors":
        return _export_folder(args.source, Path(args.file), dtype)
    import_gguf()  # raises before the model is loaded
    folder = locate(args.source, MODEL_FILES)
    model = GPT.from_pretrained(folder, dequantize=True).merge_and_unload()
    tokenizer, folder = None, tokenizer_folder(folder)
    if has_tokenizer(folder):
        files = read_folder(folder)
        special = {"eos_token": END_OF_TEXT, **files.special_tokens}
        tokenizer = tokenizer_metadata(files.library, special, files.chat_templates, model.config.vocab_size)
    name = write_gguf(args.file, model.config, model.state_dict(), tokenizer, dtype)
    size = Path(args.file).stat().st_size
    print(f"{args.file}: {name} of llama.cpp, {dtype}, {size / 2**20:.1f} MiB, {_words(tokenizer)}")
    return 0


def _export_folder(source: str, out: Path, dtype: str) -> int:
    """Write a model folder of transformers."""
    if dtype not in TORCH_DTYPES:
        raise ValueError(f"--dtype is {dtype}, expected {', '.join(TORCH_DTYPES)} with --format safetensors")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"export: OUT {out} exists already, expected a new or an empty folder")
    folder = locate(source, MODEL_FILES)
    model = GPT.from_pretrained(folder, dequantize=True).merge_and_unload()
    tokenizer = Tokenizer.load(folder) if has_tokenizer(tokenizer_folder(folder)) else None
    model.save_pretrained(out, tokenizer, dtype=TORCH_DTYPES[dtype])
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    print(f"{out}: {dtype}, {size / 2**20:.1f} MiB, {_words(tokenizer)}")
    return 0


def _words(tokenizer: object | None) -> str:
    return "with its tokenizer" if tokenizer else "without a tokenizer, as MODEL has none"
