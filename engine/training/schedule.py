"""The learning-rate schedule: a linear warmup, then a linear decay to zero.

Bergsma et al. 2025, "Straight to Zero", arXiv:2502.15938.
"""

from peakgpt.engine.training.train_config import TrainConfig


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """Return the learning rate of update `step`, counted from 0, of `steps` updates."""
    warmup = max(1, round(config.warmup * steps))
    return config.lr * min((step + 1) / warmup, max(0, steps - step) / max(1, steps - warmup))
