"""peakgpt serve: OpenAI-compatible completions over HTTP, on the loopback address by default."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
from pathlib import Path

import torch

from peakgpt.engine.data.tokenizer import Tokenizer
from peakgpt.engine.gpt import GPT
from peakgpt.engine.inference.block_pool import BLOCK_TOKENS
from peakgpt.engine.inference.cache_size import MEMORY_SHARE, TYPICAL_TOKENS
from peakgpt.engine.inference.engine import STREAMS, Engine
from peakgpt.engine.inference.kv_cache import CACHE_DTYPES
from peakgpt.kernels.cpu.memory import keep_pages

KEY = "PEAKGPT_API_KEY"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="folder in the Hugging Face layout, with a tokenizer")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="(default 8000; 0 chooses a free port)")
    parser.add_argument("--served-model-name", help="model name in requests (default: name of the folder)")
    parser.add_argument("--api-key-file", type=Path, help=f"file with the key that clients must send (or ${KEY})")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--blocks", type=int,
                        help=f"size of the KV cache in {BLOCK_TOKENS}-token blocks (default: {STREAMS} sequences of "
                        f"{TYPICAL_TOKENS} tokens, in at most {MEMORY_SHARE:.0%}% of free memory)")  # fmt: skip
    parser.add_argument("--kv-cache-dtype", choices=CACHE_DTYPES,
                        help="quantize the KV cache: half the memory of bfloat16")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    try:
        import uvicorn

        from peakgpt.serve.app import Server
        from peakgpt.serve.chat import read_chat_template
        from peakgpt.serve.guard import LOOPBACK, config
        from peakgpt.serve.limits import LIMITS
    except ImportError as error:
        raise ValueError(f"serve: got {error}, expected the packages of pip install -e '.[serve]'") from None
    loopback = args.host in ("127.0.0.1", "localhost", "::1")
    key = args.api_key_file.read_text().strip() if args.api_key_file else os.environ.get(KEY)
    if not loopback and not key:
        raise ValueError(f"serve: host is {args.host} without an API key, expected --api-key-file or ${KEY}")
    # uvicorn finishes running requests and then raises the signal again. A requested end is not a failure.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    keep_pages()  # torch would free and fault in again the logits of a step, 13 MB for 64 streams
    tokenizer = Tokenizer.load(args.checkpoint)
    model = GPT.from_pretrained(args.checkpoint, dtype=getattr(torch, args.dtype))
    engine = Engine(model, tokenizer, blocks=args.blocks, cache=args.kv_cache_dtype)
    print(engine.cache_note, file=sys.stderr, flush=True)
    server = Server(
        engine, tokenizer, name=args.served_model_name or Path(args.checkpoint).resolve().name,
        key=key or None, hosts=LOOPBACK if loopback else None,
        chat=read_chat_template(args.checkpoint, tokenizer.end_of_text),
    )  # fmt: skip
    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    with socket.create_server((args.host, args.port), family=family, backlog=LIMITS.connections) as listening:
        address = f"[{args.host}]" if family == socket.AF_INET6 else args.host
        print(f"{server.name}: http://{address}:{listening.getsockname()[1]}", flush=True)
        uvicorn.Server(config(server.app, LIMITS)).run([listening])
    return 0
