"""peakgpt quickstart: train a small GPT on text of this machine, compare with PyTorch eager, write a report."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import replace

from rich.console import Console

from peakgpt.bench.environment import environment
from peakgpt.bench.report import notes, tables, verdicts, write_report
from peakgpt.bench.run_results import RunResults
from peakgpt.bench.schema import write_results
from peakgpt.closed_output import PIPE_EXIT_CODE, Output
from peakgpt.engine.data.corpus import load_corpus
from peakgpt.engine.data.prepare import prepare
from peakgpt.engine.data.tokenizer import train_tokenizer
from peakgpt.engine.training.run_folder import RunFolder
from peakgpt.engine.training.stop_signals import stop_on_signals
from peakgpt.engine.training.train_config import TrainConfig, best_dtype
from peakgpt.heartbeat import enter_phase
from peakgpt.kernels.command_line import MAX_SEED, integer, number
from peakgpt.kernels.doctor import doctor
from peakgpt.kernels.hardware.device import choose_device
from peakgpt.quickstart_session import Session, Stopped
from peakgpt.time_budget import TimeBudget

VOCAB = 4096
CONFIG = TrainConfig(batch=8, tokens=256, lr=2e-3)
# Share of the wall time at which each phase should end; the machine's other load decides how much fits into it.
ENDS = {"tokenizer": 0.1, "training": 0.82, "decoding": 0.91, "ops": 0.98}
TOKENIZER_S = 20.0  # at least, however short --minutes is


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=number(), default=5.0, help="wall time of the command (default 5)")
    parser.add_argument("--text", nargs="+", metavar="FILE", help="UTF-8 files or folders (default: Python's library)")
    parser.add_argument("--device", help='"cpu" or "cuda" (default: the CUDA device if there is one)')
    parser.add_argument("--out", help="folder of the run (default runs/quickstart-DATE-TIME)")
    parser.add_argument("--seed", type=integer(0, MAX_SEED), default=CONFIG.seed,
                        help="seed of initial weights and data order")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    budget = TimeBudget(60 * args.minutes, ENDS)
    output = Output()
    console = Console(file=output)
    device = choose_device(args.device)
    console.print(str(doctor(device)), highlight=False, soft_wrap=True)
    corpus = load_corpus(args.text)
    console.print(f"\ncorpus: {corpus}")
    folder = RunFolder.with_default_name("quickstart") if args.out is None else RunFolder(args.out)
    with folder.discarded_on_bad_input():
        enter_phase("training the tokenizer")
        texts = budget.take("tokenizer", (d.text for d in corpus.train), at_least=TOKENIZER_S)
        tokenizer = train_tokenizer(texts, VOCAB)
        enter_phase("encoding the text")
        shards = prepare(corpus, tokenizer, folder.tokens)
        console.print(
            f"tokens: {len(shards[0]):,} to train on, {len(shards[1]):,} to validate, "
            f"vocabulary {tokenizer.vocab_size}, {shards[0].bytes_per_token:.2f} bytes per token"
        )
        config = replace(CONFIG, dtype=best_dtype(device), seed=args.seed)
        session = Session.build(device, config, tokenizer, *shards, folder)
    found = RunResults()
    enter_phase("training")
    with stop_on_signals() as stop:
        try:
            found.results += session.train(console, budget, lambda: stop() or output.lost)
        except Stopped:
            session.loop.save_model(folder.checkpoint, tokenizer)
            console.print(f"\nstopped after {session.loop.trainer.steps_done} steps; checkpoint in {folder.checkpoint}")
            return PIPE_EXIT_CODE if output.lost else stop.exit_code
        session.loop.save_model(folder.checkpoint, tokenizer)
    enter_phase("decoding")
    text = session.sample(console, found, budget)
    enter_phase("timing the ops")
    session.time_ops(found, budget)
    enter_phase("writing the report")
    env = environment(device)
    write_results(
        folder.path / "results.json", found.results, env, failures=[dataclasses.asdict(f) for f in found.failures]
    )
    write_report(folder.path / "report.html", rows=folder.rows(), results=found.results, environment=env,
                 corpus=str(corpus), sample=text)  # fmt: skip
    print(*tables(found.results), *notes(found.results), *verdicts(found), sep="\n")
    console.print(
        f"\ncheckpoint: {folder.checkpoint}   report: {folder.path / 'report.html'}\n"
        f"next: peakgpt generate {folder.checkpoint} --prompt 'def '\n"
        "      peakgpt quickstart --text FILE... --minutes 30\n"
        "      peakgpt bench train"
    )
    return PIPE_EXIT_CODE if output.lost else found.exit_code
