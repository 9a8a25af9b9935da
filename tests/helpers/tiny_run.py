"""A training run that takes milliseconds: a tiny GPT with dropout on a few thousand tokens."""

import torch

from peakgpt.engine.checkpoint.manifest import seal
from peakgpt.engine.checkpoint.model_files import WholeModel
from peakgpt.engine.data.batches import Batches
from peakgpt.engine.data.shard_writer import write_shards
from peakgpt.engine.data.shards import TokenShards
from peakgpt.engine.gpt import GPT
from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.training.checkpoint_manager import CheckpointManager
from peakgpt.engine.training.loop import SaveDue, TrainingLoop
from peakgpt.engine.training.run_folder import RunFolder
from peakgpt.engine.training.train_config import TrainConfig
from peakgpt.engine.training.trainer import Trainer
from peakgpt.engine.training.validation import Validator
from peakgpt.engine.training.validation_config import ValidationConfig

VOCAB = 67


def write_tokens(folder):
    for name, count in (("train", 1000), ("validation", 300)):
        ids = [(3 * i * i + i // 7) % VOCAB for i in range(count)]
        write_shards(folder, name, [ids], VOCAB, text_bytes=4 * count, corpus_digest="d")


def make_loop(tokens, *, steps=20, dtype=torch.float32, **model):
    """Build the loop as at the start of the run, over the tokens of `write_tokens`."""
    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "vocab_size": VOCAB, "dropout": 0.1}
    config = TrainConfig(batch=4, tokens=16, lr=1e-2, dtype=dtype, steps=steps)
    trainer = Trainer(GPT(GPTConfig(**{**sizes, **model})), config, steps=steps)
    shards, validation = (TokenShards.open(tokens, name) for name in ("train", "validation"))
    validator = Validator(trainer.model, {"validation": validation}, ValidationConfig(), batch=4, tokens=16)
    return TrainingLoop(trainer, Batches(shards, 4, 16, config.seed), validator)


def new_run(path):
    """Make a run folder as `peakgpt train` does, with tokens and a file of settings."""
    run = RunFolder(path)
    with run.discarded_on_bad_input():
        write_tokens(run.tokens)
        (run.root / "config.toml").write_text(seal("steps = 20\n"))
    return run


def train(run, loop, *, save_every=5, validate_every=None, config=None, until=None, killed=False, tokenizer=None):
    """Train with checkpoints, from the newest one on, and close the run. Return the losses of all rows.

    Args:
        until: stop after this step.
        killed: whether the last save is left out, so that the rows after the save before it have no checkpoint.
    """
    files = WholeModel(loop.trainer.model, tokenizer)
    with run, CheckpointManager(run, loop, files, config) as checkpoints:
        checkpoints.load()
        for event in loop.run(
            save_every=save_every, validate_every=validate_every, should_stop=lambda: loop.trainer.steps_done == until
        ):
            checkpoints.check()
            if isinstance(event, SaveDue):
                if not (killed and event.step == until):
                    checkpoints.save()
            else:
                run.log(**event.row())
    return losses(run)


def losses(run):
    return [(row["step"], name, row[name]) for row in run.rows() for name in ("loss", "validation_loss") if name in row]


def checkpoint_bytes(folder):
    """Return the content of each file of a checkpoint, without what depends on the clock."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}
