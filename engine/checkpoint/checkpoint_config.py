"""When a run saves, and which checkpoints it keeps."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from peakgpt.engine.settings.setting import check_settings, setting


@dataclass(kw_only=True, frozen=True)
class CheckpointConfig:
    """The settings of a run's checkpoints.

    Raises:
        ValueError: a value is out of range, or values contradict each other.
    """

    save_every: int = setting(
        250, "steps between checkpoints; the last step always has one", section="checkpoint", at_least=1,
        metavar="STEPS", resumable=True,
    )  # fmt: skip
    # Two, so that a run whose newest checkpoint is damaged goes on from the one before.
    keep_last: int | None = setting(
        2, "newest checkpoints that are kept; none: all", section="checkpoint", at_least=1, metavar="COUNT",
        resumable=True,
    )  # fmt: skip
    keep_every: int | None = setting(
        None, "checkpoints whose step is a multiple of this are kept too", section="checkpoint", at_least=1,
        metavar="STEPS", resumable=True,
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_settings(self)
        if self.keep_every is not None and self.keep_every % self.save_every:
            raise ValueError(
                f"CheckpointConfig: keep_every is {self.keep_every}, expected a multiple of save_every, "
                f"{self.save_every}: other steps have no checkpoint"
            )
        if self.keep_every is not None and self.keep_last is None:
            raise ValueError(
                f"CheckpointConfig: keep_every is {self.keep_every} with keep_last none, expected a number: "
                "all checkpoints are kept"
            )

    def kept(self, steps: Collection[int], best: int | None) -> set[int]:
        """Return the steps whose checkpoints are kept.

        Args:
            steps: of all checkpoints.
            best: step of the best one; None if it is unknown.
        """
        newest = sorted(steps)[-self.keep_last :] if self.keep_last else steps
        multiples = {step for step in steps if self.keep_every and step % self.keep_every == 0}
        return {*newest, *multiples, *({best} & {*steps})}
