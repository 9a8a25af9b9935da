"""`peakgpt dedup` and `peakgpt contamination`: files, reports, exit codes, and prepared shards as a corpus."""

import json
import random

import pytest
import torch
from tokenizers import processors

from peakgpt.cli import main
from peakgpt.engine.data.shard_writer import write_shards
from peakgpt.engine.data.tokenizer_training import train_tokenizer
from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.training.run_config import RunConfig
from peakgpt.engine.training.run_file import write_run_file

WORDS = [f"word{i}" for i in range(500)]


def texts(count=20, words=60):
    rng = random.Random(0)
    return [" ".join(rng.choices(WORDS, k=words)) for _ in range(count)]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def corpus(tmp_path):
    documents = texts()
    documents += [documents[2].upper(), f"{documents[4]} more", documents[0]]
    return write_lines(tmp_path / "web.jsonl", [{"text": text} for text in documents])


def test_dedup_writes_what_is_kept_and_what_is_removed(corpus, tmp_path, capsys):
    pytest.importorskip("datasketch")
    kept, removed = tmp_path / "kept.jsonl", tmp_path / "removed.jsonl"
    assert main(["dedup", str(corpus), "--output", str(kept), "--report", str(removed)]) == 0
    assert [row["text"] for row in read_lines(kept)] == texts()
    assert [(row["document"], row["kept"], row["exact"]) for row in read_lines(removed)] == [
        ("web.jsonl:21", "web.jsonl:3", True), ("web.jsonl:22", "web.jsonl:5", False),
        ("web.jsonl:23", "web.jsonl:1", True),
    ]  # fmt: skip
    line, row = capsys.readouterr().out.splitlines()
    assert line == "kept 20 of 23 documents; removed 2 exact and 1 near duplicates"
    assert json.loads(row) == {"documents": 23, "kept": 20, "exact": 2, "near": 1, "threshold": 0.8, "shingle": 5,
                               "num_perm": 128, "bands": 16, "rows": 8}  # fmt: skip
    again = tmp_path / "again.jsonl"
    assert main(["dedup", str(kept), "-o", str(again)]) == 0  # its output is a source
    assert [row["text"] for row in read_lines(again)] == texts()


def test_exact_duplicates_alone_need_no_other_option(corpus, capsys):
    assert main(["dedup", str(corpus), "--exact"]) == 0
    assert "removed 2 exact and 0 near duplicates" in capsys.readouterr().out
    assert main(["dedup", str(corpus), "--exact", "--threshold", "0.5"]) == 2
    assert "--threshold: got it with --exact, expected one of them" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [
    ("--output", "{}/web.jsonl"), ("--report", "{}/none/removed.jsonl"), ("--threshold", "1"), ("--num-perm", "1"),
    ("--output", "{}/same", "--report", "{}/same"), ("--field", "body"),
])  # fmt: skip
def test_bad_input_of_dedup_writes_nothing(flags, corpus, tmp_path, capsys):
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    flags = ["--output", str(tmp_path / "new.jsonl"), *(flag.format(tmp_path) for flag in flags)]
    assert main(["dedup", str(corpus), *flags]) == 2
    assert capsys.readouterr().err.startswith("peakgpt: error: ")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_contamination_is_reported_for_each_example(corpus, tmp_path, capsys):
    words = texts()[3].split()
    dirty = {"q": " ".join(words[5:15]) + "?", "a": " ".join(words[15:20])}
    rows = [dirty, {"q": " ".join(WORDS[:30])}, {"q": "short"}]
    examples, report = write_lines(tmp_path / "eval.jsonl", rows), tmp_path / "report.jsonl"
    command = ["contamination", str(corpus), "--eval", str(examples), "--report", str(report)]
    assert main(command) == 1
    assert read_lines(report) == [
        {"example": f"{examples}:1", "status": "dirty", "words": 15, "ngrams": 8, "found": 8,
         "ngram": " ".join(words[5:13]), "document": "web.jsonl:4", "documents": 1},
        {"example": f"{examples}:2", "status": "clean", "words": 30, "ngrams": 23, "found": 0, "ngram": None,
         "document": None, "documents": 0},
        {"example": f"{examples}:3", "status": "short", "words": 1, "ngrams": 0, "found": 0, "ngram": None,
         "document": None, "documents": 0},
    ]  # fmt: skip
    *_, row = capsys.readouterr().out.splitlines()
    assert json.loads(row) == {"examples": 3, "dirty": 1, "clean": 1, "short": 1, "ngram": 8, "documents": 23}
    assert main(["contamination", str(corpus), "--eval", str(examples), "--ngram", "16"]) == 0  # no such long run
    assert main(command) == 2 and "got an existing file, expected a new one" in capsys.readouterr().err


@pytest.mark.parametrize("as_run", [True, False])
def test_prepared_shards_are_a_corpus(as_run, tmp_path, capsys, monkeypatch):
    """Documents are found by the end of text; a window of 7 tokens cuts everywhere."""
    monkeypatch.setattr("peakgpt.engine.data.token_documents.WINDOW", 7)
    folder = tmp_path / "data"
    (folder / "tokens").mkdir(parents=True)
    documents = [*texts(), "naïve Straße 日本語 🎉 " * 4]
    tokenizer, shards = train_tokenizer(documents[:2], 300), folder / "tokens"
    tokenizer.library.add_special_tokens(["<s>"])
    start = [("<s>", tokenizer.library.token_to_id("<s>"))]
    tokenizer.library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=start)
    tokenizer.save(shards)
    write_shards(shards, "train", tokenizer.encode_documents(documents), tokenizer.vocab_size, text_bytes=1,
                 corpus_digest="x", end_id=tokenizer.end_id)  # fmt: skip
    example = write_lines(tmp_path / "eval.jsonl", [{"q": documents[7]}, {"q": documents[-1]}])
    report = tmp_path / "report.jsonl"
    path = folder if as_run else shards
    assert main(["contamination", str(path), "--eval", str(example), "--report", str(report)]) == 1
    assert [row["document"] for row in read_lines(report)] == [f"{shards}:8", f"{shards}:21"]
    assert '"documents": 21' in capsys.readouterr().out
    assert all(row["found"] == row["ngrams"] for row in read_lines(report))


def test_a_report_that_cannot_be_written_is_named(corpus, tmp_path, capsys):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    kept, report = tmp_path / "kept.jsonl", tmp_path / "removed.jsonl"
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        assert main(["dedup", str(corpus), "--exact", "--output", str(kept), "--report", str(report)]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "kept.jsonl: got File too large, expected a file that can be written" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [corpus]


def test_a_run_on_prepared_folders_means_their_tokens(tmp_path, capsys):
    tokenizer, documents = train_tokenizer(texts(), 300), texts()
    for name, part in {"one": documents[:10], "two": documents[10:]}.items():
        (tmp_path / name).mkdir()
        ids = list(tokenizer.encode_documents(part))
        write_shards(tmp_path / name, "train", ids, 300, text_bytes=1, corpus_digest="", end_id=tokenizer.end_id)
        tokenizer.save(tmp_path / name)
    config = RunConfig.of({"dataset": (str(tmp_path / "one"), str(tmp_path / "two"))}, torch.device("cpu"))
    (tmp_path / "run" / "tokens").mkdir(parents=True)
    write_run_file(tmp_path / "run", config, GPTConfig())
    evaluation = write_lines(tmp_path / "eval.jsonl", [{"text": documents[3]}, {"text": documents[13]}])
    assert main(["contamination", str(tmp_path / "run"), "--eval", str(evaluation)]) == 1
    assert "2 examples: 2 dirty" in capsys.readouterr().out
