"""Bits of the CPU backend: the same in every run, for any thread count, in any batch.

Each test has a counter-test: it must detect a product that is split by the thread count or the batch.
"""

import pytest
import torch

from peakgpt.engine.gpt import GPT
from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.training.train_config import TrainConfig
from peakgpt.engine.training.trainer import Trainer
from peakgpt.kernels.cpu import linear
from peakgpt.kernels.cpu.gemm import ADD, STORE, gemm

SIZES = {"vocab_size": 300, "block_size": 80, "n_layer": 2, "n_embd": 48, "n_head": 3}
CONFIG = GPTConfig(**SIZES)
MIXED = GPTConfig(
    **SIZES, norm="rms", gated_mlp=True, experts=3, n_kv_head=1, position="relative_bias", bias=False,
    attention_softcap=2.0, attention_sinks=True,
)  # fmt: skip
configs = pytest.mark.parametrize("config", (CONFIG, MIXED), ids=("gpt2", "mixed"))
DTYPES = (torch.float32, torch.bfloat16)


def split_in(parts_of):
    """A matrix product whose sum over k is split into parts_of(a) parts."""

    def product(a, b, out, *, epilogue=STORE, bias=None, **rest):
        parts = zip(a.chunk(parts_of(a), 1), b.chunk(parts_of(a), 0), strict=True)
        gemm(*next(parts), out, epilogue=epilogue, bias=bias, **rest)
        for left, right in parts:
            gemm(left, right, out, epilogue=ADD)
        return out

    return product


def trained(dtype, config=CONFIG):
    """Master weights, losses and the gradient norm of three steps."""
    torch.manual_seed(0)
    model = GPT(config)
    trainer = Trainer(model, TrainConfig(batch=3, tokens=70, dtype=dtype, lr=1e-2), steps=10)
    ids = torch.randint(CONFIG.vocab_size, (3, 71))
    losses = [trainer.step(ids[:, :-1].contiguous(), ids[:, 1:].contiguous()) for _ in range(3)]
    return [*trainer.optimizer.master_weights(model).values(), *losses, trainer.optimizer.grad_norm]


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@configs
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_training_gives_the_same_bits_in_every_run(dtype, config):
    assert same(trained(dtype, config), trained(dtype, config))


@configs
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_training_gives_the_same_bits_for_any_thread_count(dtype, config, threads, monkeypatch):
    def by_threads():
        results = []
        for count in (1, 2, 4):
            threads(count)
            results.append(trained(dtype, config))
        return results

    first, *others = by_threads()
    assert all(same(first, other) for other in others)
    monkeypatch.setattr(linear, "gemm", split_in(lambda a: torch.get_num_threads()))
    first, *others = by_threads()
    assert not any(same(first, other) for other in others), "the check does not detect the planted split"


@configs
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_have_the_same_bits_in_any_batch(dtype, config, monkeypatch):
    torch.manual_seed(0)
    model = GPT(config).to(dtype).eval()
    ids = torch.randint(CONFIG.vocab_size, (5, 70))

    @torch.no_grad()
    def in_batches():
        return [model(ids), torch.cat([model(ids[:1]), model(ids[1:3]), model(ids[3:])])]

    assert same(*([r] for r in in_batches()))
    monkeypatch.setattr(linear, "gemm", split_in(lambda a: 1 + a.shape[0] // 100))
    assert not same(*([r] for r in in_batches())), "the check does not detect the planted split"
