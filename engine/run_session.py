"""One training run: its config becomes a tokenizer, token shards, a model and a training loop in a run folder.

`start` builds a new run, `resume` one that was saved. Each step is a function of its own.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from peakgpt.engine.checkpoint.model_files import ModelFiles, WholeModel
from peakgpt.engine.data.data_config import VOCAB
from peakgpt.engine.data.dataset import TrainingData, open_text, prepare_text
from peakgpt.engine.data.run_layout import saved_steps, step_folder
from peakgpt.engine.data.tokenizer import Tokenizer
from peakgpt.engine.gpt import GPT
from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.training.checkpoint_manager import CheckpointManager
from peakgpt.engine.training.figures import bytes_text
from peakgpt.engine.training.held_out import held_out_sets, prepare_held_out
from peakgpt.engine.training.loop import TrainingLoop
from peakgpt.engine.training.memory_estimate import refuse_what_cannot_fit
from peakgpt.engine.training.metric_sinks import require_packages
from peakgpt.engine.training.run_config import RunConfig
from peakgpt.engine.training.run_file import listing, read_run_file, write_run_file
from peakgpt.engine.training.run_folder import RunFolder
from peakgpt.engine.training.run_settings import RunSettings, expect_weights_of
from peakgpt.engine.training.schedule import Schedule
from peakgpt.engine.training.step_profile import check_window
from peakgpt.engine.training.train_config import TrainConfig
from peakgpt.engine.training.trainer import Trainer
from peakgpt.engine.training.validation import Validator


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
    """A run that is ready to train. Close `checkpoints`, then `folder`, at the end.

    Args:
        finish: called after the last step and the last save; returns lines to print.
    """

    config: RunSettings
    folder: RunFolder
    loop: TrainingLoop
    checkpoints: CheckpointManager
    finish: Callable[[], Sequence[str]] = tuple


@dataclass(frozen=True)
class BuiltRun:
    """The parts of a run that each command builds in its own way.

    Args:
        config: of the run.
        loop: over its data.
        files: how its checkpoints are written.
        model_config: for the run file: of the model before a task changes it.
        size: a line about the model.
        planned_steps: returns the number of updates that a config plans over the same data.
        finish: called with the run folder after the last step; returns lines to print.
    """

    config: RunSettings
    loop: TrainingLoop
    files: ModelFiles
    model_config: GPTConfig
    size: str
    planned_steps: Callable[[Any], int]
    finish: Callable[[Path], Sequence[str]] = lambda path: ()

    def report(self, device: torch.device, reporter: Reporter) -> None:
        reporter.say(listing(self.config, self.loop.trainer.model.config, device))
        reporter.say(self.size)

    def check_profile(self, done: int) -> None:
        """Raise ValueError if the steps to profile are not among those that follow `done` steps."""
        train = self.config.train
        check_window(self.config.metrics.profile, done, None if train.minutes else self.loop.trainer.steps)

    def session(self, folder: RunFolder) -> RunSession:
        checkpoints = CheckpointManager(folder, self.loop, self.files, self.config.checkpoint)
        return RunSession(self.config, folder, self.loop, checkpoints, functools.partial(self.finish, folder.path))


def begin(build: Callable[[], BuiltRun], folder: RunFolder, device: torch.device, reporter: Reporter) -> RunSession:
    """Build a new run. If that fails, nothing is left in the folder.

    Raises:
        ValueError: bad input.
    """
    with folder.discarded_on_bad_input():
        run = build()
        run.check_profile(0)
        run.report(device, reporter)
        write_run_file(folder.root, run.config, run.model_config)
    return run.session(folder)


def reopen(
    path: Path, kind: type[RunSettings], changes: Mapping[str, Any], build: Callable[[Any, RunFolder], BuiltRun],
    device: torch.device, reporter: Reporter,
) -> RunSession:  # fmt: skip
    """Open a run at its newest undamaged checkpoint, or at step 0 if it was killed before the first one.

    Args:
        path: the run folder.
        kind: of its config.
        changes: values of resumable settings, by name.
        build: builds the run from its folder.
        device: to train on.
        reporter: gets the resolved settings.
    Raises:
        ValueError: no run, a damaged one, or a change that is not possible.
    """
    folder = RunFolder.reopen(path)
    reporter.enter_phase("loading the run")
    try:
        values = read_run_file(path, kind)
        saved, config = kind.of(values), kind.of({**values, **changes})
        require_packages(config.metrics)
        run = build(config, folder)
        session = run.session(folder)
        planned = run.planned_steps(saved), run.loop.trainer.steps

        def accept(done: int) -> None:
            check_extension(saved.train, config.train, done, *planned)
            if "profile" in changes:
                run.check_profile(done)

        session.checkpoints.load(report=reporter.say, accept=accept)
        write_run_file(path, config, run.model_config)
    except BaseException:
        folder.close()
        raise
    run.report(device, reporter)
    reporter.say(f"resumed after step {run.loop.trainer.steps_done}")
    return session


def start(config: RunConfig, folder: RunFolder, device: torch.device, reporter: Reporter) -> RunSession:
    """Build a new run of `peakgpt train`; see `begin`.

    Raises:
        ValueError: bad data, or a model that does not fit the tokenizer.
    """

    def build() -> BuiltRun:
        data, tokenizer = prepare_data(config, folder, reporter)
        reporter.enter_phase("building the model and measuring the device's peak")
        return _built(config, folder, data, tokenizer, initial_model(config, data).to(device))

    return begin(build, folder, device, reporter)


def check_resources(config: RunConfig, device: torch.device, reporter: Reporter) -> None:
    """Check what a run needs, before its folder is made and its text is read.

    Raises:
        ValueError: a package is missing, or the run does not fit into the memory.
    """
    require_packages(config.metrics)
    has_tokenizer = config.source.init or config.source.tokenizer or config.data.dataset
    vocab = None if has_tokenizer else config.data.vocab or VOCAB  # None: the preset's is about right
    predicted, available = refuse_what_cannot_fit(config.model_config(vocab), config.train, device)
    reporter.say(f"memory: about {predicted}; {bytes_text(available)} available")


def resume(path: Path, changes: Mapping[str, Any], device: torch.device, reporter: Reporter) -> RunSession:
    """Open a run of `peakgpt train` again; see `reopen`."""

    def build(config: RunConfig, folder: RunFolder) -> BuiltRun:
        steps = saved_steps(path)
        data, tokenizer = open_data(config, folder, saved_tokenizer(config, path, steps))
        model = empty_model(config, data) if steps else initial_model(config, data)
        return _built(config, folder, data, tokenizer, model.to(device))

    return reopen(path, RunConfig, changes, build, device, reporter)


def _built(
    config: RunConfig, folder: RunFolder, data: TrainingData, tokenizer: Tokenizer | None, model: GPT
) -> BuiltRun:  # fmt: skip
    loop = build_loop(config, folder, data, tokenizer, model)
    return BuiltRun(config, loop, WholeModel(model, tokenizer), model.config, sizes(loop, data),
                    functools.partial(planned_steps, data=data))  # fmt: skip


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
    data, tokenizer = open_data(config, folder, source_tokenizer(config))
    prepare_held_out(config.validation.named_sets(), tokenizer, folder.tokens)
    return data, tokenizer


def open_data(
    config: RunConfig, folder: RunFolder, source: Tokenizer | None
) -> tuple[TrainingData, Tokenizer | None]:  # fmt: skip
    """Open the run's token shards and their tokenizer; None for token files that came without one.

    Args:
        source: the tokenizer that the run is given; None if it has that of its data.
    Raises:
        ValueError: missing or damaged shards, or shards of another tokenizer than that of the run.
    """
    data = TrainingData.open(config.data, folder.tokens)
    tokenizer = data.tokenizer
    if config.data.dataset is not None and source is not None:
        data.check_tokenizer(source)
        tokenizer = source
    return data, tokenizer


def source_tokenizer(config: RunConfig) -> Tokenizer | None:
    """Return the tokenizer that the run is given; None if it trains one, or has that of its data."""
    source = config.source.tokenizer or config.source.init
    return None if source is None else Tokenizer.load(source)


def saved_tokenizer(config: RunConfig, path: Path, steps: Sequence[int]) -> Tokenizer | None:
    """Return the tokenizer that a run was given, from its checkpoints: the model that it came from may be gone.

    Args:
        path: of the run.
        steps: of its checkpoints.
    """
    if config.data.dataset is None or (config.source.tokenizer or config.source.init) is None:
        return None
    for step in reversed(steps):
        with contextlib.suppress(ValueError):  # a damaged checkpoint, which is reported when it is loaded
            return Tokenizer.load(step_folder(path, step))
    return source_tokenizer(config)


def initial_model(config: RunConfig, data: TrainingData) -> GPT:
    """Return the model before the first step: random weights from the seed, or those of the checkpoint `init`."""
    model = empty_model(config, data)
    if config.source.init is not None:
        source = GPT.from_pretrained(config.source.init, dequantize=True, merge_adapter=True)
        expect_weights_of(model.config, source.config, config.source.init)  # a run's file has all fields of its model
        model.load_state_dict(source.state_dict())  # copied: a run does not depend on the file, and has huge pages
        model.source_files = source.source_files
    return model


def empty_model(config: RunConfig, data: TrainingData) -> GPT:
    """Return the model with random weights; the seed is also that of dropout."""
    torch.manual_seed(config.train.seed)
    return GPT(config.model_config(data.vocab_size))


def build_loop(
    config: RunConfig, folder: RunFolder, data: TrainingData, tokenizer: Tokenizer | None, model: GPT
) -> TrainingLoop:
    """Return the training loop over the run's data, with its held-out sets."""
    train = config.train
    batches = data.batches(train.batch, train.tokens, train.seed, mask_documents=train.mask_documents)
    trainer = Trainer(model, train, steps=planned_steps(config, data))
    sets = held_out_sets(data, config.validation.named_sets(), folder.tokens)
    validator = Validator(model, sets, config.validation, batch=train.micro_batch or train.batch, tokens=train.tokens,
                          tokenizer=tokenizer, seed=train.seed, document_token=batches.document_token)  # fmt: skip
    return TrainingLoop(trainer, batches, validator, report_mfu=True)


def sizes(loop: TrainingLoop, data: TrainingData) -> str:
    """Return the size of the model and of the data, and the peak rate: MFU = tokens/s x FLOPs per token / peak."""
    parameters = sum(parameter.numel() for parameter in loop.trainer.model.parameters())
    peak = "" if loop.peak_flops_s is None else f"; peak {loop.peak_flops_s / 1e12:.3g} TFLOP/s"
    return (
        f"model: {parameters:,} parameters, {loop.flops_per_token / 1e6:,.4g} MFLOPs per token{peak}; "
        f"data: {sum(len(dataset.train) for dataset in data.datasets):,} training tokens"
    )


def planned_steps(config: RunConfig, data: TrainingData) -> int:
    """Return the number of updates of a run over its data."""
    return Schedule(config.train).steps(sum(len(dataset.train) for dataset in data.datasets))


def check_extension(saved: TrainConfig, config: TrainConfig, done: int, saved_steps: int, steps: int) -> None:
    """Check that a run with another number of steps is the one that would have begun with it.

    So the batches and the learning rates of the steps done must be those of the new schedule too.

    Args:
        saved, config: before and after the change.
        done: updates made.
        saved_steps, steps: planned updates, before and after.
    Raises:
        ValueError: they are not, or more updates are made than planned.
    """
    if steps < done:
        raise ValueError(f"steps is {steps}, expected at least {done}: so many steps are done")
    before, after = Schedule(saved), Schedule(config)
    for step in range(done):
        old, new = before.lr(step, saved_steps), after.lr(step, steps)
        if old != new:
            raise ValueError(
                f"steps is {steps}, expected {saved_steps}: the schedule {config.schedule} depends on it; with {steps} "
                f"steps the learning rate of step {step + 1} would have been {new:.6g} instead of {old:.6g}; begin "
                "another run with --init"
            )
