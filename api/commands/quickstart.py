"""peakgpt quickstart: train a small GPT on text of this machine, compare with PyTorch eager, write a report."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
from dataclasses import replace

from rich.console import Console

from peakgpt.bench.environment import environment
from peakgpt.bench.report import notes, result_sections, tables, verdicts
from peakgpt.bench.run_results import RunResults
from peakgpt.bench.schema import write_results
from peakgpt.closed_output import PIPE_EXIT_CODE, Output
from peakgpt.engine.data.corpus import Corpus, corpus_of, load_corpus
from peakgpt.engine.data.prepare import prepare
from peakgpt.engine.data.split import hash_fraction
from peakgpt.engine.data.tokenizer_training import train_tokenizer
from peakgpt.engine.training.html_page import Section, table, text_block
from peakgpt.engine.training.run_folder import RunFolder
from peakgpt.engine.training.run_report import write_report
from peakgpt.engine.training.stop_signals import stop_on_signals
from peakgpt.engine.training.train_config import TrainConfig, best_dtype
from peakgpt.heartbeat import enter_phase
from peakgpt.kernels.command_line import MAX_SEED, integer, number
from peakgpt.kernels.doctor import doctor
from peakgpt.kernels.hardware.device import choose_device
from peakgpt.quickstart_session import Plan, Session, Stopped
from peakgpt.time_budget import TimeBudget

VOCAB = 4096
CONFIG = TrainConfig(batch=8, tokens=256, lr=2e-3)
# Share of the wall time at which each phase should end; the machine's other load decides how much fits into it.
ENDS = {"tokenizer": 0.1, "training": 0.82, "decoding": 0.91, "ops": 0.98}
REPORT_S = 5.0  # left for results and report, which take 3 to 4 s on 2 busy cores of a Zen 4
MIN_MINUTES = 0.5  # of a machine that is not busy; see check_minutes
TEXT_BYTES_S = 50_000  # of text for each second of the budget: 5 minutes take all of Python's library, 11 MB


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=number(MIN_MINUTES, or_equal=True), default=5.0,
                        help=f"wall time of the command, at least {MIN_MINUTES:g} (default 5)")  # fmt: skip
    parser.add_argument("--text", nargs="+", metavar="FILE", help="UTF-8 files or folders (default: Python's library)")
    parser.add_argument("--device", help='"cpu" or "cuda" (default: the CUDA device if there is one)')
    parser.add_argument("--out", help="folder of the run (default runs/quickstart-DATE-TIME)")
    parser.add_argument("--seed", type=integer(0, MAX_SEED), default=CONFIG.seed,
                        help="seed of initial weights and data order")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    budget = TimeBudget(max(0.0, 60 * args.minutes - REPORT_S), ENDS)
    output = Output()
    console = Console(file=output)
    device = choose_device(args.device)
    console.print(str(doctor(device)), highlight=False, soft_wrap=True)
    corpus = share_of(load_corpus(args.text), int(60 * args.minutes * TEXT_BYTES_S))
    console.print(f"\ncorpus: {corpus}")
    folder = RunFolder.with_default_name("quickstart") if args.out is None else RunFolder(args.out)
    with contextlib.ExitStack() as stack:
        with folder.discarded_on_bad_input():
            enter_phase("training the tokenizer")
            texts = budget.take("tokenizer", (d.text for d in corpus.train))
            tokenizer = train_tokenizer(texts, VOCAB)
            enter_phase("encoding the text")
            shards = prepare(corpus, tokenizer, folder.tokens)
            console.print(
                f"tokens: {len(shards[0]):,} to train on, {len(shards[1]):,} to validate, "
                f"vocabulary {tokenizer.vocab_size}, {shards[0].bytes_per_token:.2f} bytes per token"
            )
            config = replace(CONFIG, dtype=best_dtype(device), seed=args.seed)
            session = Session.build(device, config, tokenizer, *shards, folder)
            stop = stack.enter_context(stop_on_signals())
            plan = session.plan(budget)
            check_minutes(args.minutes, budget, plan)
        found = RunResults()
        enter_phase("training")
        try:
            found.results += session.train(console, budget, plan, lambda: stop() or output.lost)
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
    sections = [*result_sections(found.results), Section("Sample", text_block(text)),
                Section("Environment", table(["", ""], [[k, str(v)] for k, v in env.items()]))]  # fmt: skip
    page = write_report(folder.path, sections, summary=str(corpus))
    print(*tables(found.results), *notes(found.results), *verdicts(found), sep="\n")
    console.print(
        f"\ncheckpoint: {folder.checkpoint}   report: {page}\n"
        f"next: peakgpt generate {folder.checkpoint} --prompt 'def '\n"
        "      peakgpt quickstart --text FILE... --minutes 30\n"
        "      peakgpt bench train"
    )
    return PIPE_EXIT_CODE if output.lost else found.exit_code


def check_minutes(minutes: float, budget: TimeBudget, plan: Plan) -> None:
    """Refuse a budget that the training would exceed with the fewest steps: the machine is slow, or busy elsewhere.

    Raises:
        ValueError: the message names the shortest budget that suffices at the present speed.
    """
    if plan.least_s <= budget.left_s("training"):
        return
    shortest_s = (budget.spent_s + plan.least_s) / ENDS["training"] + REPORT_S
    shortest = math.ceil(shortest_s / 6) / 10
    raise ValueError(f"quickstart: --minutes is {minutes:g}, expected at least {shortest:g} at the present speed of "
                     f"this machine: {budget.spent_s:.0f} s have passed before the training")  # fmt: skip


def share_of(corpus: Corpus, size_bytes: int) -> Corpus:
    """Return about `size_bytes` of a corpus, chosen by the names of its documents; all of a corpus of few documents."""
    total = corpus.size_bytes
    if total is None or total <= size_bytes:
        return corpus
    share = size_bytes / total
    kept = [document for _, document in corpus.parts() if hash_fraction(f"{document.name}\0share") < share]
    return corpus_of(kept) if len(kept) > 1 else corpus
