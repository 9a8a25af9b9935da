"""peakgpt generate: continue a prompt with a checkpoint, streaming, with tokens per second."""

from __future__ import annotations

import argparse
import sys
import time

import torch

from peakgpt.engine.model import GPT
from peakgpt.engine.tokenizer import StreamDecoder, Tokenizer
from peakgpt.engine.train import best_dtype
from peakgpt.kernels.device import choose_device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="folder in transformers' GPT-2 layout, with a tokenizer")
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--tokens", type=int, default=200, help="tokens to add at most (default 200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default 0.8)")
    parser.add_argument("--top-k", type=int, default=50, help="sample among this many (default 50)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help='"cpu" or "cuda"; the CUDA device where there is one by default')


def run(args: argparse.Namespace) -> int:
    device = choose_device(args.device)
    model = GPT.from_pretrained(args.checkpoint).to(device, best_dtype(device)).eval()
    stream_text(model, Tokenizer.load(args.checkpoint), args.prompt, max_new_tokens=args.tokens,
                temperature=args.temperature, top_k=args.top_k, seed=args.seed)  # fmt: skip
    return 0


def stream_text(model: GPT, tokenizer: Tokenizer, prompt: str, *, max_new_tokens: int, **sampling) -> str:
    """Print prompt and continuation as the tokens come, then tokens per second; returns the whole text."""
    ids = torch.tensor([tokenizer.encode(prompt)], device=next(model.parameters()).device)
    if ids.shape[1] == 0:
        raise ValueError("prompt: got no token, expected some text")
    room = model.config.block_size - ids.shape[1]
    pieces, decoder, count, start = [prompt], StreamDecoder(tokenizer), 0, time.perf_counter()
    sys.stdout.write(prompt)
    for token in model.stream(ids, max_new_tokens=min(max_new_tokens, room), stop=(tokenizer.end_id,), **sampling):
        pieces.append(decoder.feed(int(token)))
        sys.stdout.write(pieces[-1])
        sys.stdout.flush()
        count += 1
    pieces.append(decoder.finish())
    seconds = time.perf_counter() - start
    sys.stdout.write(f"{pieces[-1]}\n\n[{count} tokens, {count / seconds:.0f} tokens/s]\n")
    return "".join(pieces)
