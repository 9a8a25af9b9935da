"""peakgpt generate: continue a prompt with a checkpoint, streaming, with tokens per second."""

from __future__ import annotations

import argparse
import sys
import time

from peakgpt.engine.data.tokenizer import Tokenizer
from peakgpt.engine.gpt import GPT
from peakgpt.engine.inference.engine import Engine, SamplingParams
from peakgpt.engine.inference.kv_cache import CACHE_DTYPES
from peakgpt.engine.inference.prompt_file import read_prompt
from peakgpt.engine.inference.speculative import DraftModel, PromptLookup, Speculation
from peakgpt.engine.training.train_config import best_dtype
from peakgpt.kernels.hardware.device import choose_device

LOOKUP = "lookup"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="folder in the Hugging Face layout, with a tokenizer")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", help="text to continue")
    prompt.add_argument("--prompt-file", help="file with it: text, or JSON with examples (docs/inference.md)")
    parser.add_argument("--tokens", type=int, default=200, help="tokens to add at most (default 200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default 0.8)")
    parser.add_argument("--top-k", type=int, default=50, help="sample among this many (default 50)")
    parser.add_argument("--top-p", type=float, help="sample among the fewest that reach this probability")
    parser.add_argument("--stop", action="append", default=[], help="text that ends the continuation; repeatable")
    parser.add_argument("--seed", type=int, default=0, help="of the random choice (default 0)")
    parser.add_argument("--speculate", metavar="DRAFT",
                        help=f'the same text sooner: "{LOOKUP}" looks up repeated words, a checkpoint folder is a '
                        "draft model with the same tokenizer; prints the speed-up over doing without")  # fmt: skip
    parser.add_argument("--cache", choices=CACHE_DTYPES, help="int8 keys and values: half of bfloat16's memory")
    parser.add_argument("--device", help='"cpu" or "cuda"; the CUDA device where there is one by default')


def run(args: argparse.Namespace) -> int:
    device = choose_device(args.device)
    load = lambda folder: GPT.from_pretrained(folder).to(device, best_dtype(device)).eval()  # noqa: E731
    prompt, stops = read_prompt(args.prompt_file) if args.prompt_file else (args.prompt, ())
    model, tokenizer = load(args.checkpoint), Tokenizer.load(args.checkpoint)
    speculation: Speculation | None = None
    if args.speculate:
        speculation = PromptLookup() if args.speculate == LOOKUP else DraftModel(load(args.speculate))
    stream_text(model, tokenizer, prompt, max_tokens=args.tokens, temperature=args.temperature, top_k=args.top_k,
                top_p=args.top_p, stop=(*stops, *args.stop), seed=args.seed,
                speculation=speculation, cache=args.cache)  # fmt: skip
    return 0


def stream_text(model: GPT, tokenizer: Tokenizer, prompt: str, *, max_tokens: int,
                speculation: Speculation | None = None, cache: str | None = None, **sampling) -> str:  # fmt: skip
    """Print prompt and continuation as the tokens come, then tokens per second; returns the whole text."""
    ids = tokenizer.encode(prompt)
    if not ids:
        raise ValueError("prompt: got no token, expected some text")
    room = model.config.block_size - len(ids)
    if room < 1:
        raise ValueError(f"prompt: got {len(ids)} tokens, expected fewer than the model's {model.config.block_size}")
    params = SamplingParams(max_tokens=min(max_tokens, room), stop_token_ids=(tokenizer.end_id,), **sampling)
    engine = Engine(model, tokenizer, streams=1, speculation=speculation, cache=cache)
    sys.stdout.write(prompt)
    pieces, tokens, rate = _timed(engine, ids, params, sys.stdout)
    sys.stdout.write(f"\n\n[{len(tokens)} token{'s' * (len(tokens) != 1)}, {rate:.0f} tokens/s]\n")
    if engine.executor_note:
        sys.stdout.write(f"[{engine.executor_note}]\n")
    if speculation:
        _, plain, plain_rate = _timed(Engine(model, tokenizer, streams=1, cache=cache), ids, params, None)
        same = "the same" if plain == tokens else "NOT THE SAME"
        sys.stdout.write(f"[{engine.accepted} of {engine.proposed} proposed tokens were right; {plain_rate:.0f} "
                         f"tokens/s without: {rate / plain_rate:.2f} x, text {same}]\n")  # fmt: skip
    return "".join([prompt, *pieces])


def _timed(engine: Engine, ids: list[int], params: SamplingParams, out) -> tuple[list[str], list[int], float]:
    """Pieces of text, tokens, and tokens per second."""
    pieces, tokens, start = [], [], time.perf_counter()
    for output in engine.stream(ids, params):
        pieces.append(output.text)
        tokens += output.token_ids
        if out:
            out.write(output.text)
            out.flush()
    return pieces, tokens, len(tokens) / (time.perf_counter() - start)
