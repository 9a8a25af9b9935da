"""lm-evaluation-harness on local tasks: peakgpt has the metrics of the hf model on the same checkpoint."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from peakgpt.engine.data.tokenizer_training import train_tokenizer
from peakgpt.engine.gpt import GPT
from peakgpt.engine.model.config import GPTConfig

pytest.importorskip("lm_eval", reason="lm-eval is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

TASKS = {
    "choice": "output_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: '{{options}}'\n"
    "doc_to_target: '{{label}}'\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n",
    "rolling": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{question}}'\n"
    "metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]\n",
    "generate": "output_type: generate_until\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{options[0]}}'\n"
    "generation_kwargs: {until: ['e'], max_gen_toks: 12}\nmetric_list: [{metric: exact_match}]\n",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("harness")
    torch.manual_seed(0)
    words = ["who", "what", "where", "walks", "talks", "sees", "a", "the", "man", "house", "green"]
    tokenizer = train_tokenizer([" ".join(words) * 3], 280)
    model = GPT(GPTConfig(n_layer=2, n_embd=32, n_head=2, block_size=64, vocab_size=tokenizer.vocab_size))
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder / "model", tokenizer)

    def random_words(count):
        return " ".join(words[i] for i in torch.randint(len(words), (count,)))

    # One question is longer than block_size of the model, and two questions are equal.
    rows = [{"question": random_words(60 if i == 3 else 6 + i), "label": i % 4,
             "options": [f" {random_words(2)}" for _ in range(4)]} for i in range(8)]  # fmt: skip
    rows[5]["question"] = rows[4]["question"]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in TASKS.items():
        data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/data.jsonl}}}}\ntest_split: test\n"
        (folder / f"{name}.yaml").write_text(f"task: peak_{name}\n{data}{text}")
    return folder


# Runs in its own process: the variables that keep the harness offline are read when its packages are imported.
EVALUATE = """
import json, socket, sys, threading
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
import peakgpt.harness
folder, *tasks = sys.argv[1:]
manager, scores_by_model = TaskManager(include_path=folder, include_defaults=False), {}

def evaluate(kind, tasks, **options):
    output = simple_evaluate(kind, model_args={"pretrained": folder + "/model", **options}, tasks=tasks,
                          task_manager=manager, bootstrap_iters=0, log_samples=True)
    samples = {task: [[row["doc_id"], row["resps"]] for row in rows] for task, rows in output["samples"].items()}
    scores_by_model[kind] = {"results": output["results"], "samples": samples}

evaluate("hf", tasks, device="cpu", dtype="float32", batch_size=2)
evaluate("peakgpt", tasks)
try:
    import uvicorn
    from peakgpt.serve import app, guard
except ImportError:
    pass
else:
    tokens, model = (getattr(peakgpt.harness, name) for name in ("Tokenizer", "GPT"))
    tokens, model = tokens.load(folder + "/model"), model.from_pretrained(folder + "/model")
    server = app.Server(peakgpt.harness.Engine(model, tokens), tokens, name="local")
    listening = socket.create_server(("127.0.0.1", 0))
    run = uvicorn.Server(guard.config(server.app)).run
    threading.Thread(target=run, args=([listening],), daemon=True).start()
    url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1/completions"
    evaluate("local-completions", ["peak_choice"], model="local", base_url=url, tokenizer=folder + "/model",
             tokenizer_backend="huggingface", max_length=64)
from peakgpt.engine.data.documents import Document
from peakgpt.engine.evaluation.results import as_json
question = json.loads(open(folder + "/data.jsonl").read().splitlines()[3])["question"]  # of 60 words
options = dict(include_path=folder, corpus=[Document.of("corpus", f"before {question} after")])
lm = peakgpt.harness.PeakGPT(folder + "/model")
scores_by_model["rows"] = [as_json(result) for result in peakgpt.harness.evaluate_tasks(lm, tasks, **options)]
try:
    peakgpt.harness.evaluate_tasks(lm, ["peak_choise"], **options)
except ValueError as error:
    scores_by_model["unknown"] = str(error)
json.dump(scores_by_model, open(folder + "/scores_by_model.json", "w"))
"""


def assert_same(ours, reference):
    """Compare nested values. Floats (log-probabilities) may differ by 1e-4, or by a relative 1e-5."""
    if isinstance(ours, dict):
        assert ours.keys() == reference.keys()
        ours, reference = list(ours.values()), [reference[name] for name in ours]
    if isinstance(ours, list):
        assert len(ours) == len(reference)
        for a, b in zip(ours, reference, strict=True):
            assert_same(a, b)
    else:
        assert reference == (pytest.approx(ours, abs=1e-4, rel=1e-5) if isinstance(ours, float) else ours)


@pytest.fixture(scope="module")
def scores_by_model(folder):
    """Evaluate all tasks in a subprocess; return results and samples of each model."""
    pytest.importorskip("accelerate", reason="accelerate, which the harness's own model needs, is not installed")
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    command = [sys.executable, "-c", EVALUATE, str(folder), *(f"peak_{name}" for name in TASKS)]
    completed = subprocess.run(command, env={**os.environ, **offline}, capture_output=True, text=True, timeout=300)
    assert completed.returncode == 0, completed.stderr[-3000:]
    return json.loads((folder / "scores_by_model.json").read_text())


def test_lm_eval_metrics_equal_those_of_its_hf_model(scores_by_model):
    assert len(scores_by_model["hf"]["samples"]) == len(TASKS)
    assert_same(scores_by_model["peakgpt"], scores_by_model["hf"])


def test_lm_eval_client_gets_same_scores_from_the_server(scores_by_model):
    """One question differs: the harness truncates it by one more token for its client, which asks for one new token."""
    if "local-completions" not in scores_by_model:
        pytest.skip("the packages of peakgpt[serve] are not installed")
    ours, reference = (dict(scores_by_model[name]["samples"]["peak_choice"]) for name in ("local-completions", "hf"))
    assert len(ours) == 8 and ours.pop(3) != reference.pop(3)
    assert_same(ours, reference)


def test_evaluate_has_the_scores_of_the_harness_with_intervals(scores_by_model):
    """A question with a run of words of the corpus is dirty; scores of means have the interval of single examples."""
    rows = {row["name"]: row for row in scores_by_model["rows"]}
    for task, metric in (("peak_choice", "acc"), ("peak_choice", "acc_norm"), ("peak_generate", "exact_match")):
        found, value = rows[task]["metrics"][metric], scores_by_model["hf"]["results"][task][f"{metric},none"]
        assert found["value"] == pytest.approx(value) and found["method"] == "wilson"
        assert found["low"] <= value <= found["high"] and "not_dirty" in found
    assert rows["peak_rolling"]["metrics"]["bits_per_byte"]["value"] == pytest.approx(
        scores_by_model["hf"]["results"]["peak_rolling"]["bits_per_byte,none"], rel=1e-4)  # fmt: skip
    assert rows["peak_choice"]["examples"] == 8 and rows["peak_choice"]["contamination"]["dirty"] == 1
    assert "nearest: peak_choice" in scores_by_model["unknown"]


@pytest.mark.slow
def test_command_evaluates_a_local_task_in_few_shots(folder):
    """In a process that is offline, with the output files and the table."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    words = ["evaluate", str(folder / "model"), "--task", "peak_choice", "--include-path", str(folder), "--shots", "1",
             "--limit", "4", "--out", str(folder / "out")]  # fmt: skip
    command = [sys.executable, "-m", "peakgpt", *words]
    done = subprocess.run(command, env={**os.environ, **offline}, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"^peak_choice +acc +0\.\d+.* to .* 4 +1$", done.stdout, re.MULTILINE), done.stdout
    assert len((folder / "out" / "samples_peak_choice.jsonl").read_text().splitlines()) == 4
