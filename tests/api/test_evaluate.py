"""peakgpt evaluate: table, files and errors; models in every form; contamination beside the scores.

Mutations that these tests detect: a clean score over all examples; results of an evaluation written over others.
"""

import json
import sys

import pytest
import torch

from peakgpt.cli import main
from peakgpt.engine.data.tokenizer_training import train_tokenizer
from peakgpt.engine.gpt import GPT
from peakgpt.engine.model.config import GPTConfig

LONG = "the quick brown fox jumps over the lazy dog near the old river bank"
EXAMPLES = [{"input": f"{LONG} number {i}" if i < 3 else f"what comes after {i} in a long row of small numbers",
             "target_scores": {"one": int(i % 2 == 0), "two": int(i % 2)}} for i in range(6)]  # fmt: skip
SETTINGS = {"metrics": ["acc", "exact_match", "bleurt"], "preferred_score": "acc", "human_baseline": 0.95}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    tokenizer = train_tokenizer([LONG, "what comes after one two in a row"], 300)
    path = tmp_path_factory.mktemp("evaluate") / "model"
    sizes = {"n_layer": 1, "n_embd": 64, "n_head": 2, "block_size": 512, "vocab_size": tokenizer.vocab_size}
    GPT(GPTConfig(**sizes)).save_pretrained(path, tokenizer)
    return path


@pytest.fixture
def run(checkpoint, tmp_path, monkeypatch, capsys):
    """Return a function that runs the command in a new folder; it returns its exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    rows = [{"name": "numbers", **SETTINGS}, *EXAMPLES]
    (tmp_path / "numbers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "corpus.txt").write_text(f"Before. {LONG} number 1. After")

    def call(*words, model=checkpoint):
        code = main(["evaluate", str(model), *words])
        return code, *capsys.readouterr()

    return call


def results(folder):
    content = json.loads((folder / "results.json").read_text())
    samples = {task["name"]: [json.loads(line) for line in (folder / task["samples"]).read_text().splitlines()]
               for task in content["tasks"]}  # fmt: skip
    return content, samples


def test_table_and_files(run, tmp_path):
    code, out, err = run("--task", "numbers.jsonl", "--shots", "2", "--max-tokens", "3", "--out", "new/out")
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0].split("  ")[0] == "task" and lines[0].endswith("examples  shots  chance  human")
    assert lines[1].startswith("numbers  acc") and lines[1].endswith("0.5     0.95")
    assert lines[3] == "numbers: not computed: bleurt"
    content, samples = results(tmp_path / "new" / "out")
    task, settings = content["tasks"][0], content["settings"]
    assert json.loads(lines[-1]) == {
        "results": "new/out", "scores": {"numbers": {name: found["value"] for name, found in task["metrics"].items()}}
    }  # fmt: skip
    assert (task["examples"], task["shots"], settings["shots"], settings["votes"]) == (6, 2, 2, 1)
    rows = samples["numbers"]
    assert [row["example"] for row in rows] == [f"numbers.jsonl:{i}" for i in range(2, 8)]
    assert all(row["prompt"].count("\nA: ") == 3 and row["choice"] in row["logprobs"] for row in rows)
    assert sum(row["acc"] for row in rows) / 6 == pytest.approx(task["metrics"]["acc"]["value"])
    assert task["metrics"]["acc"]["human_baseline"] == 0.95 and task["metrics"]["acc"]["method"] == "wilson"


def test_examples_of_the_corpus_are_dirty_and_left_out_of_the_clean_score(run, tmp_path):
    """Three examples share a run of 13 words with the corpus."""
    code, out, err = run("--task", "numbers.jsonl", "--output-type", "multiple_choice", "--corpus", "corpus.txt",
                         "--out", "out")  # fmt: skip
    assert code == 0, err
    content, samples = results(tmp_path / "out")
    task, rows = content["tasks"][0], samples["numbers"]
    assert task["contamination"] == {"dirty": 3, "clean": 3, "short": 0, "ngram": task["contamination"]["ngram"]}
    assert [row["contamination"] for row in rows] == ["dirty"] * 3 + ["clean"] * 3
    clean = [row["acc"] for row in rows[3:]]
    assert task["metrics"]["acc"]["not_dirty"]["value"] == pytest.approx(sum(clean) / 3)
    assert "3 of 6" in out and list(task["metrics"]) == ["acc"]


def test_short_examples_are_not_compared(run, tmp_path):
    (tmp_path / "short.jsonl").write_text('{"input": "1 + 1", "target": "2"}\n')
    assert run("--task", "short.jsonl", "--max-tokens", "1", "--corpus", "corpus.txt", "--out", "out")[0] == 0
    assert results(tmp_path / "out")[0]["tasks"][0]["contamination"] == {"dirty": 0, "clean": 0, "short": 1, "ngram": 8}


def test_several_tasks_and_votes_with_shots_from_a_file(run, tmp_path):
    (tmp_path / "free.json").write_text(json.dumps({"examples": [{"input": "one", "target": "two"}] * 2}))
    words = ("--task", "numbers.jsonl", "--task", "free.json", "--shots", "1", "--shots-from", "free.json", "--votes",
             "3", "--max-tokens", "2", "--seed", "5", "--limit", "2")  # fmt: skip
    code, _, err = run(*words)
    assert code == 2 and err.count("\n") == 1 and "free.json examples[0]: got 0 examples of other questions" in err
    (tmp_path / "shots.jsonl").write_text('{"input": "a", "target": "the fox"}\n')
    words = tuple("shots.jsonl" if word == "free.json" and i == 7 else word for i, word in enumerate(words))
    assert run(*words)[0] == run(*words)[0] == 0
    first, second = sorted((tmp_path / "runs").iterdir())  # also if both began in one second
    (content, samples), (_, again) = results(first), results(second)
    assert samples == again and content["settings"]["temperature"] == 0.7
    assert [len(row["outputs"]) for name in ("numbers", "free") for row in samples[name]] == [3] * 4
    assert all("\nA: the fox\n" in row["prompt"] for row in samples["free"])


def test_quantized_models_and_gguf_files_answer(run, checkpoint, tmp_path):
    pytest.importorskip("gguf", reason="the package of peakgpt[gguf] is not installed")
    assert main(["quantize", str(checkpoint), str(tmp_path / "q8"), "--bits", "8"]) == 0
    assert main(["export", str(checkpoint), str(tmp_path / "model.gguf"), "--format", "gguf"]) == 0
    scores = []
    for i, model in enumerate((checkpoint, tmp_path / "q8", tmp_path / "model.gguf")):
        code, _, err = run("--task", "numbers.jsonl", "--max-tokens", "2", "--out", f"out-{i}", model=model)
        assert code == 0, err
        scores.append([row["logprobs"]["one"] for row in results(tmp_path / f"out-{i}")[1]["numbers"]])
    assert scores[0] == pytest.approx(scores[1], rel=0.02) and scores[0] == pytest.approx(scores[2], rel=0.02)
    assert scores[0] != scores[1]


@pytest.mark.parametrize(("words", "message"), [
    (["--task", "numbers.jsonl", "--shots", "6"], "numbers.jsonl:2: got 5 examples of other"),
    (["--task", "numbers.jsonl", "--votes", "2", "--temperature", "0"], "--votes is 2 with --temperature 0"),
    (["--task", "numbers.jsonl", "--task", "numbers.jsonl"], "--task: got two tasks of the name numbers"),
    (["--task", "numbers.jsonl", "--out", "corpus.txt"], "corpus.txt"),
    (["--task", "numbers.jsonl", "--corpus", "none"], "none"),
    (["--task", "numbers.jsonl", "--chat"], "chat template: got a tokenizer without one"),
    (["--task", "numbers.jsonl", "--max-tokens", "600"], "tokens and 600 new tokens, expected at most 512 in all"),
    (["--task", "free.jsonl", "--output-type", "multiple_choice"], "free.jsonl:1: got no target_scores"),
    (["--task", "numbers.jsonl", "--num_fewshot", "2"], "unrecognized arguments: --num_fewshot, expected --shots"),
    (["--task", "numbers.jsonl", "--output_path", "x"], "unrecognized arguments: --output_path, expected --out"),
    (["--tasks", "numbers.jsonl"], "required: --task"),
])  # fmt: skip
def test_bad_input_is_one_sentence_and_leaves_no_folder(run, words, message, tmp_path):
    (tmp_path / "free.jsonl").write_text('{"input": "one", "target": "two"}\n')
    before = sorted(tmp_path.rglob("*"))
    code, _, err = run(*words)
    assert code == 2 and err.startswith("peakgpt: error: ") and err.count("\n") == 1 and message in err, err
    assert sorted(tmp_path.rglob("*")) == before


def test_an_existing_folder_is_kept(run, tmp_path):
    (tmp_path / "out").mkdir()
    code, _, err = run("--task", "numbers.jsonl", "--out", "out")
    assert code == 2 and "--out: got the existing out, expected a new folder" in err


@pytest.mark.parametrize(("package", "task"), [("scipy", "numbers.jsonl"), ("sacrebleu", "bleu"), ("lm_eval", "x")])
def test_missing_packages_are_named(run, package, task, tmp_path, monkeypatch):
    (tmp_path / "bleu.jsonl").write_text('{"metrics": ["bleu"]}\n{"input": "one", "target": "two"}\n')
    for name in [name for name in sys.modules if name.split(".")[0] == package or name == "peakgpt.harness"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    code, _, err = run("--task", f"{task}.jsonl" if task == "bleu" else task)
    named = {"scipy": "scipy: got no such", "sacrebleu": "sacrebleu: got no", "lm_eval": "pip install 'lm-eval[api]'"}
    assert code == 2 and named[package] in err and err.count("\n") == 1, err
