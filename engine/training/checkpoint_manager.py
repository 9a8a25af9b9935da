"""CheckpointManager: saves a training loop in the background, and continues it from its newest undamaged checkpoint.

    files = WholeModel(model, tokenizer)
    with RunFolder("runs/mine") as run, CheckpointManager(run, loop, files) as checkpoints:
        for event in loop.run(save_every=250):
            if isinstance(event, SaveDue):
                checkpoints.save()
            else:
                run.log(**event.row())
            checkpoints.check()

    with RunFolder.reopen("runs/mine") as run, CheckpointManager(run, loop, files) as checkpoints:
        checkpoints.load()  # then as above
"""

from __future__ import annotations

import threading
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from peakgpt.engine.checkpoint.checkpoint_config import CheckpointConfig
from peakgpt.engine.checkpoint.folder import TRAINING_STATE, WEIGHTS
from peakgpt.engine.checkpoint.model_files import ModelFiles, WholeModel
from peakgpt.engine.checkpoint.run_checkpoints import link_best, read_checkpoint, remove_checkpoints, write_checkpoint
from peakgpt.engine.checkpoint.training_state import read_training_state, split_tensors, write_training_state
from peakgpt.engine.data.run_layout import saved_steps, step_folder
from peakgpt.engine.training.loop import TrainingLoop, require_finite_weights
from peakgpt.engine.training.loss_spikes import MAX_ROLLBACKS, LossSpike, RolledBack
from peakgpt.engine.training.run_folder import RunFolder
from peakgpt.engine.training.skipped_steps import Diverged
from peakgpt.engine.training.snapshot import Snapshot


class CheckpointManager:
    """Writes the checkpoints of one run.

    A save copies everything to host memory, while training waits, and then writes it in a thread. So a save needs once
    the memory of the float32 weights and the optimizer's state. One save runs at a time; the next one waits for it.

    Attributes:
        saved_step: step of the newest checkpoint that is complete; None if there is none.
    """

    def __init__(
        self, run: RunFolder, loop: TrainingLoop, files: ModelFiles | None = None,
        config: CheckpointConfig | None = None,
    ):  # fmt: skip
        """
        Args:
            run: the folder to write into.
            loop: what to save, with all its parts.
            files: how the model is written and read. None: all of it, without a tokenizer.
            config: which checkpoints to keep.
        Raises:
            ValueError: the model has adapters or other tensors that a model folder cannot have.
        """
        self.run, self.loop, self.config = run, loop, config or CheckpointConfig()
        self.files = files or WholeModel(loop.trainer.model)
        self.files.check(run.path)
        self.saved_step: int | None = None
        self._memory = Snapshot(loop.trainer.device)
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._rollbacks: Counter[int] = Counter()  # to the checkpoint of a step

    def __enter__(self) -> CheckpointManager:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait for the save in progress. Its error is raised, or a warning if another error is on its way."""
        try:
            self.wait()
        except OSError as error:
            if kind is None:
                raise
            warnings.warn(str(error), stacklevel=2)

    # ---- saving ----

    def save(self, best: int | None = None) -> None:
        """Start to save the loop as it is after its last step, unless that step is saved already.

        Args:
            best: step of the best checkpoint so far, which is kept.
        Raises:
            OSError: the save before has failed, or there is not enough memory. All complete checkpoints are kept.
        """
        self.wait()
        step = self.loop.trainer.steps_done
        if step == self.saved_step:
            return
        write = self._writer(step, {"best": best, "metrics": self.run.metrics.mark()})
        self._thread = threading.Thread(target=self._run, args=(write, step), name="checkpoint")
        self._thread.start()

    def check(self) -> None:
        """Raise the error of a save that has failed; do not wait for one that is running.

        Raises:
            OSError: see `save`.
        """
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Wait for the save in progress.

        Raises:
            OSError: see `save`.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _writer(self, step: int, facts: dict[str, Any]) -> Callable[[], None]:
        """Copy the loop's state to host memory; return the function that writes it."""
        best, write_files = facts["best"], self.files.writer()
        state, structure = split_tensors(self.loop.state_dict())
        try:
            layout = self.files.layout(self.loop.trainer.saved_weights())
            weights = self._memory.take((f"{WEIGHTS}:{name}", tensor) for name, tensor in layout)
            state = self._memory.take(state.items())
        except OSError as error:
            raise self._failed(step, error) from None
        weights = {name.partition(":")[2]: tensor for name, tensor in weights.items()}

        def fill(folder: Path) -> None:
            write_files(folder, weights)
            write_training_state(folder / TRAINING_STATE, state, structure)

        def write() -> None:
            self._memory.wait()
            require_finite_weights(step, weights)
            write_checkpoint(self.run.path, step, fill, facts)
            link_best(self.run.path, best)
            steps = [saved for saved in saved_steps(self.run.path) if saved <= step]
            remove_checkpoints(self.run.path, self.config.kept(steps, best))

        return write

    def _run(self, write: Callable[[], None], step: int) -> None:
        """Write in the background; keep an error for the next call of the training thread."""
        try:
            write()
            self.saved_step = step
        except FloatingPointError as error:
            self._error = error
        except Exception as error:  # the tokenizer's library raises any exception for a full disk
            self._error = self._failed(step, error)

    def _failed(self, step: int, error: Exception) -> OSError:
        reason = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
        kept = "no older checkpoint" if self.saved_step is None else f"the checkpoint of step {self.saved_step}"
        return OSError(f"checkpoint of step {step} in {self.run.path}: {reason}, expected to save it; {kept} is kept")

    # ---- loading ----

    def load(
        self, last_step: int | None = None, *, report: Callable[[str], None] = warnings.warn,
        accept: Callable[[int], None] = lambda step: None,
    ) -> int:  # fmt: skip
        """Continue from the newest checkpoint that is not damaged, and cut metrics.jsonl back to it.

        Args:
            last_step: take a checkpoint of at most this step; None: any.
            report: called with one sentence for each damaged checkpoint.
            accept: called with the step before anything changes; it may raise.
        Returns:
            Its step; 0 if the run has none, which then starts at its beginning.
        Raises:
            ValueError: all checkpoints are damaged, or they belong to another model or other data.
        """
        self.wait()
        faults: list[str] = []
        for step in reversed([s for s in saved_steps(self.run.path) if last_step is None or s <= last_step]):
            try:
                manifest = read_checkpoint(self.run.path, step)
                contents = self._read(step_folder(self.run.path, step))
            except ValueError as error:
                faults.append(f"checkpoint of step {step}: {error}")
                report(faults[-1])
                continue
            if contents is None:
                raise ValueError(f"checkpoint of step {step} in {self.run.path}: got another model, expected the run's")
            accept(step)
            self.loop.load_state_dict(*contents)
            self.run.metrics.cut(manifest["metrics"]["bytes"])
            link_best(self.run.path, manifest["best"])
            self.saved_step = step
            return step
        if faults:
            raise ValueError(f"run folder {self.run.path}: got no undamaged checkpoint, expected one; {faults[-1]}")
        accept(0)
        self.run.metrics.cut(0)
        return 0

    def roll_back(self, spike: LossSpike) -> RolledBack | None:
        """Go back to the newest checkpoint at least spike_rollback updates before a spike, and leave its data out.

        Returns:
            What was done; None if there is no such checkpoint, and nothing was done.
        Raises:
            Diverged: the training has gone back to this checkpoint MAX_ROLLBACKS times.
            ValueError: all such checkpoints are damaged.
            OSError: a checkpoint cannot be deleted.
        """
        config, batches = self.loop.trainer.config, self.loop.batches
        last_step = spike.step - config.spike_rollback
        self.wait()
        if not any(step <= last_step for step in saved_steps(self.run.path)):
            return None
        position = batches.state_dict()
        step = self.load(last_step)
        self._rollbacks[step] += 1
        if self._rollbacks[step] > MAX_ROLLBACKS:
            raise Diverged(
                f"step {spike.step}: the training has gone back to step {step} {MAX_ROLLBACKS} times after loss "
                "spikes, expected other data to help"
            )
        remove_checkpoints(self.run.path, [saved for saved in saved_steps(self.run.path) if saved <= step])
        batches.load_state_dict(position)
        for _ in range(config.spike_skip):
            batches.skip(self.loop.trainer.batch)
        return RolledBack(step, spike, config.spike_skip)

    def _read(self, folder: Path) -> tuple[Any, dict[str, torch.Tensor]] | None:
        """Return the state and the weights of a checkpoint; None if it is of another model."""
        weights = self.files.read(folder)
        return None if weights is None else (read_training_state(folder / TRAINING_STATE), weights)
