"""A tiny training whose loss is wrong for chosen batches, whatever the weights are."""

import math

import torch
from tiny_run import VOCAB

from peakgpt.engine.data.batches import Batches
from peakgpt.engine.data.shards import TokenShards
from peakgpt.engine.gpt import GPT
from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.training.delayed_metrics import DelayedMetrics
from peakgpt.engine.training.loop import TrainingLoop
from peakgpt.engine.training.train_config import TrainConfig
from peakgpt.engine.training.trainer import Trainer


def make_loop(tokens, wrong, *, dtype=torch.float32, **settings):
    """Build the loop at the start of a run of 20 steps, over the tokens of `tiny_run.write_tokens`.

    Args:
        wrong: number of a batch, from 0 -> factor on its loss; NaN also makes its gradients NaN.
        settings: of TrainConfig.
    Returns:
        The loop, and the list of the numbers of the batches that it has trained on, which grows.
    """
    torch.manual_seed(0)
    shards = TokenShards.open(tokens, "train")
    reference = Batches(shards, 4, 16, 1337)
    numbers = {_key(next(reference)[0]): number for number in range(60)}
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_size=VOCAB, dropout=0.1))
    seen = []

    def note(module, inputs):
        seen.append(numbers[_key(inputs[0])])

    def spoil_loss(module, inputs, loss):
        return loss + loss.detach() * (wrong.get(seen[-1], 1.0) - 1.0)  # the gradient stays, as accumulation needs

    def spoil_gradients(module, inputs, x):
        return x * math.nan if math.isnan(wrong.get(seen[-1], 1.0)) else x

    model.register_forward_pre_hook(note)
    model.register_forward_hook(spoil_loss)
    model.transformer.h[0].register_forward_hook(spoil_gradients)
    trainer = Trainer(model, TrainConfig(batch=4, tokens=16, lr=1e-2, steps=20, dtype=dtype, **settings))
    return TrainingLoop(trainer, Batches(shards, 4, 16, 1337)), seen


class OneStepLate(DelayedMetrics):
    """On CUDA the numbers of a step are read while the next one runs; this simulates it on a CPU."""

    def put(self, label, *values):
        arrived, self.pending = self.take(), (label, *map(float, values))
        return arrived

    def take(self):
        arrived, self.pending = [self.pending] if self.pending else [], None
        return arrived


def _key(ids):
    return tuple(ids.flatten().tolist())
