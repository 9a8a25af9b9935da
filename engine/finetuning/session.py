"""One run of fine-tuning: its config becomes encoded examples, a model and a training loop in a run folder.

    tokens/train.safetensors        the rows of training batches (examples.py)
    tokens/validation.safetensors   those of validation, and held_out_NAME.safetensors of further sets
    tokens/tokenizer.json ...       the tokenizer with the tokens of the task
    tokens/task.json                what the task has learned of the training data, such as labels

`start` builds a new run, `resume` one that was saved: from its folder alone, so that data and checkpoint may be gone.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from peakgpt.engine.checkpoint.adapters.files import AdapterFiles
from peakgpt.engine.data.run_layout import BEST, CHECKPOINTS
from peakgpt.engine.data.tokenizer import Tokenizer
from peakgpt.engine.finetuning.config import VALIDATION_SHARE, FinetuneConfig
from peakgpt.engine.finetuning.example_batches import ExampleBatches
from peakgpt.engine.finetuning.example_validation import ExampleValidator
from peakgpt.engine.finetuning.examples import Examples, write_examples
from peakgpt.engine.finetuning.initial_model import adapter_sizes, initial_model, resumed_model
from peakgpt.engine.finetuning.rows import Row, read_rows
from peakgpt.engine.finetuning.task import Task
from peakgpt.engine.finetuning.tasks.catalogue import TASKS
from peakgpt.engine.gpt import GPT
from peakgpt.engine.model.lora import has_adapters
from peakgpt.engine.run_session import BuiltRun, Reporter, RunSession, begin, reopen
from peakgpt.engine.training.figures import bytes_text
from peakgpt.engine.training.loop import TrainingLoop
from peakgpt.engine.training.memory_estimate import refuse_what_cannot_fit
from peakgpt.engine.training.metric_sinks import require_packages
from peakgpt.engine.training.run_folder import RunFolder
from peakgpt.engine.training.schedule import DEFAULT_STEPS
from peakgpt.engine.training.trainer import Trainer
from peakgpt.engine.training.validation_config import HELD_OUT
from peakgpt.kernels.strict_json import dumps

TRAIN, FURTHER, STATE = "train", "held_out_", "task.json"


@dataclass(frozen=True)
class ExampleSets:
    """The encoded examples of a run: rows of training batches, and held-out sets by name."""

    train: Examples
    held_out: Mapping[str, Examples]

    @classmethod
    def open(cls, config: FinetuneConfig, tokens: Path) -> ExampleSets:
        """Open the sets in a run's token folder.

        Raises:
            ValueError: a file is missing or damaged.
        """
        names = {HELD_OUT: HELD_OUT, **{name: FURTHER + name for name in config.validation.named_sets()}}
        held_out = {name: Examples.open(_file(tokens, stem)) for name, stem in names.items()}
        return cls(Examples.open(_file(tokens, TRAIN)), held_out)


def check_resources(config: FinetuneConfig, device: torch.device, reporter: Reporter) -> None:
    """Check what a run needs, before its folder is made and its data are read.

    Raises:
        ValueError: a package is missing, or the run does not fit into the memory.
    """
    require_packages(config.metrics)
    predicted, available = refuse_what_cannot_fit(config.model_config(), config.train, device, adapter_sizes(config))
    reporter.say(f"memory: about {predicted}; {bytes_text(available)} available")


def start(config: FinetuneConfig, folder: RunFolder, device: torch.device, reporter: Reporter) -> RunSession:
    """Build a new run; see `begin`.

    Raises:
        ValueError: bad data, or a checkpoint that the task cannot adapt.
    """

    def build() -> BuiltRun:
        reporter.enter_phase("encoding the examples")
        task = TASKS[config.task.task](config, Tokenizer.load(config.task.init))
        sets = prepare_examples(task, folder.tokens, reporter)
        reporter.enter_phase("building the model")
        return _built(task, sets, initial_model(config), device)

    return begin(build, folder, device, reporter)


def resume(path: Path, changes: Mapping[str, Any], device: torch.device, reporter: Reporter) -> RunSession:
    """Open a run of `peakgpt finetune` again; see `reopen`."""

    def build(config: FinetuneConfig, folder: RunFolder) -> BuiltRun:
        sets = ExampleSets.open(config, folder.tokens)
        state = json.loads((folder.tokens / STATE).read_text(encoding="utf-8"))
        task = TASKS[config.task.task](config, Tokenizer.load(folder.tokens), state)
        return _built(task, sets, resumed_model(config, path), device)

    return reopen(path, FinetuneConfig, changes, build, device, reporter)


def prepare_examples(task: Task, tokens: Path, reporter: Reporter) -> ExampleSets:
    """Read and encode all examples into the token folder of a new run.

    Raises:
        ValueError: a file or an example is bad, or there are too few.
    """
    config = task.config
    train, held_out = split_rows(config, read_rows(config.data.data))
    task.learn(train)
    examples = task.encode(train)
    rows = task.arrange(examples)
    reporter.say(f"data: {task.describe(examples, rows)}; {len(held_out):,} examples for validation")
    write_examples(_file(tokens, TRAIN), rows)
    further = {FURTHER + name: read_rows([path]) for name, path in config.validation.named_sets().items()}
    for stem, found in {HELD_OUT: held_out, **further}.items():
        write_examples(_file(tokens, stem), task.arrange(task.encode(found)))
    task.tokenizer.save(tokens)
    (tokens / STATE).write_text(dumps(task.state_dict(), indent=1), encoding="utf-8")
    return ExampleSets.open(config, tokens)


def split_rows(config: FinetuneConfig, rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Return the rows to train on and those for validation: other files, or a random share that the seed chooses.

    Raises:
        ValueError: there is no row for one of the two.
    """
    if config.data.validation_data is not None:
        train, held_out = list(rows), read_rows(config.data.validation_data)
    else:
        share = VALIDATION_SHARE if config.data.validation_share is None else config.data.validation_share
        order = np.argsort(np.random.Philox(key=config.train.seed).random_raw(len(rows)), kind="stable")
        chosen = set(order[: max(1, round(share * len(rows)))].tolist())
        train, held_out = ([row for i, row in enumerate(rows) if (i in chosen) is wanted] for wanted in (False, True))
    if not train or not held_out:
        raise ValueError(f"{config.data.data[0]}: got {len(rows)} examples, expected at least 2: one for validation, "
                         "which --validation-data may bring instead")  # fmt: skip
    return train, held_out


def build_loop(task: Task, sets: ExampleSets, gpt: GPT, device: torch.device) -> TrainingLoop:
    """Return the training loop over the run's examples, with its held-out sets."""
    config = task.config
    model = task.model(gpt).to(device)
    batches = ExampleBatches(sets.train, task, config.train.batch, config.train.seed)
    steps = planned_steps(config, sets)
    trainer = Trainer(model, config.train, steps=steps, fixed_shapes=task.fixed_shapes)
    batch = config.train.micro_batch or config.train.batch
    validator = ExampleValidator(model, sets.held_out, task, config.validation, batch=batch)
    return TrainingLoop(trainer, batches, validator)


def planned_steps(config: FinetuneConfig, sets: ExampleSets) -> int:
    """Return the number of updates: those of the config, or all that begin within its epochs."""
    train = config.train
    if train.epochs is None:
        return train.steps or DEFAULT_STEPS
    return max(1, math.ceil(train.epochs * len(sets.train) / train.batch))


def model_size(loop: TrainingLoop) -> str:
    """Return the number of parameters, and of those that train."""
    parameters = list(loop.trainer.model.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    return f"model: {sum(parameter.numel() for parameter in parameters):,} parameters, {trained:,} of them are trained"


def _built(task: Task, sets: ExampleSets, gpt: GPT, device: torch.device) -> BuiltRun:
    config, loop = task.config, build_loop(task, sets, gpt, device)
    model = loop.trainer.model
    files = AdapterFiles(model, task.tokenizer) if has_adapters(model) else task.files(model)

    def finish(path: Path) -> Sequence[str]:
        best = path / CHECKPOINTS / BEST
        if best.exists() and (state := files.read(best)) is not None:
            model.load_state_dict(state, strict=False)  # without the tensors that never change
        return task.finish(path, model, sets.held_out[HELD_OUT])

    return BuiltRun(config, loop, files, config.model_config(), model_size(loop),
                    functools.partial(planned_steps, sets=sets), finish)  # fmt: skip


def _file(tokens: Path, stem: str) -> Path:
    return tokens / f"{stem}.safetensors"
