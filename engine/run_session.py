"""One training run: its config becomes a tokenizer, token shards, a model and a training loop in a run folder.

`start` builds a new run, `resume` one that was saved. Each step is a function of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from peakgpt.engine.checkpoint.folder import TRAINING_STATE
from peakgpt.engine.checkpoint.model_folder import read_source_files
from peakgpt.engine.data.dataset import TrainingData, open_text, prepare_text
from peakgpt.engine.data.run_layout import STATE
from peakgpt.engine.data.tokenizer import Tokenizer
from peakgpt.engine.gpt import GPT
from peakgpt.engine.training.loop import TrainingLoop
from peakgpt.engine.training.run_config import RunConfig
from peakgpt.engine.training.run_file import listing, read_run_file, write_run_file
from peakgpt.engine.training.run_folder import RunFolder
from peakgpt.engine.training.schedule import learning_rate
from peakgpt.engine.training.train_config import TrainConfig
from peakgpt.engine.training.trainer import Trainer


@dataclass(frozen=True)
class Reporter:
    """What a run tells while it is built.

    Args:
        say: prints a line.
        enter_phase: names the work that begins now.
    """

    say: Callable[[str], None] = print
    enter_phase: Callable[[str], None] = lambda phase: None


@dataclass(frozen=True)
class RunSession:
    """A run that is ready to train. Close its folder at the end."""

    config: RunConfig
    folder: RunFolder
    tokenizer: Tokenizer | None
    loop: TrainingLoop


def start(config: RunConfig, folder: RunFolder, device: torch.device, reporter: Reporter) -> RunSession:
    """Build a new run. If that fails, nothing is left in the folder.

    Raises:
        ValueError: bad data, or a model that does not fit the tokenizer.
    """
    with folder.discarded_on_bad_input():
        data, tokenizer = prepare_data(config, folder, reporter)
        reporter.enter_phase("building the model and measuring the device's peak")
        model = initial_model(config, data)
        loop = build_loop(config, data, model.to(device))
        reporter.say(listing(config, model.config, device))
        write_run_file(folder.root, config, model.config)
        return RunSession(config, folder, tokenizer, loop)


def resume(path: Path, changes: Mapping[str, Any], device: torch.device, reporter: Reporter) -> RunSession:
    """Open a run at its last save, or at step 0 if it was killed before the first one.

    Args:
        path: the run folder.
        changes: values of resumable settings, by name.
        device: to train on.
        reporter: gets the resolved settings.
    Raises:
        ValueError: no run, a damaged one, or a change that is not possible.
    """
    folder = RunFolder.reopen(path)
    reporter.enter_phase("loading the run and measuring the device's peak")
    try:
        values = read_run_file(path)
        saved, config = RunConfig.of(values), RunConfig.of({**values, **changes})
        data, tokenizer = open_data(config, folder)
        has_state = (path / STATE / TRAINING_STATE).exists()
        if not has_state and folder.checkpoint.exists():
            raise ValueError(f"run folder {path}: got a checkpoint without {STATE}/{TRAINING_STATE}, expected both")
        model = empty_model(config, data) if has_state else initial_model(config, data)
        if has_state:
            model.source_files = read_source_files(folder.checkpoint)
        loop = build_loop(config, data, model.to(device))
        if has_state:
            loop.load(path)
        check_extension(saved.train, config.train, loop.trainer.steps_done)
        folder.drop_rows_after(loop.trainer.steps_done)
        write_run_file(path, config, model.config)
    except BaseException:
        folder.close()
        raise
    reporter.say(listing(config, model.config, device))
    return RunSession(config, folder, tokenizer, loop)


def prepare_data(
    config: RunConfig, folder: RunFolder, reporter: Reporter
) -> tuple[TrainingData, Tokenizer | None]:
    """Encode the run's text into its folder, unless it trains on prepared folders; then open the data."""
    if config.data.dataset is None:
        corpus = open_text(config.data)
        reporter.say(f"corpus: {corpus}")
        reporter.enter_phase("training the tokenizer and encoding the text")
        tokenizer = source_tokenizer(config)
        if tokenizer is not None:
            config.model_config(tokenizer.vocab_size)  # raises before the text is encoded
        prepare_text(config.data, corpus, tokenizer, folder.tokens, report=reporter.say)
    return open_data(config, folder)


def open_data(config: RunConfig, folder: RunFolder) -> tuple[TrainingData, Tokenizer | None]:
    """Open the run's token shards and their tokenizer; None for token files that came without one.

    Raises:
        ValueError: missing or damaged shards, or shards of another tokenizer than that of the run.
    """
    data = TrainingData.open(config.data, folder.tokens)
    tokenizer = data.tokenizer
    if config.data.dataset is not None and (source := source_tokenizer(config)) is not None:
        data.check_tokenizer(source)
        tokenizer = source
    return data, tokenizer


def source_tokenizer(config: RunConfig) -> Tokenizer | None:
    """Return the tokenizer that the run is given; None if it trains one, or has that of its data."""
    folder = config.source.tokenizer or config.source.init
    return None if folder is None else Tokenizer.load(folder)


def initial_model(config: RunConfig, data: TrainingData) -> GPT:
    """Return the model before the first step: random weights from the seed, or those of the checkpoint `init`."""
    model = empty_model(config, data)
    if config.source.init is not None:
        source = GPT.from_pretrained(config.source.init)
        model.load_state_dict(source.state_dict(), assign=True)
        model.source_files = source.source_files
    return model


def empty_model(config: RunConfig, data: TrainingData) -> GPT:
    """Return the model with random weights; the seed is also that of dropout."""
    torch.manual_seed(config.train.seed)
    return GPT(config.model_config(data.vocab_size))


def build_loop(config: RunConfig, data: TrainingData, model: GPT) -> TrainingLoop:
    """Return the training loop over the run's data."""
    train = config.train
    batches = data.batches(train.batch, train.tokens, train.seed)
    return TrainingLoop(Trainer(model, train, steps=train.steps), batches, data.datasets[0].validation, report_mfu=True)


def check_extension(saved: TrainConfig, config: TrainConfig, steps_done: int) -> None:
    """Check that a run that now has another number of steps is the one that would have begun with it.

    So the learning rates of the steps done must be those of the new schedule too.

    Raises:
        ValueError: they are not, or more steps are done.
    """
    if config.steps < steps_done:
        raise ValueError(f"steps is {config.steps}, expected at least {steps_done}: so many steps are done")
    for step in range(steps_done):
        old, new = learning_rate(saved, step, saved.steps), learning_rate(config, step, config.steps)
        if old != new:
            raise ValueError(
                f"steps is {config.steps}, expected {saved.steps}: the schedule depends on it, and with {config.steps} "
                f"steps the learning rate of step {step + 1} would have been {new:.6g} instead of {old:.6g}; begin "
                "another run with --init"
            )
