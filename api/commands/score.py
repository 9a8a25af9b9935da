"""peakgpt score: log-probabilities of continuations, or the perplexity of a text by windows."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from pathlib import Path

from peakgpt.engine.data.tokenizer import Tokenizer
from peakgpt.engine.evaluation.score import Scorer
from peakgpt.engine.evaluation.zero_shot import ZeroShot
from peakgpt.engine.gpt import GPT
from peakgpt.engine.inference.kv_cache import CACHE_DTYPES
from peakgpt.engine.training.train_config import best_dtype
from peakgpt.kernels.hardware.device import choose_device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="folder in the Hugging Face layout, with a tokenizer")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", type=Path, help="file whose perplexity is wanted")
    what.add_argument("--continuation", action="append", help="text to score after --context; may be repeated")
    parser.add_argument("--context", default="", help="what comes before; empty is the beginning of a text")
    parser.add_argument("--window", type=int, help="tokens seen at once (default: what the model takes)")
    parser.add_argument("--stride", type=int, help="tokens scored by each window (default: half of it)")
    parser.add_argument("--dtype", choices=("float32", "best"), default="float32")
    parser.add_argument("--cache", choices=CACHE_DTYPES, help="keep keys and values in bytes, as `peakgpt serve` may")
    parser.add_argument("--device", help='"cpu" or "cuda"; the CUDA device where there is one by default')


def run(args: argparse.Namespace) -> int:
    device = choose_device(args.device)
    model = GPT.from_pretrained(args.checkpoint).to(device)
    model = model.to(best_dtype(device)) if args.dtype == "best" else model
    scorer, tokenizer = Scorer(model, cache=args.cache), Tokenizer.load(args.checkpoint)
    if args.text:
        _perplexity(scorer, tokenizer, args)
    else:
        _continuations(ZeroShot(scorer, tokenizer), args.context, args.continuation)
    return 0


def _perplexity(scorer: Scorer, tokenizer: Tokenizer, args: argparse.Namespace) -> None:
    try:
        text = args.text.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{args.text}: got {error}, expected UTF-8") from None
    # The end of text goes first, so that the text's own first token is predicted from something.
    found = scorer.perplexity([tokenizer.end_id, *tokenizer.encode(text)], window=args.window, stride=args.stride)
    bits = found.nll_nats / math.log(2) / len(text.encode())
    row = {"perplexity": found.value, "bits_per_byte": bits, **dataclasses.asdict(found)}
    print(f"perplexity {found.value:.4f} of {found.tokens} tokens, windows of {found.window} by {found.stride}, "
          f"{bits:.4f} bits per byte")  # fmt: skip
    print(json.dumps(row))


def _continuations(zero: ZeroShot, context: str, continuations: list[str]) -> None:
    scores = zero.continuations([(context, continuation) for continuation in continuations])
    print(f"{'log p':>10}  {'a token':>10}  {'greedy':>6}  continuation")
    for text, score in zip(continuations, scores, strict=True):
        greedy = "yes" if all(score.greedy) else "no"
        print(f"{score.total:10.4f}  {score.mean:10.4f}  {greedy:>6}  {text!r}")
    rows = [{"continuation": text, "logprob": score.total, "tokens": len(score.logprobs), "greedy": all(score.greedy)}
            for text, score in zip(continuations, scores, strict=True)]  # fmt: skip
    print(json.dumps(rows))
