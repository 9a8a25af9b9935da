"""peakgpt serve: OpenAI-compatible completions over HTTP, on the loopback address by default."""

from __future__ import annotations

import argparse
import ipaddress
import os
import signal
import socket
import sys
from pathlib import Path

import torch

from peakgpt.engine.checkpoint.model_folder import MODEL_FILES, read_config
from peakgpt.engine.data.hub import HubModel
from peakgpt.engine.data.model_source import NAMES, locate, parse_source
from peakgpt.engine.data.tokenizer import Tokenizer
from peakgpt.engine.gpt import GPT
from peakgpt.engine.inference.block_pool import BLOCK_TOKENS
from peakgpt.engine.inference.cache_size import MEMORY_SHARE, TYPICAL_TOKENS, block_bytes
from peakgpt.engine.inference.engine import STREAMS, Engine
from peakgpt.engine.inference.kv_cache import CACHE_DTYPES
from peakgpt.kernels.command_line import integer
from peakgpt.kernels.cpu.memory import keep_pages
from peakgpt.kernels.hardware.device import choose_device, describe
from peakgpt.serve.keys import check_keys, read_key_file

KEY = "PEAKGPT_API_KEY"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help=f"model with a tokenizer: {NAMES}")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    parser.add_argument(
        "--port", type=integer(0, 65535), default=8000, help="port (default 8000; 0 chooses a free port)"
    )
    parser.add_argument("--served-model-name", help="name in requests (default: its name on the hub, or the folder's)")
    parser.add_argument("--api-key-file", type=Path,
                        help=f"file with the keys of which clients must send one, one a line (or ${KEY})")  # fmt: skip
    parser.add_argument("--api-key", action="append", metavar="KEY",
                        help="a key; may be repeated. The process list shows it to other users")  # fmt: skip
    parser.add_argument("--device", help='"cpu", "cuda" or "auto" (default: "cuda" if available)')
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--blocks", type=integer(),
                        help=f"size of the KV cache in {BLOCK_TOKENS}-token blocks (default: {STREAMS} sequences of "
                        f"{TYPICAL_TOKENS} tokens, in at most {MEMORY_SHARE:.0%}% of free memory)")  # fmt: skip
    parser.add_argument("--kv-cache-dtype", choices=CACHE_DTYPES,
                        help="quantize the KV cache: half the memory of bfloat16")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    try:
        import uvicorn

        from peakgpt.serve.app import Server
        from peakgpt.serve.guard import LOOPBACK, config
        from peakgpt.serve.limits import LIMITS
    except ImportError as error:
        raise ValueError(f"serve: got {error}, expected the packages of pip install -e '.[serve]'") from None
    name, keys, device = _name(args), _keys(args), choose_device(args.device)
    family, address = _resolve(args.host, args.port)
    is_loopback = ipaddress.ip_address(address[0].partition("%")[0]).is_loopback
    if not is_loopback and not keys:
        raise ValueError(f"serve: host is {args.host} without an API key, expected --api-key-file or ${KEY}")
    args.checkpoint = locate(args.checkpoint, MODEL_FILES)
    _check_cache_size(args, device)
    with _bound_socket(family, address) as listening:
        # uvicorn finishes running requests and then raises the signal again. SIGTERM must give exit code 0.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        keep_pages()  # else every step pays page faults for its logits, 13 MB for 64 streams
        tokenizer = Tokenizer.load(args.checkpoint)
        model = GPT.from_pretrained(args.checkpoint, dtype=getattr(torch, args.dtype), merge_adapter=True).to(device)
        engine = Engine(model, tokenizer, blocks=args.blocks, cache=args.kv_cache_dtype)
        notes = engine.cache_note, engine.executor_note, engine.preparation.defaults.note
        print("\n".join(filter(None, notes)), file=sys.stderr, flush=True)
        server = Server(
            engine, tokenizer, name=name,
            key=keys, hosts=(*LOOPBACK, address[0]) if is_loopback else None,
        )  # fmt: skip
        http = uvicorn.Server(config(server.app, LIMITS))
        server.worker.on_failure = lambda: setattr(http, "should_exit", True)  # a supervisor starts the server again
        listening.listen(LIMITS.connections)
        host, port = listening.getsockname()[:2]
        print(f"{server.name}: http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
        http.run([listening])
    return 1 if server.worker.failed else 0


def _name(args: argparse.Namespace) -> str:
    """Return the name of the model in requests.

    Raises:
        ValueError: it is empty, or has characters that no request can write or no terminal can show.
    """
    given = args.served_model_name
    source = parse_source(args.checkpoint)
    named = source.name if isinstance(source, HubModel) else source.resolve().name
    name = named if given is None else given
    if not name or not name.isprintable():
        raise ValueError(f"--served-model-name: got {name[:80]!r}, expected printable characters")
    return name


def _keys(args: argparse.Namespace) -> list[str] | None:
    """Return the API keys of the flags, or else of the environment.

    Raises:
        ValueError: a key is blank. A server without a key, where one was meant, would be open to everyone.
    """
    keys = [] if args.api_key_file is None else read_key_file(args.api_key_file)
    if args.api_key is not None:
        keys += check_keys(args.api_key, "--api-key")
        print("peakgpt: warning: --api-key can be read in the process list; --api-key-file cannot", file=sys.stderr)
    if not keys and KEY in os.environ:
        keys = check_keys([os.environ[KEY]], f"${KEY}")
    return keys or None


def _resolve(host: str, port: int) -> tuple[socket.AddressFamily, tuple]:
    """Return the address family and the address to listen on.

    Raises:
        ValueError: an unknown host.
    """
    try:
        if not host.strip():
            raise OSError("a blank name")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return family, socket.getaddrinfo(host, port, family, socket.SOCK_STREAM)[0][4]
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"--host: got {host[:80]!r} ({reason}), expected an address of this machine") from None


def _check_cache_size(args: argparse.Namespace, device: torch.device) -> None:
    """Refuse a cache that is larger than the memory, before the model is loaded."""
    if args.blocks is None:
        return
    _, config = read_config(args.checkpoint)
    most = describe(device).memory_bytes // block_bytes(config, getattr(torch, args.dtype), args.kv_cache_dtype)
    if args.blocks > most:
        raise ValueError(f"--blocks: got {args.blocks}, expected up to {most}, all memory of this machine")


def _bound_socket(family: socket.AddressFamily, address: tuple) -> socket.socket:
    """Bind a socket before the model is loaded, which may take minutes. It refuses connections until it listens.

    Raises:
        ValueError: the port is in use, or the address is not of this machine.
    """
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listening.bind(address)
    except OSError as error:
        listening.close()
        raise ValueError(
            f"serve: got {address[0]} port {address[1]} ({error.strerror}), expected a free port"
        ) from None
    return listening
