"""peakgpt score: log-probabilities of continuations, or the perplexity of a text in overlapping windows."""

from __future__ import annotations

import argparse
import dataclasses
import math
from pathlib import Path

import torch

from peakgpt.engine.checkpoint.model_folder import MODEL_FILES
from peakgpt.engine.data.model_source import NAMES, locate
from peakgpt.engine.data.text_file import read_text
from peakgpt.engine.data.tokenizer import Tokenizer
from peakgpt.engine.evaluation.score import Scorer, text_perplexity
from peakgpt.engine.evaluation.zero_shot import ZeroShot
from peakgpt.engine.gpt import GPT
from peakgpt.engine.inference.kv_cache import CACHE_DTYPES
from peakgpt.engine.training.train_config import best_dtype
from peakgpt.kernels.command_line import integer, refuse_ignored
from peakgpt.kernels.hardware.device import choose_device
from peakgpt.kernels.strict_json import dumps


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help=f"model with a tokenizer: {NAMES}")
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--text", type=Path, help="file to compute the perplexity of")
    mode.add_argument("--continuation", action="append", help="text to score after --context; may be repeated")
    parser.add_argument("--context", help="text before the continuations (default: none)")
    parser.add_argument("--window", type=integer(2), help="context length in tokens (default: block_size of the model)")
    parser.add_argument("--stride", type=integer(),
                        help="tokens scored by each window, below --window (default: half the window); without "
                        "--window a larger one is capped by the model's context")
    parser.add_argument("--dtype", choices=("float32", "best"), default="float32",
                        help="best: bfloat16 if the device multiplies it (default float32)")  # fmt: skip
    parser.add_argument("--kv-cache-dtype", choices=CACHE_DTYPES, help="quantize the KV cache, as in `peakgpt serve`")
    parser.add_argument("--device", help='"cpu" or "cuda" (default: "cuda" if available)')


def run(args: argparse.Namespace) -> int:
    if args.continuation is None:
        refuse_ignored(args, ("context",), "without --continuation, expected both")
    if args.text is None:
        refuse_ignored(args, ("window", "stride"), "without --text, expected both")
    device = choose_device(args.device)
    source, dtype = locate(args.checkpoint, MODEL_FILES), best_dtype(device) if args.dtype == "best" else torch.float32
    model = GPT.from_pretrained(source, dtype=dtype, merge_adapter=True).to(device)
    scorer, tokenizer = Scorer(model, cache=args.kv_cache_dtype), Tokenizer.load(source)
    if args.text is not None:
        _perplexity(scorer, tokenizer, args)
    else:
        _continuations(ZeroShot(scorer, tokenizer), args.context or "", args.continuation)
    return 0


def _perplexity(scorer: Scorer, tokenizer: Tokenizer, args: argparse.Namespace) -> None:
    text = read_text(args.text)
    result = text_perplexity(scorer, tokenizer, text, window=args.window, stride=args.stride)
    bits = result.nll_nats / math.log(2) / len(text.encode())
    row = {"perplexity": result.value, "bits_per_byte": bits, **dataclasses.asdict(result)}
    print(f"perplexity {result.value:.4f} of {result.tokens} tokens, windows of {result.window} by {result.stride}, "
          f"{bits:.4f} bits per byte")  # fmt: skip
    print(dumps(row))


def _continuations(zero_shot: ZeroShot, context: str, continuations: list[str]) -> None:
    scores = zero_shot.continuations([(context, continuation) for continuation in continuations])
    print(f"{'log p':>10}  {'a token':>10}  {'greedy':>6}  continuation")
    for text, score in zip(continuations, scores, strict=True):
        greedy = "yes" if all(score.greedy) else "no"
        print(f"{score.total:10.4f}  {score.mean:10.4f}  {greedy:>6}  {text!r}")
    rows = [{"continuation": text, "logprob": score.total, "tokens": len(score.logprobs), "greedy": all(score.greedy)}
            for text, score in zip(continuations, scores, strict=True)]  # fmt: skip
    print(dumps(rows))
