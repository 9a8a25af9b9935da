"""The ablation table of GPT-1 on two tasks made from the Python library of this machine.

A small GPT is pre-trained on the library's code and then adapted to labels, as in Radford et al. 2018, "Improving
Language Understanding by Generative Pre-Training", table 5 and figure 2 (left):

    module     classification: the package that a few lines of code are from
    is-next    entailment: whether some lines follow others in a file, or are from another file

The files that the tasks are evaluated on are in no training data. All variants have the same examples and batches. Each
is repeated with several seeds: of the examples, of new weights and of dropout. A figure is the mean over the seeds with
the 95 % confidence interval of Student's t. Differences are those of equal seeds.

    python examples/gpt1_ablation.py            minutes on two cores
    python examples/gpt1_ablation.py --tiny     seconds; the figures mean nothing
"""

from __future__ import annotations

import argparse
import json
import random
import sysconfig
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from scipy import stats

from peakgpt.engine.data.tokenizer import Tokenizer
from peakgpt.engine.data.tokenizer_training import train_tokenizer
from peakgpt.engine.finetuning.config import FinetuneConfig
from peakgpt.engine.finetuning.session import start
from peakgpt.engine.gpt import GPT
from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.run_session import Reporter
from peakgpt.engine.training.run_folder import RunFolder
from peakgpt.engine.training.train_config import TrainConfig
from peakgpt.engine.training.trainer import Trainer
from peakgpt.engine.training.validation import ValidationMetrics

PACKAGES = ("asyncio", "ctypes", "email", "idlelib", "importlib", "multiprocessing", "tkinter", "unittest", "xml")
HELD_OUT_SHARE = 4  # one file of so many is only evaluated on
TOKENS, BATCH = 96, 32  # of a sequence, of an update
LAYERS = 4
VARIANTS: dict[str, dict[str, Any]] = {
    "full: pre-trained, auxiliary loss": {},
    "without auxiliary loss": {"lm_loss_weight": 0.0},
    "without pre-training": {"transfer_layers": -1},
    "embeddings alone": {"transfer_layers": 0},
    "embeddings and 2 layers": {"transfer_layers": 2},
}
FULL, WITHOUT_LOSS, SCRATCH, NONE, HALF = VARIANTS


File = tuple[str, list[str]]  # name and lines
Files = dict[str, list[File]]  # by package


@dataclass(frozen=True)
class Sizes:
    """How much is computed."""

    packages: int = 9
    vocab: int = 2048
    width: int = 128
    steps: int = 1500  # of pre-training
    examples: int = 1200  # of each task to train on
    evaluated: int = 800
    epochs: float = 4.0
    seeds: int = 4


TINY = Sizes(packages=2, vocab=300, width=16, steps=2, examples=32, evaluated=8, epochs=1.0, seeds=2)


def read_files(packages: int) -> Files:
    """Return the Python files of each package, without blank lines and short files."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = {}
    for package in PACKAGES[:packages]:
        texts = [(str(path.relative_to(root)), path) for path in sorted((root / package).rglob("*.py"))]
        lines = [(name, path.read_text(encoding="utf-8", errors="replace").splitlines()) for name, path in texts]
        found[package] = [(name, kept) for name, all_lines in lines
                          if len(kept := [line for line in all_lines if line.strip()]) > 20]  # fmt: skip
    # At least two files of a package are held out, and two are not: a pair of lines may be from two files.
    return {package: files for package, files in found.items()
            if min(sum(is_held_out(name) is part for name, _ in files) for part in (False, True)) > 1}  # fmt: skip


def is_held_out(name: str) -> bool:
    return zlib.crc32(name.encode()) % HELD_OUT_SHARE == 0


def pick(files: list[File], count: int, draw: random.Random) -> tuple[int, list[str]]:
    """Return the number of a random file, and `count` lines of it from a random one on."""
    number = draw.choices(range(len(files)), [len(lines) for _, lines in files])[0]
    lines = files[number][1]
    first = draw.randrange(len(lines) - count)
    return number, lines[first : first + count]


def module_rows(files: Files, count: int, draw: random.Random) -> Iterator[dict]:
    packages = list(files)
    for index in range(count):
        package = packages[index % len(packages)]
        yield {"text": "\n".join(pick(files[package], 5, draw)[1]), "label": package}


def is_next_rows(files: Files, count: int, draw: random.Random) -> Iterator[dict]:
    packages = list(files)
    for index in range(count):
        chosen = files[packages[index // 2 % len(packages)]]
        number, lines = pick(chosen, 6, draw)
        others = [pair for other, pair in enumerate(chosen) if other != number]
        is_next = index % 2 == 0
        hypothesis = lines[3:] if is_next else pick(others, 3, draw)[1]
        yield {"premise": "\n".join(lines[:3]), "hypothesis": "\n".join(hypothesis), "label": is_next}


TASKS = {"module": ("classification", module_rows), "is-next": ("entailment", is_next_rows)}


def pretrain(files: Files, sizes: Sizes, folder: Path) -> None:
    """Train a tokenizer and a small GPT on the files that are not held out; write the checkpoint."""
    texts = ["\n".join(lines) for found in files.values() for name, lines in found if not is_held_out(name)]
    tokenizer: Tokenizer = train_tokenizer(texts, sizes.vocab)
    stream = torch.tensor([token for ids in tokenizer.encode_batch(texts) for token in (*ids, tokenizer.end_id)])
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=LAYERS, n_head=4, n_embd=sizes.width, block_size=TOKENS, dropout=0.1,
                          vocab_size=tokenizer.vocab_size))  # fmt: skip
    config = TrainConfig(batch=BATCH, tokens=TOKENS, steps=sizes.steps, lr=2e-3, weight_decay=0.01, warmup=0.1)
    trainer, draw = Trainer(model.train(), config), torch.Generator().manual_seed(0)
    for step in range(sizes.steps):
        starts = torch.randint(len(stream) - TOKENS, (BATCH, 1), generator=draw)
        windows = stream[starts + torch.arange(TOKENS + 1)]
        loss = trainer.step(windows[:, :-1].contiguous(), windows[:, 1:].contiguous())
        if step % 250 == 0 or step == sizes.steps - 1:
            print(f"pre-training: update {step + 1}/{sizes.steps}, loss {float(loss):.3f}", flush=True)
    model.save_pretrained(folder, tokenizer, weights=trainer.master_weights())


def accuracy(
    task: str, variant: dict[str, Any], data: tuple[Path, Path], folder: Path, seed: int, sizes: Sizes
) -> float:  # fmt: skip
    """Adapt the model in `folder`, and return its accuracy on the held-out files."""
    values = {"task": task, "init": str(folder / "base"), "data": (str(data[0]),), "validation_data": (str(data[1]),),
              "truncate": True, "lr": 1e-3, "warmup": 0.1, "epochs": sizes.epochs, "seed": seed, "batch": BATCH,
              "dtype": torch.float32, "validate_every": 10**6, **variant}  # fmt: skip
    run = RunFolder(Path(tempfile.mkdtemp(dir=folder)) / "run")
    session = start(FinetuneConfig.of(values), run, torch.device("cpu"), Reporter(say=lambda line: None))
    with session.folder, session.checkpoints:
        events = list(session.loop.run(validate_every=10**6))
    (found,) = [event.sets["validation"].scores["accuracy"] for event in events if isinstance(event, ValidationMetrics)]
    return found


def measure(name: str, files: Files, folder: Path, sizes: Sizes) -> dict[str, list[float]]:
    """Return the accuracies of each variant, one for each seed."""
    task, make_rows = TASKS[name]
    parts = [{p: [f for f in found if is_held_out(f[0]) is held_out] for p, found in files.items()}
             for held_out in (False, True)]  # fmt: skip
    found: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for seed in range(sizes.seeds):
        draw, paths = random.Random(seed), (folder / f"{name}-{seed}.jsonl", folder / f"{name}-{seed}-held-out.jsonl")
        for path, part, count in zip(paths, parts, (sizes.examples, sizes.evaluated), strict=True):
            path.write_text("".join(f"{json.dumps(row)}\n" for row in make_rows(part, count, draw)), encoding="utf-8")
        for variant, settings in VARIANTS.items():
            found[variant].append(accuracy(task, settings, paths, folder, seed, sizes))
        shown = ", ".join(f"{100 * values[-1]:.1f}" for values in found.values())
        print(f"{name}: seed {seed + 1}/{sizes.seeds}: accuracies {shown} %", flush=True)
    return found


def interval(values: list[float]) -> tuple[float, float]:
    """Return the mean of values, and half the width of its 95 % interval."""
    return mean(values), stats.t.ppf(0.975, len(values) - 1) * stdev(values) / len(values) ** 0.5


def table(results: dict[str, dict[str, list[float]]]) -> str:
    """Return the table, and the differences that the paper discusses."""
    cell = lambda values: "{:5.1f} ± {:4.1f}".format(*(100 * figure for figure in interval(values)))  # noqa: E731
    lines = [f"{'accuracy, %':36}" + "".join(f"{name:>16}" for name in results)]
    lines += [f"{variant:36}" + "".join(f"{cell(found[variant]):>16}" for found in results.values())
              for variant in VARIANTS]  # fmt: skip
    lines += ["", f"{'difference of equal seeds':36}" + "".join(f"{name:>16}" for name in results)]
    pairs = {"pre-training": (FULL, SCRATCH), "auxiliary loss": (FULL, WITHOUT_LOSS), "embeddings": (NONE, SCRATCH),
             "2 layers more than embeddings": (HALF, NONE), "all layers more than 2": (FULL, HALF)}  # fmt: skip
    for label, (more, less) in pairs.items():
        differences = [[a - b for a, b in zip(found[more], found[less], strict=True)] for found in results.values()]
        lines.append(f"{label:36}" + "".join(f"{cell(values):>16}" for values in differences))
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--tiny", action="store_true", help="sizes of a test")
    sizes = TINY if parser.parse_args(arguments).tiny else Sizes()
    files = read_files(sizes.packages)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pretrain(files, sizes, folder / "base")
        results = {task: measure(task, files, folder, sizes) for task in TASKS}
    print(f"\n{len(files)} packages, {sizes.examples} examples to train on, {sizes.evaluated} evaluated, "
          f"{sizes.seeds} seeds\n\n{table(results)}")  # fmt: skip


if __name__ == "__main__":
    main()
