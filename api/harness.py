"""lm-evaluation-harness of EleutherAI: the model "peakgpt", and its tasks for `peakgpt evaluate`.

Importing this module registers the model, for programs that call the harness themselves:

    import lm_eval, peakgpt.harness
    lm_eval.simple_evaluate("peakgpt", model_args={"pretrained": FOLDER}, tasks=["hellaswag"])
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import torch

try:
    from lm_eval import simple_evaluate, utils
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise ImportError(
        f"peakgpt.harness: got {error}, expected lm-evaluation-harness: pip install 'lm-eval[api]'"
    ) from None

from peakgpt.engine.checkpoint.model_folder import MODEL_FILES
from peakgpt.engine.data.documents import Document
from peakgpt.engine.data.model_source import locate
from peakgpt.engine.data.tokenizer import Tokenizer
from peakgpt.engine.evaluation.corpus_overlap import Overlap, find_overlaps
from peakgpt.engine.evaluation.example_file import all_texts
from peakgpt.engine.evaluation.intervals import RESAMPLES, Estimate, mean_estimate, normal_estimate
from peakgpt.engine.evaluation.results import MetricResult, TaskResult
from peakgpt.engine.evaluation.score import Scorer
from peakgpt.engine.gpt import GPT
from peakgpt.engine.inference.engine import Engine, SamplingParams
from peakgpt.heartbeat import enter_phase
from peakgpt.kernels.hardware.device import choose_device

MAX_GEN_TOKS, DEFAULT_DEVICE = 256, "cuda:0"  # defaults of the harness
SEEDS = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")


@register_model("peakgpt")
class PeakGPT(TemplateLM):
    """A checkpoint with its tokenizer.

    Args:
        pretrained: a model, or its name as in GPT.from_pretrained.
        tokenizer: of a model; None: of the same checkpoint.
        dtype: dtype of the weights of a named model.
        max_length: maximum number of tokens. Longer inputs lose their beginning, as in the hf model.
        batch_size, max_batch_size: ignored, because the engine makes its own batches. The harness passes them.
        device: of a named model: "cpu", "cuda", "cuda:N" or "auto". Where torch sees no CUDA device, "cuda:0" means the
            CPU as in the hf model, because the harness passes it by default.
        kv_cache_dtype: None or "int8", as for Engine.
    """

    def __init__(self, pretrained: str | GPT, tokenizer: Tokenizer | None = None, dtype: str = "float32",
                 max_length: int | None = None, batch_size=None, max_batch_size=None, device=None,
                 kv_cache_dtype: str | None = None):  # fmt: skip
        super().__init__()
        if isinstance(pretrained, GPT):
            self.model, self.tokens, self.name = pretrained, tokenizer, type(pretrained).__name__
        else:
            if device == DEFAULT_DEVICE and not torch.cuda.is_available():
                device = "cpu"
            source, self.name = locate(pretrained, MODEL_FILES), str(pretrained)
            model = GPT.from_pretrained(source, dtype=getattr(torch, dtype), merge_adapter=True)
            self.model, self.tokens = model.to(choose_device(device)), tokenizer or Tokenizer.load(source)
        self.max_length = min(max_length or self.model.config.block_size, self.model.config.block_size)
        self.scorer, self._engine, self._cache = Scorer(self.model, cache=kv_cache_dtype), None, kv_cache_dtype

    @property
    def eot_token_id(self) -> int | None:
        return self.tokens.end_id

    @property
    def prefix_token_id(self) -> int:
        return self.tokens.context_ids[0]

    @property
    def tokenizer_name(self) -> str:
        return self.name.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the source of a template by name; True means the default."""
        if chat_template is False:
            return None
        return self.tokens.chat.select(None if chat_template is True else chat_template)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokens.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )  # fmt: skip

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        if add_special_tokens is None:  # as in the hf model, a text that begins with BOS gets no second one
            start = self.tokens.decode(self.tokens.start_ids and [self.prefix_token_id])
            add_special_tokens = not start or not string.startswith(start)
        return self.tokens.encode(string, add_special_tokens=add_special_tokens)

    def _loglikelihood_tokens(self, requests: list[tuple], **kwargs) -> list[tuple[float, bool]]:
        inputs = [(context + continuation)[-(self.max_length + 1) :] for _, context, continuation in requests]
        counts = [len(continuation) for _, _, continuation in requests]
        scores = self.scorer.score([(ids[:-n], ids[-n:]) for ids, n in zip(inputs, counts, strict=True)])
        answers = [(score.total, all(score.greedy)) for score in scores]
        for (strings, _, _), answer in zip(requests, answers, strict=True):
            if strings is not None:
                self.cache_hook.add_partial("loglikelihood", strings, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        totals = []
        for (string,) in (request.args for request in requests):
            windows = utils.get_rolling_token_windows(self.tok_encode(string), self.prefix_token_id, self.max_length, 1)
            pairs = [(None, *utils.make_disjoint_window(window)) for window in windows]
            totals.append(sum(total for total, _ in self._loglikelihood_tokens(pairs)))
            self.cache_hook.add_partial("loglikelihood_rolling", (string,), totals[-1])
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        self._engine = self._engine or Engine(self.model, self.tokens, cache=self._cache)
        submitted, pieces = [], {}
        for context, options in (request.args for request in requests):
            ids, params, until = self._generation(context, options)
            submitted.append((self._engine.submit(ids, params), until))
        for output in self._engine.outputs():
            if output.error:
                raise output.error
            pieces.setdefault(output.request_id, []).append(output.text)
        texts = [
            postprocess_generated_text("".join(pieces.get(number, ())), until, None) for number, until in submitted
        ]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _generation(self, context: str, options: dict) -> tuple[list[int], SamplingParams, list[str]]:
        remaining = normalize_gen_kwargs(options, MAX_GEN_TOKS)
        until = handle_stop_sequences(remaining.pop("until", None), eos=self.tokens.end_of_text)
        count, sampled = remaining.pop("max_gen_toks"), remaining.pop("do_sample", False)
        temperature = remaining.pop("temperature", 1.0) if sampled else 0.0
        remaining.pop("temperature", None)
        names = ("top_k", "top_p", "min_p", "repetition_penalty")
        sampling = {name: remaining.pop(name) for name in names if name in remaining}
        if remaining:
            raise ValueError(f"peakgpt: got generation options {sorted(remaining)}, expected only known ones")
        if count >= self.max_length:
            raise ValueError(f"peakgpt: max_gen_toks is {count}, expected less than max_length {self.max_length}")
        ids = (self.tok_encode(context) or self.tokens.context_ids)[-(self.max_length - count) :]
        stop = tuple(text for text in until if text)
        params = SamplingParams(max_tokens=count, temperature=temperature, stop=stop, **sampling)
        return ids, params, until


# ---- the tasks of the harness


def evaluate_tasks(
    lm: PeakGPT, names: Sequence[str], *, shots: int | None = None, limit: int | None = None, chat: bool = False,
    seed: int | None = None, include_path: Path | None = None, corpus: Iterable[Document] | None = None,
) -> list[TaskResult]:  # fmt: skip
    """Evaluate tasks and groups of the harness.

    Args:
        names: of tasks or groups, or patterns such as "mmlu_*".
        shots: None: as each task says.
        limit: most examples of a task.
        chat: write prompts with the chat template, shots as turns.
        seed: of the drawing of shots and of all else; None: the harness's own seeds, as in published scores.
        include_path: folder with more tasks.
        corpus: to look for the examples in.
    Returns:
        A result of each task and group, with the intervals of intervals.py where values of single examples exist, else
        with the harness's standard error.
    Raises:
        ValueError: there is no such task.
    """
    manager = _task_manager(names, include_path)
    found = {name: manager.match_tasks([name]) for name in names}
    if missing := next((name for name in names if not found[name]), None):
        nearest = difflib.get_close_matches(missing, manager.all_tasks, n=1)
        raise ValueError(f"task {missing}: got no task of lm-eval, expected one of its names, or a .json or .jsonl file"
                         f"{f'; nearest: {nearest[0]}' if nearest else ''}")  # fmt: skip
    output = simple_evaluate(
        lm, tasks=list(dict.fromkeys(task for tasks in found.values() for task in tasks)), num_fewshot=shots,
        limit=limit, apply_chat_template=chat, fewshot_as_multiturn=chat, task_manager=manager,
        bootstrap_iters=RESAMPLES, **({} if seed is None else dict.fromkeys(SEEDS, seed)),
    )  # fmt: skip
    overlaps = {} if corpus is None else _overlaps(output["samples"], corpus)
    return [_task_result(name, output, seed or 0, overlaps.get(name)) for name in output["results"]]


def _task_manager(names: Sequence[str], include_path: Path | None) -> TaskManager:
    """Return the tasks of a folder if it has all names, else also the harness's own, whose index takes seconds."""
    if include_path is None:
        return TaskManager()
    own = TaskManager(include_path=str(include_path), include_defaults=False)
    return own if all(map(own.match_tasks, ([name] for name in names))) else TaskManager(include_path=str(include_path))


def _overlaps(samples: Mapping[str, Sequence[Mapping[str, Any]]], corpus: Iterable[Document]) -> dict[str, Overlap]:
    """Compare all texts of the examples with a corpus; the statuses are in the order of the samples."""
    texts = [[(f"{name}:{row['doc_id']}", all_texts(row["doc"])) for row in rows] for name, rows in samples.items()]
    return dict(zip(samples, find_overlaps(texts, corpus, enter_phase), strict=True))


def _task_result(name: str, output: Mapping[str, Any], seed: int, overlap: Overlap | None) -> TaskResult:
    scores, samples = output["results"][name], output["samples"].get(name, [])
    metrics = []
    for key, value in scores.items():
        metric, comma, kind = key.partition(",")  # "acc,none": the metric, and the filter of the answers
        if not comma or metric.endswith("_stderr") or not isinstance(value, Real):
            continue
        of_filter = [(i, row) for i, row in enumerate(samples) if row.get("filter", "none") == kind]
        rows = [(i, row[metric]) for i, row in of_filter if metric in row]
        estimate = _mean(float(value), [item for _, item in rows], seed)
        clean = [item for i, item in rows if overlap and overlap.statuses[i] != "dirty"]
        error = scores.get(f"{metric}_stderr,{kind}")
        metrics.append(MetricResult(
            name=metric if kind == "none" else f"{metric} ({kind})",
            estimate=estimate or normal_estimate(float(value), float(error) if isinstance(error, Real) else None),
            clean=mean_estimate([float(item) for item in clean], seed) if estimate and clean else None,
        ))  # fmt: skip
    samples = [json.loads(json.dumps(row, default=utils.handle_non_serializable)) for row in samples]
    count = output["n-samples"][name]["effective"] if name in output["n-samples"] else scores.get("sample_len", 0)
    return TaskResult(name=name, source="lm-eval", count=count, shots=output["n-shot"].get(name, 0),
                      metrics=tuple(metrics), samples=samples, overlap=overlap)  # fmt: skip


def _mean(score: float, values: Sequence[Any], seed: int) -> Estimate | None:
    """Return the interval of a score that is the mean of the values of its examples; None if it is not."""
    if not values or not all(isinstance(value, Real) for value in values):
        return None
    found = mean_estimate([float(value) for value in values], seed)
    return found if math.isclose(found.value, score, abs_tol=1e-9) else None
