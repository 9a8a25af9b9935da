"""The step as one graph, rehearsed on a CPU: nothing waits for the host, nothing that changes is held on to."""

import contextlib
import itertools

import pytest
import torch

from peakgpt.engine.gpt import GPT
from peakgpt.engine.graph_capture import WARMUP, Captured, Late, Rehearsal, recorder_for
from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.training import trainer as train
from peakgpt.engine.training.train_config import TrainConfig
from peakgpt.engine.training.trainer import Trainer
from peakgpt.kernels.core.dispatch import use_backend
from peakgpt.kernels.ops.dropout import dropout

SIZES = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 8, "vocab_size": 37}
STEPS = WARMUP + 2
EVERYTHING = {"recompute": "mlp", "micro_batch": 1, "position": "rotary", "dropout": 0.2, "attention_dropout": 0.0}


def batches():
    generator = torch.Generator().manual_seed(4)
    while True:
        ids = torch.randint(37, (2, 9), generator=generator)
        yield ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def trained(monkeypatch, backend, dtype, recorder, recompute="none", micro_batch=None, **config):
    """Losses, norms and masters of a few steps, and the trainer."""
    monkeypatch.setattr(train, "recorder_for", lambda device: recorder)
    torch.manual_seed(3)
    model = GPT(GPTConfig(**SIZES, **config))
    recipe = TrainConfig(batch=2, tokens=8, dtype=dtype, lr=1e-2, max_norm=0.5, recompute=recompute,
                    micro_batch=micro_batch)  # fmt: skip
    trainer = Trainer(model, recipe, steps=10)
    losses, norms = [], []
    with use_backend(backend):
        for ids, targets in itertools.islice(batches(), STEPS):
            losses.append(trainer.step(ids, targets))
            norms.append(trainer.grad_norm)
    return [*losses, *norms, *trainer.optimizer.master_weights(model).values()], trainer


@pytest.mark.parametrize(
    ("backend", "dtype", "choices"),
    [
        ("eager", torch.float32, {}),
        ("eager", torch.bfloat16, {"recompute": "block"}),
        ("eager", torch.float32, {"micro_batch": 1}),
        ("eager", torch.float32, {"position": "rotary"}),
        ("eager", torch.float32, {"position": "alibi"}),
        ("eager", torch.float32, {"dropout": 0.2}),
        ("gpu", torch.float32, EVERYTHING),
    ],
    ids=str,
)
def test_the_step_can_be_captured_and_gives_the_same_bits(backend, dtype, choices, monkeypatch):
    """Eager shows the model's own calls, the interpreted kernels their glue.

    Fails when lr is passed by value: the second replay would make another call than the first.
    """
    if backend == "gpu":
        pytest.importorskip("triton")
    plain, before = trained(monkeypatch, backend, dtype, None, **choices)
    captured, after = trained(monkeypatch, backend, dtype, Rehearsal, **choices)
    assert after.update.inputs is not None and after.update.obstacle is None
    assert before.update.inputs is None and "CUDA" in before.update.obstacle
    for a, b in zip(plain, captured, strict=True):
        assert torch.equal(a, b)


def captured(function):
    return Captured(function, Rehearsal, lambda: None)


@pytest.mark.parametrize(
    ("wait", "name"),
    [
        (lambda x: x * float(x.sum()), "__float__"),
        (lambda x: x if x.sum() > 0 else -x, "__bool__"),
        (lambda x: x * x.max().item(), "item"),
        (lambda x: x[x > 0].sum(), "__getitem__"),
        (lambda x: x.nonzero().sum(), "nonzero"),
        (lambda x: x + torch.tensor(1.0), "tensor"),
    ],
)
def test_a_wait_is_told(wait, name):
    step = captured(lambda x: [wait(x)])
    for _ in range(WARMUP):
        step(torch.ones(3))
    with pytest.raises(RuntimeError, match=rf"test_capture calls {name} inside a captured step"):
        step(torch.ones(3))


def test_a_wait_in_the_backward_pass_is_told():
    class Waits(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, dy):
            return dy * float(dy.sum())

    def step(x):
        x = x.detach().requires_grad_()
        Waits.apply(x).sum().backward()
        return [x.grad]

    step = captured(step)
    for _ in range(WARMUP):
        step(torch.ones(3))
    with pytest.raises(RuntimeError, match="calls __float__"):
        step(torch.ones(3))


def test_a_number_that_changes_and_a_branch_that_changes_are_told():
    count = itertools.count()
    scaled = captured(lambda x: [x * next(count)])
    branched = captured(lambda x: [x + 1 if next(count) % 2 else x - 1])
    for step in (scaled, branched):
        for _ in range(WARMUP + 1):
            step(torch.ones(3))
        with pytest.raises(RuntimeError, match=r"call 0 of the step is .*, recorded was"):
            step(torch.ones(3))


def test_inputs_are_copied_in_and_results_out():
    step = captured(lambda x: [x + 1])
    results = [step(torch.full((2,), float(i)))[0] for i in range(STEPS)]
    assert [r.tolist() for r in results] == [[i + 1.0] * 2 for i in range(STEPS)]


@pytest.mark.parametrize("backend", ("gpu", None))
def test_two_replays_drop_others(backend):
    """The seed is drawn inside of the step, from a generator that a graph advances; fails with one made before."""
    if backend:
        pytest.importorskip("triton")
    step = captured(lambda x: [dropout(x, p=0.5)])
    torch.manual_seed(0)
    with use_backend(backend) if backend else contextlib.nullcontext():
        first, second = [step(torch.ones(64)) for _ in range(STEPS)][-2:]
        torch.manual_seed(5)
        third = step(torch.ones(64))
        torch.manual_seed(5)
        assert torch.equal(third[0], step(torch.ones(64))[0]), "the same state of the generator repeats"
    assert not torch.equal(first[0], second[0])


def test_another_shape_runs_as_it_is():
    step = captured(lambda x: [x + 1])
    for _ in range(STEPS):
        step(torch.ones(3))
    assert step(torch.ones(2))[0].shape == (2,) and step.inputs[0].shape == (3,)


def test_what_moved_is_recorded_anew():
    where = [0]
    step = Captured(lambda x: [x + where[0]], Rehearsal, lambda: where[0])
    for _ in range(STEPS):
        step(torch.ones(3))
    first, where[0] = step.recorder, 1
    for _ in range(STEPS):
        assert step(torch.ones(3))[0].tolist() == [2.0] * 3
    assert step.recorder is not first


def test_a_loaded_state_is_recorded_anew(monkeypatch):
    """The counters of a loaded state are new tensors: a graph would go on with the old ones."""
    _, trainer = trained(monkeypatch, "eager", torch.float32, Rehearsal)
    trainer.optimizer.load_state_dict(trainer.optimizer.state_dict())
    first, (ids, targets) = trainer.update.recorder, next(batches())
    with use_backend("eager"):
        trainer.step(ids, targets)
    assert trainer.update.recorder is not first


def test_a_failed_recording_is_told_and_the_step_goes_on():
    class Refuses(Rehearsal):
        def record(self, body):
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    step = Captured(lambda x: [x + 1], Refuses, lambda: None)
    for _ in range(WARMUP):
        step(torch.ones(3))
    with pytest.warns(UserWarning, match="uncaptured, recording failed: operation not permitted when"):
        assert step(torch.ones(3))[0].tolist() == [2.0] * 3
    assert step(torch.ones(3))[0].tolist() == [2.0] * 3 and "not permitted" in step.obstacle


def test_numbers_arrive_at_once_where_nothing_runs_ahead():
    late = Late(torch.device("cpu"))
    assert late.put(7, torch.tensor(2.5)) == [(7, 2.5)] and late.take() == []


@pytest.mark.parametrize("share", [True, False])
def test_what_a_recording_asks_of_cuda(share, monkeypatch):
    """Told by stand-ins: a side stream, one pool where shared, results copied out only where wanted."""
    asked = []

    class Stream:
        device = torch.device("cuda", 0)

        def __init__(self, device=None):
            self.name = "main" if device is None else "side"

        def wait_stream(self, other):
            asked.append(f"{self.name} waits for {other.name}")

    class Graph:
        def replay(self):
            asked.append("replay")

    @contextlib.contextmanager
    def graph(recorded, pool, stream, *, capture_error_mode):
        asked.append(f"record in {pool} on {stream.name}, {capture_error_mode}")
        yield

    main = Stream()
    for name, fake in {"Stream": Stream, "CUDAGraph": Graph, "graph": graph, "graph_pool_handle": lambda: "pool",
                       "stream": lambda stream: contextlib.nullcontext(), "current_stream": lambda device: main,
                       }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: asked.append(f"kept for {stream.name}"))
    make = recorder_for(torch.device("cuda", 0), share=share)
    for copies in (True, False):
        held = torch.ones(2)
        step = Captured(lambda held=held: [held], make, lambda: None, copies=copies)
        for _ in range(WARMUP + 2):
            (result,) = step()
        assert (result is held) != copies and step.obstacle is None
    once = [*["side waits for main", "main waits for side", "kept for main"] * WARMUP,
            f"record in {'pool' if share else None} on side, thread_local", "replay", "replay"]  # fmt: skip
    assert asked == 2 * once
    assert recorder_for(torch.device("cpu")) is None


def test_a_recording_that_breaks_off_names_the_first_error_and_gives_its_stream_back(monkeypatch):
    """torch's own context does neither: it raises at its end, and goes before it leaves its stream."""
    now = ["main"]

    class Stream:
        device = torch.device("cuda", 0)
        name = "side"

    @contextlib.contextmanager
    def stream(name):
        before, now[0] = now[0], name
        try:
            yield
        finally:
            now[0] = before

    @contextlib.contextmanager
    def graph(recorded, pool, side, **options):
        now[0] = side
        try:
            yield
        finally:
            raise RuntimeError("failed due to a previous error")

    for name, fake in {"Stream": lambda device: Stream(), "CUDAGraph": object, "graph": graph, "stream": stream,
                       "current_stream": lambda device: now[0]}.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, fake)

    def body():
        raise RuntimeError("operation not permitted\nCompile with")

    recorder = recorder_for(torch.device("cuda", 0))()
    monkeypatch.setattr(recorder, "warm", lambda body: [])
    step = Captured(body, lambda: recorder, lambda: None)
    for _ in range(WARMUP):
        step()
    with pytest.warns(UserWarning), pytest.raises(RuntimeError, match="not permitted"):
        step()
    assert step.obstacle == "recording failed: operation not permitted, then failed due to a previous error"
    assert now == ["main"]
