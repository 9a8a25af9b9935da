"""peakgpt evaluate: answer the questions of tasks with a model, in context, and score the answers."""

from __future__ import annotations

import argparse
import contextlib
import importlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from peakgpt.engine.checkpoint.model_folder import MODEL_FILES
from peakgpt.engine.data.documents import Document, ReadOptions
from peakgpt.engine.data.model_source import NAMES, locate
from peakgpt.engine.data.tokenizer import Tokenizer
from peakgpt.engine.evaluation.corpus_overlap import Overlap, corpus_documents, find_overlaps
from peakgpt.engine.evaluation.evaluator import AnswerOptions, Evaluator
from peakgpt.engine.evaluation.metrics import CHOICES, TEXT, Metric, metrics_of
from peakgpt.engine.evaluation.results import TaskResult, score_task, table, write_results
from peakgpt.engine.evaluation.task import Example, Shots, Task
from peakgpt.engine.evaluation.task_file import SUFFIXES, read_task
from peakgpt.engine.gpt import GPT
from peakgpt.engine.inference.kv_cache import CACHE_DTYPES
from peakgpt.engine.training.run_folder import default_run_folder
from peakgpt.engine.training.train_config import best_dtype
from peakgpt.heartbeat import enter_phase
from peakgpt.kernels.command_line import MAX_SEED, integer, number, refuse_ignored
from peakgpt.kernels.files import make_folders, remove_empty_folders
from peakgpt.kernels.hardware.device import choose_device
from peakgpt.kernels.strict_json import dumps

VOTING_TEMPERATURE = 0.7  # Wang et al. 2022, arXiv:2203.11171, section 3.1
# Flags of tasks in files, and those of them that generate text.
OF_TEXT = ("votes", "temperature", "top_k", "max_tokens")
OF_FILES = ("shots_from", "output_type", "truncate", *OF_TEXT)
# Flags of lm-evaluation-harness -> what is said about them.
LM_EVAL = {
    "tasks": "expected --task, once for each task",
    "model": "expected the model as an argument: peakgpt evaluate MODEL",
    "model_args": "expected the model as an argument: peakgpt evaluate MODEL",
    "num_fewshot": "expected --shots",
    "batch_size": "expected none: the engine makes its own batches",
    "max_batch_size": "expected none: the engine makes its own batches",
    "output_path": "expected --out",
    "log_samples": "expected none: samples are always written",
    "apply_chat_template": "expected --chat",
    "fewshot_as_multiturn": "expected none: with --chat the shots are turns",
    "include_path": "expected --include-path",
    "gen_kwargs": "expected --temperature, --top-k, --max-tokens, or the fields of a task file",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help=f"model with a tokenizer: {NAMES}")
    parser.add_argument("--task", action="append", required=True, metavar="FILE|NAME",
                        help=f"{', '.join(SUFFIXES)} file (docs/evaluate.md), or a task or group of lm-eval; may be "
                        "repeated")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FOLDER",
                        help="new folder of results.json and samples (default runs/evaluate-DATE-TIME)")  # fmt: skip
    parser.add_argument("--shots", type=integer(0), metavar="K",
                        help="examples with answers in each prompt (default 0; lm-eval: as the task says)")  # fmt: skip
    parser.add_argument("--shots-from", type=Path, metavar="FILE",
                        help="draw the shots from it (default: the task's shots, else its other examples)")  # fmt: skip
    parser.add_argument("--limit", type=integer(), metavar="N", help="ask only the first N examples of each task")
    parser.add_argument("--seed", type=integer(0, MAX_SEED),
                        help="of shots, sampling and bootstraps (default 0; lm-eval: its own seeds)")  # fmt: skip
    parser.add_argument("--chat", action="store_true", help="write prompts with the model's chat template")
    parser.add_argument("--output-type", choices=(CHOICES, TEXT),
                        help="score choices, or generate text (default: as the metrics need)")  # fmt: skip
    parser.add_argument("--votes", type=integer(), metavar="N",
                        help="sample N texts a question; the most frequent answer counts (default 1)")  # fmt: skip
    parser.add_argument("--temperature", type=number(or_equal=True),
                        help=f"of sampling, 0 is greedy (default 0; with --votes {VOTING_TEMPERATURE})")  # fmt: skip
    parser.add_argument("--top-k", type=integer(), help="sample from this many most likely tokens (default: from all)")
    parser.add_argument("--max-tokens", type=integer(), help="most new tokens (default: as the task says)")
    parser.add_argument("--truncate", action="store_true", default=None,
                        help="cut the beginning of prompts that are too long (default: refuse them)")  # fmt: skip
    parser.add_argument("--corpus", action="append", metavar="SOURCE",
                        help="find examples in training text, as `peakgpt contamination`; may be repeated")  # fmt: skip
    parser.add_argument("--field", help='JSON field or Parquet column of the corpus (default "text")')
    parser.add_argument("--include-path", type=Path, metavar="FOLDER", help="folder with more tasks of lm-eval")
    parser.add_argument("--dtype", choices=("float32", "best"), default="float32",
                        help="best: bfloat16 if the device multiplies it (default float32)")  # fmt: skip
    parser.add_argument("--kv-cache-dtype", choices=CACHE_DTYPES, help="quantize the KV cache, as in `peakgpt serve`")
    parser.add_argument("--device", help='"cpu" or "cuda" (default: "cuda" if available)')
    parser.other_name = lambda name: LM_EVAL.get(name.replace("-", "_"))


@dataclass(frozen=True)
class PlannedTask:
    """A task of a file, and how it is asked and scored."""

    path: Path
    task: Task
    examples: tuple[Example, ...]  # that are asked
    metrics: dict[str, Metric]
    shots: Shots

    @property
    def reads(self) -> set[str]:
        return {metric.reads for metric in self.metrics.values()}


def run(args: argparse.Namespace) -> int:
    names = [name for name in args.task if Path(name).suffix not in SUFFIXES]
    _refuse_ignored(args, names)
    options = _options(args)
    plans = _plans(args, options.seed)
    if not any(TEXT in plan.reads for plan in plans):
        refuse_ignored(args, OF_TEXT, f"with tasks whose choices are scored, expected --output-type {TEXT} too")
    harness = _harness() if names else None
    if args.corpus:
        _corpus(args)  # raises before the model is loaded
    device = choose_device(args.device)
    dtype = best_dtype(device) if args.dtype == "best" else torch.float32
    with _new_folder(args.out) as folder:
        overlaps = [None] * len(plans)
        if args.corpus and plans:
            texts = [[(example.name, example.text) for example in plan.examples] for plan in plans]
            overlaps = find_overlaps(texts, _corpus(args), enter_phase)
        enter_phase("loading the model")
        source = locate(args.checkpoint, MODEL_FILES)
        model = GPT.from_pretrained(source, dtype=dtype, merge_adapter=True).to(device)
        tokenizer = Tokenizer.load(source)
        evaluator = Evaluator(model, tokenizer, cache=args.kv_cache_dtype, report=enter_phase)
        results = [_evaluate(evaluator, *row, options) for row in zip(plans, overlaps, strict=True)]
        if harness:
            enter_phase("evaluating tasks of lm-eval")
            results += harness.evaluate_tasks(
                harness.PeakGPT(model, tokenizer, kv_cache_dtype=args.kv_cache_dtype), names, shots=args.shots,
                limit=args.limit, chat=args.chat, seed=args.seed, include_path=args.include_path,
                corpus=_corpus(args) if args.corpus else None,
            )  # fmt: skip
        resolved = {"seed": options.seed if plans else args.seed, "out": folder, "device": device,
                    "dtype": str(dtype).removeprefix("torch.")}  # fmt: skip
        write_results(folder, {**vars(args), **asdict(options), **resolved}, results)
    print(table(results))
    scores = {result.name: {metric.name: metric.estimate.value for metric in result.metrics} for result in results}
    print(dumps({"results": str(folder), "scores": scores}))
    return 0


def _plans(args: argparse.Namespace, seed: int) -> list[PlannedTask]:
    """Read the tasks in files; every question has its shots."""
    pool = read_task(args.shots_from).examples if args.shots_from else ()
    plans = []
    for path in (Path(name) for name in args.task if Path(name).suffix in SUFFIXES):
        task = read_task(path)
        shots = Shots(pool or task.shots or task.examples, args.shots or 0, seed)
        plans.append(PlannedTask(path, task, task.examples[: args.limit], metrics_of(task, args.output_type), shots))
        shots.check(plans[-1].examples)
    names = [plan.task.name for plan in plans]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"--task: got two tasks of the name {twice}, expected different ones")
    return plans


def _corpus(args: argparse.Namespace) -> Iterator[Document]:
    return corpus_documents(args.corpus, ReadOptions(field=args.field or "text"))


def _evaluate(
    evaluator: Evaluator, plan: PlannedTask, overlap: Overlap | None, options: AnswerOptions
) -> TaskResult:  # fmt: skip
    answers = evaluator.answer(plan.task, plan.examples, plan.shots, plan.reads, options)
    return score_task(plan.task, str(plan.path), plan.metrics, answers, shots=plan.shots.count, seed=options.seed,
                      overlap=overlap)  # fmt: skip


def _options(args: argparse.Namespace) -> AnswerOptions:
    votes = args.votes or 1
    temperature = args.temperature
    if temperature is None:
        temperature = VOTING_TEMPERATURE if votes > 1 else 0.0
    if temperature == 0:
        if votes > 1:
            raise ValueError(f"--votes is {votes} with --temperature 0, expected a higher one: greedy texts are equal")
        refuse_ignored(args, ("top_k",), "with greedy text, expected --temperature above 0 or --votes")
    return AnswerOptions(chat=args.chat, votes=votes, temperature=temperature, top_k=args.top_k,
                         max_tokens=args.max_tokens, truncate=bool(args.truncate), seed=args.seed or 0)  # fmt: skip


def _refuse_ignored(args: argparse.Namespace, names: Sequence[str]) -> None:
    """Refuse flags without effect; `names` are tasks of lm-eval."""
    if names:
        refuse_ignored(args, OF_FILES, f"with the task {names[0]} of lm-eval, expected it with task files only")
    else:
        refuse_ignored(args, ("include_path",), "without a task of lm-eval, expected both")
    if not args.shots:
        refuse_ignored(args, ("shots_from",), "without --shots, expected both")
    if args.corpus is None:
        refuse_ignored(args, ("field",), "without --corpus, expected both")


def _harness() -> Any:
    try:
        return importlib.import_module("peakgpt.harness")
    except ImportError as error:
        raise ValueError(str(error)) from None


@contextlib.contextmanager
def _new_folder(out: Path | None) -> Iterator[Path]:
    """Make a folder, by default runs/evaluate-DATE-TIME; it is removed again if nothing was written into it."""
    default = default_run_folder("evaluate")
    names = [out] if out else (default, *(default.with_name(f"{default.name}-{number}") for number in range(2, 1000)))
    for folder in names:
        made = make_folders(folder)
        if folder in made:
            break
    else:
        raise ValueError(f"--out: got the existing {folder}, expected a new folder")
    try:
        yield folder
    except BaseException:
        remove_empty_folders(made)
        raise
