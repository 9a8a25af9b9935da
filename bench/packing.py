"""A training step on packed documents that do not attend to each other, versus whole rows: `peakgpt bench packing`."""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from peakgpt.bench.interleave import interleave
from peakgpt.bench.run_results import Emit
from peakgpt.bench.schema import Result
from peakgpt.engine.gpt import GPT
from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.model.flops import training_flops
from peakgpt.engine.model.presets import preset
from peakgpt.engine.training.train_config import TrainConfig, best_dtype
from peakgpt.engine.training.trainer import Trainer
from peakgpt.kernels.command_line import integer
from peakgpt.kernels.hardware.peaks import peak_for
from peakgpt.kernels.ops.attention import live_pairs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="gpt2", help="preset (default gpt2, 124M)")
    parser.add_argument("--batch", type=integer(), default=8)
    parser.add_argument("--tokens", type=integer(), default=1024)
    parser.add_argument("--documents", type=integer(), nargs="+", default=[1, 4, 16],
                        help="of equal length in a row; one contender for each number (default 1 4 16)")  # fmt: skip
    parser.add_argument("--rounds", type=integer(), default=20)


def run(args: argparse.Namespace, device: torch.device, emit: Emit) -> None:
    recipe = TrainConfig(batch=args.batch, tokens=args.tokens, dtype=best_dtype(device))
    config = preset(args.model, block_size=max(args.tokens, preset(args.model).block_size))
    for row in compare(config, recipe, args.documents, device, rounds=args.rounds):
        emit(row)


def compare(
    config: GPTConfig, recipe: TrainConfig, documents: list[int], device: torch.device, *, rounds: int
) -> list[Result]:
    """Time a step on whole rows, and on rows of so many masked documents.

    Args:
        config, recipe: model and training.
        documents: numbers of documents in a row.
        rounds: of each contender.
    """
    torch.manual_seed(recipe.seed)
    trainer = Trainer(GPT(config).to(device), recipe, steps=10_000)
    ids, targets = torch.randint(config.vocab_size, (2, recipe.batch, recipe.tokens), device=device)
    inputs: dict[str, tuple[Tensor, ...]] = {"peakgpt": (ids, targets)}
    notes = {"peakgpt": ""}
    for count in documents:
        name = f"peakgpt, {count} masked documents a row"
        position_ids = _positions(recipe.tokens, count).expand(recipe.batch, -1).contiguous().to(device)
        inputs[name] = (ids, targets, position_ids)
        notes[name] = f"{100 * _live_share(position_ids[0]):.1f} % of the pairs of tokens that a whole row attends to"
    timings = interleave({name: lambda t=t: trainer.step(*t) for name, t in inputs.items()}, rounds=rounds,
                         device=device)  # fmt: skip
    peak, flops = peak_for(device, recipe.dtype), training_flops(config, recipe.tokens) * ids.numel()
    return [
        Result.of(
            timing.noted(notes[name]) if notes[name] else timing, bench="train", contender=name, backend="auto",
            case={"batch": recipe.batch, "tokens": recipe.tokens, "n_layer": config.n_layer, "n_embd": config.n_embd},
            device=str(device), dtype=str(recipe.dtype).removeprefix("torch."), flops=flops, flops_kind="model",
            peak_flops_s=peak.flops_s, peak_source=peak.source,
        )
        for name, timing in timings.items()
    ]  # fmt: skip


def _positions(tokens: int, documents: int) -> Tensor:
    """Return the position of each token in its document, (tokens,), for documents of equal length."""
    index = torch.arange(tokens, dtype=torch.int32)
    length = -(-tokens // documents)
    return index % length


def _live_share(position_ids: Tensor) -> float:
    """Return the share of a row's causal pairs of tokens that masked documents keep."""
    return float((position_ids + 1).sum()) / live_pairs(len(position_ids), len(position_ids), True, None)
