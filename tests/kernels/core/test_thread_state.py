"""State of one thread is not seen by another: use_backend, accumulate_into, seeds, Trainer, Engine, patch, AdamW.

Two threads run in steps that a barrier orders, so that their blocks overlap and end in either order.
"""

import contextlib
import threading

import pytest
import torch

import peakgpt
from peakgpt.engine.training.train_config import TrainConfig
from peakgpt.engine.training.trainer import Trainer
from peakgpt.kernels.core import autograd, seeds
from peakgpt.kernels.core.autograd import accumulate_into
from peakgpt.kernels.core.dispatch import forced_backend, seeds_from, use_backend
from peakgpt.kernels.core.thread_state import ThreadState


def in_threads(*functions):
    """Run each function in a thread of its own and return their results."""
    results, errors = [None] * len(functions), []

    def run(i):
        try:
            results[i] = functions[i]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    if errors:
        raise errors[0]
    return results


def seed_source(device):
    return torch.tensor([3])


X = torch.ones(1)
STATES = {
    "use_backend": (use_backend, forced_backend, None, ("cpu", "eager")),
    "accumulate_into": (accumulate_into, autograd._buffers.get, {}, ({X: X}, {X: X + 1})),
    "seeds_from": (seeds_from, seeds._source.get, None, (seed_source, torch.randn)),
}


@pytest.mark.parametrize("first_to_leave", [0, 1])
@pytest.mark.parametrize("name", STATES)
def test_overlapping_blocks_of_two_threads_do_not_see_each_other(name, first_to_leave):
    """Fails with a module global that each block puts back: the later exit leaves the other thread's value behind."""
    block, read, default, values = STATES[name]
    barrier = threading.Barrier(2)

    def thread(i):
        seen = [read()]
        with block(values[i]):
            barrier.wait()
            seen.append(read())
            barrier.wait()
            if i != first_to_leave:
                barrier.wait()
                seen.append(read())
        if i == first_to_leave:
            seen.append(read())
            barrier.wait()
        return [*seen, read()]

    for i, seen in enumerate(in_threads(lambda: thread(0), lambda: thread(1))):
        inside = [values[i]] if i == first_to_leave else [values[i], values[i]]
        outside = [default] * (4 - len(inside))
        expected = [default, *inside, *outside[: len(seen) - 1 - len(inside)]]
        assert all(a is b or a == b for a, b in zip(seen, expected, strict=True)), (seen, expected)
    assert read() == default and read() is not values


def test_nested_blocks_and_errors_restore_the_outer_value():
    with use_backend("cpu"):
        with pytest.raises(RuntimeError), use_backend("eager"):
            raise RuntimeError
        assert forced_backend() == "cpu"
    assert forced_backend() is None


def test_compiled_code_follows_the_backend_of_its_thread():
    """Fails if torch.compile does not guard on the state, or guards on that of the thread that compiled."""
    torch._dynamo.reset()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def call(x):
        return x + {None: 0, "cpu": 1, "eager": 2}[forced_backend()]

    def value(backend):
        with use_backend(backend) if backend else contextlib.nullcontext():
            return call(torch.zeros(1)).item()

    assert [value(b) for b in (None, "cpu", "eager", None)] == [0, 1, 2, 0]
    assert in_threads(lambda: value("cpu"), lambda: value(None)) == [1, 0]
    with use_backend("eager"):
        assert in_threads(lambda: value(None)) == [0]


def test_state_reaches_the_threads_of_autograd():
    """As those of CUDA devices. On a CPU autograd changes the thread if backward calls itself often enough."""
    state, seen = ThreadState("test", "outside"), []

    class Deeper(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, depth):
            ctx.depth = depth
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            seen.append((threading.get_ident(), state.get()))
            if ctx.depth:
                with torch.enable_grad():
                    Deeper.apply(torch.ones(1, requires_grad=True), ctx.depth - 1).sum().backward()
            return grad, None

    with state.set_to("inside"):
        Deeper.apply(torch.ones(1, requires_grad=True), 130).sum().backward()
    assert {value for _, value in seen} == {"inside"} and len({thread for thread, _ in seen}) > 1


# ---- the library in two threads ----


def small_gpt(seed):
    torch.manual_seed(seed)
    return peakgpt.GPT(peakgpt.GPTConfig(n_layer=1, n_embd=32, n_head=2, block_size=32, vocab_size=64))


def batches(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(64, (2, 17), generator=generator) for _ in range(5)]


# Each function below prepares its work, because torch's generator is shared by all threads, and returns what to run.


def train(seed):
    """A few steps of a Trainer: their losses."""
    model = small_gpt(seed)
    trainer = Trainer(model, TrainConfig(batch=2, tokens=16, lr=1e-3), steps=10)

    def run(wait):
        losses = []
        for ids in batches(seed):
            wait()
            losses.append(trainer.step(ids[:, :-1].contiguous(), ids[:, 1:].contiguous()))
        return losses

    return run


def decay(seed):
    torch.manual_seed(seed)
    w = torch.nn.Parameter(torch.randn(300, 40))
    optimizer = peakgpt.AdamW([w], lr=0.1, max_norm=1.0)

    def run(wait):
        for _ in range(5):
            wait()
            w.grad = w.detach().clone()
            optimizer.step()
        return [w.detach().clone()]

    return run


def complete(seed):
    model, ids = small_gpt(seed).eval(), batches(seed)[0][:, :5].contiguous()

    def run(wait):
        wait()
        return [model.generate(ids, max_new_tokens=12)]

    return run


def differentiate(seed):
    """Ops whose C++ kernels keep temporaries between calls."""
    torch.manual_seed(seed)
    x, w = torch.randn(70, 96, requires_grad=True), torch.randn(300, 96, requires_grad=True)
    q = torch.randn(2, 65, 2, 32, requires_grad=True)

    def run(wait):
        results = []
        for _ in range(3):
            wait()
            loss = peakgpt.linear_cross_entropy(x, w, torch.arange(70)) + peakgpt.attention(q, q, q).square().sum()
            results += torch.autograd.grad(loss, (x, w, q))
        return results

    return run


def patch(seed):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config).eval()

    def run(wait):
        wait()
        peakgpt.patch(model)
        with torch.no_grad():
            return [model(batches(seed)[0]).logits]

    return run


@pytest.mark.parametrize("prepare", [train, decay, complete, differentiate, patch])
def test_two_threads_give_the_results_of_one(prepare):
    alone = [prepare(seed)(lambda: None) for seed in (1, 2)]
    barrier, runs = threading.Barrier(2), [prepare(seed) for seed in (1, 2)]
    together = in_threads(*(lambda run=run: run(barrier.wait) for run in runs))
    for a, b in zip(alone, together, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_plain_backward_works_after_two_trainers_in_two_threads():
    """Regression: interleaved exits of accumulate_into left a thread's buffers behind, so parameters got no .grad."""
    barrier, runs = threading.Barrier(2), [train(seed) for seed in (1, 2)]
    in_threads(*(lambda run=run: run(barrier.wait) for run in runs))
    model, ids = small_gpt(1), batches(0)[0]
    model(ids[:, :-1].contiguous(), ids[:, 1:].contiguous()).backward()
    assert all(p.grad is not None for p in model.parameters()) and not autograd._buffers.get()
