"""peakgpt generate: stream the continuation of a prompt, or an answer to it, then print tokens per second."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from peakgpt.engine.checkpoint.adapters.attach import merge_floats
from peakgpt.engine.checkpoint.model_folder import MODEL_FILES
from peakgpt.engine.data.model_source import NAMES, locate
from peakgpt.engine.data.tokenizer import Tokenizer
from peakgpt.engine.gpt import GPT
from peakgpt.engine.inference.engine import Engine, SamplingParams
from peakgpt.engine.inference.kv_cache import CACHE_DTYPES
from peakgpt.engine.inference.prompt_file import read_prompt
from peakgpt.engine.inference.speculative import DraftModel, PromptLookup, Speculation
from peakgpt.engine.training.train_config import best_dtype
from peakgpt.kernels.command_line import MAX_SEED, integer, number, refuse_ignored
from peakgpt.kernels.hardware.device import choose_device

LOOKUP = "lookup"
# Where neither a flag nor the checkpoint's generation_config.json says it.
MAX_TOKENS, SAMPLING, SEED = 200, {"temperature": 0.8, "top_k": 50}, 0
CHOOSING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")  # flags of how tokens are chosen


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help=f"model with a tokenizer: {NAMES}")
    parser.add_argument("--adapter", metavar="FOLDER",
                        help="LoRA adapter in PEFT's format for the model; a folder of one is a checkpoint too, whose "
                        "base model it names")  # fmt: skip
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("-p", "--prompt", help="text to continue")
    prompt.add_argument("-f", "--file", help="file with the prompt: text, or JSON with examples (docs/inference.md)")
    parser.add_argument("--chat", action="store_true",
                        help="the prompt is a message of a user, in the checkpoint's chat template; print the answer")
    parser.add_argument("--system", metavar="TEXT", help="the system message before it, with --chat")
    options = parser.add_argument_group(
        "how tokens are chosen", "A flag wins over the checkpoint's generation_config.json. If that file says nothing "
        f"about sampling, the temperature is {SAMPLING['temperature']} and top-k is {SAMPLING['top_k']}."
    )  # fmt: skip
    options.add_argument("-n", "--max-tokens", type=integer(),
                         help=f"most new tokens (default: the file's, else {MAX_TOKENS})")  # fmt: skip
    options.add_argument("--temperature", type=number(or_equal=True), help="0 is greedy")
    options.add_argument("--top-k", type=integer(0), help="sample from this many most likely tokens; 0: from all")
    options.add_argument("--top-p", type=number(high=1),
                         help="sample from the fewest tokens that reach this probability")  # fmt: skip
    options.add_argument("--min-p", type=number(high=1, or_equal=True),
                         help="sample from tokens with at least this share of the largest probability")  # fmt: skip
    options.add_argument("--repetition-penalty", type=number(high=10), help="more than 1 avoids repeated tokens")
    options.add_argument("--stop", action="append", default=[], help="text that ends the continuation; may be repeated")
    options.add_argument("--seed", type=integer(0, MAX_SEED), help=f"seed of sampling (default {SEED})")
    parser.add_argument("--speculative-model", metavar="DRAFT",
                        help=f'speculative decoding, which gives the same text: "{LOOKUP}" proposes repeated words, a '
                        "checkpoint is a draft model with the same tokenizer; prints the speed-up")  # fmt: skip
    parser.add_argument("--kv-cache-dtype", choices=CACHE_DTYPES,
                        help="quantize the KV cache: half the memory of bfloat16")  # fmt: skip
    parser.add_argument("--device", help='"cpu" or "cuda" (default: "cuda" if available)')


def run(args: argparse.Namespace) -> int:
    given = {name: value for name in CHOOSING if (value := getattr(args, name)) is not None}
    if args.temperature == 0:
        _refuse_sampling(args, "--temperature 0")
    if not args.chat:
        refuse_ignored(args, ("system",), "without --chat, expected both")
    SamplingParams(**{**given, "top_k": args.top_k or None}, stop=args.stop)  # raises before the model is loaded
    device = choose_device(args.device)
    load = lambda source: GPT.from_pretrained(source, dtype=best_dtype(device), merge_adapter=True).to(device)  # noqa: E731
    prompt, stops = read_prompt(args.file) if args.file is not None else (args.prompt, ())
    source = locate(args.checkpoint, MODEL_FILES)
    model, tokenizer = load(source), Tokenizer.load(source)
    if args.adapter is not None:
        model.load_adapter(args.adapter)
        merge_floats(model)
    speculation: Speculation | None = None
    if args.speculative_model:
        speculation = PromptLookup() if args.speculative_model == LOOKUP else DraftModel(load(args.speculative_model))
    sampling = _sampling(model, given)
    if sampling["temperature"] == 0:
        _refuse_sampling(args, "do_sample false in generation_config.json")
    stops = (*stops, *args.stop) or model.generation_config.stop_strings
    messages = _messages(args.system, prompt) if args.chat else ()
    stream_text(model, tokenizer, prompt, max_tokens=args.max_tokens, stop=stops, speculation=speculation,
                cache=args.kv_cache_dtype, messages=messages, **sampling)  # fmt: skip
    return 0


def _messages(system: str | None, prompt: str) -> list[dict[str, str]]:
    before = [] if system is None else [{"role": "system", "content": system}]
    return [*before, {"role": "user", "content": prompt}]


def _refuse_sampling(args: argparse.Namespace, reason: str) -> None:
    refuse_ignored(args, ("top_k", "top_p", "min_p", "seed"),
                   f"with {reason}, which is greedy; expected a higher temperature")  # fmt: skip


def _sampling(model: GPT, given: dict[str, Any]) -> dict[str, Any]:
    """Return how tokens are chosen: by the flags, by the checkpoint, or by this command's defaults."""
    defaults = model.generation_config
    others = {"temperature": 1.0} if defaults.states_sampling else SAMPLING
    sampling = {"seed": SEED, **others, **defaults.sampling(), **given}
    return {**sampling, "top_k": sampling.get("top_k") or None}  # 0: all tokens


def stream_text(model: GPT, tokenizer: Tokenizer, prompt: str, *, max_tokens: int | None = None,
                speculation: Speculation | None = None, cache: str | None = None,
                messages: Sequence[Mapping[str, str]] = (), **sampling) -> str:  # fmt: skip
    """Print the prompt and each new token as it is decoded, then tokens per second. Returns prompt and continuation.

    Without max_tokens the checkpoint says how long the text is. With messages the prompt is their chat template, and
    the answer alone is printed and returned.
    """
    if messages:
        prompt = ""
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    else:
        ids = tokenizer.encode(prompt)
    if not ids:
        raise ValueError("prompt: got no token, expected text")
    free = model.config.block_size - len(ids)
    if free < 1:
        raise ValueError(f"prompt: got {len(ids)} tokens, expected fewer than the model's {model.config.block_size}")
    count = max_tokens or model.generation_config.max_tokens(len(ids)) or MAX_TOKENS
    params = SamplingParams(max_tokens=min(count, free), **sampling)
    engine = Engine(model, tokenizer, streams=1, speculation=speculation, cache=cache)
    sys.stdout.write(prompt)
    pieces, tokens, rate = _run_request(engine, ids, params, sys.stdout)
    sys.stdout.write(f"\n\n[{len(tokens)} token{'s' * (len(tokens) != 1)}, {rate:.0f} tokens/s]\n")
    if engine.executor_note:
        sys.stdout.write(f"[{engine.executor_note}]\n")
    if speculation:
        _, plain, plain_rate = _run_request(Engine(model, tokenizer, streams=1, cache=cache), ids, params, None)
        same = "the same" if plain == tokens else "NOT THE SAME"
        sys.stdout.write(f"[{engine.accepted} of {engine.proposed} proposed tokens accepted; {plain_rate:.0f} "
                         f"tokens/s without speculation: {rate / plain_rate:.2f} x, text {same}]\n")  # fmt: skip
    return "".join([prompt, *pieces])


def _run_request(engine: Engine, ids: list[int], params: SamplingParams, out) -> tuple[list[str], list[int], float]:
    """Run one request and write its text to `out`; return pieces of text, token ids, and tokens per second."""
    pieces, tokens, start = [], [], time.perf_counter()
    for output in engine.stream(ids, params):
        pieces.append(output.text)
        tokens += output.token_ids
        if out:
            out.write(output.text)
            out.flush()
    return pieces, tokens, len(tokens) / (time.perf_counter() - start)
