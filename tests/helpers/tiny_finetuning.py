"""A tiny GPT with a tokenizer to fine-tune, rows of each task, and configs for them."""

import json

import torch

from peakgpt.engine.data.tokenizer_training import train_tokenizer
from peakgpt.engine.finetuning.config import FinetuneConfig
from peakgpt.engine.gpt import GPT
from peakgpt.engine.model.config import GPTConfig

NOUNS, GOOD, BAD = ("film", "song", "book"), ("good", "fine", "great"), ("bad", "poor", "sad")


def sentence(i, good):
    return f"the {NOUNS[i % 3]} was {(GOOD if good else BAD)[i // 3 % 3]}"


def rows_of(task, count=24):
    """Rows whose labels depend on their texts."""
    kinds = [(i, i * 7 % 5 < 2, i * 3 % 4 < 2) for i in range(count)]
    makers = {
        "classification": lambda i, a, b: {"text": sentence(i, a), "label": "good" if a else "bad"},
        "entailment": lambda i, a, b: {
            "premise": sentence(i, a), "hypothesis": sentence(i + 1, b), "label": int(a == b),
        },
        "similarity": lambda i, a, b: {
            "sentence1": sentence(i, a), "sentence2": sentence(i + 1, b), "label": 4.5 * (a == b),
        },
        "multiple-choice": lambda i, a, b: {
            "context": sentence(i, a), "choices": [sentence(j, a == (j == i % 2)) for j in range(2 + i % 2)],
            "label": i % 2,
        },
        "token-classification": lambda i, a, b: {
            "tokens": sentence(i, a).split(), "label": ["D", "N", "V", "good" if a else "bad"],
        },
    }  # fmt: skip
    return [makers[task](*kind) for kind in kinds]


def write_rows(path, rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def write_base(folder, **changes):
    """Write a checkpoint with random weights; return its tokenizer."""
    texts = [sentence(i, good) for i in range(9) for good in (True, False)]
    tokenizer = train_tokenizer(texts, 300)
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 48, "dropout": 0.1, **changes}
    GPT(GPTConfig(vocab_size=tokenizer.vocab_size, **sizes)).save_pretrained(folder, tokenizer)
    return tokenizer


def make_config(base, task, data="rows.jsonl", **settings):
    given = {"task": task, "init": str(base), "data": (str(data),), "dtype": torch.float32}
    return FinetuneConfig.of({**given, **settings})
