"""CUDA graphs of a function, tested by dry runs on a CPU: no synchronization, no captured value that changes later."""

import contextlib
import itertools

import pytest
import torch

from peakgpt.engine.gpt import GPT
from peakgpt.engine.graph_capture import WARMUP, GraphedFunction, graph_factory
from peakgpt.engine.graph_dry_run import DryRun
from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.training import trainer as trainer_module
from peakgpt.engine.training.delayed_metrics import DelayedMetrics
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


def trained(monkeypatch, backend, dtype, make_graph, recompute="none", micro_batch=None, **config):
    """Train for a few steps; returns losses, gradient norms and master weights, and the trainer."""
    monkeypatch.setattr(trainer_module, "step_graphs", lambda device: make_graph)
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
def test_a_graphed_training_step_gives_the_bits_of_the_plain_step(backend, dtype, choices, monkeypatch):
    """The eager backend tests the model's own calls of torch, the interpreted kernels those of the GPU backend.

    Mutation that makes it fail: pass lr by value, which makes a call of the second replay differ from the first.
    """
    if backend == "gpu":
        pytest.importorskip("triton")
    plain, before = trained(monkeypatch, backend, dtype, None, **choices)
    captured, after = trained(monkeypatch, backend, dtype, DryRun, **choices)
    assert after.update.inputs is not None and after.update.obstacle is None
    assert before.update.inputs is None and "CUDA" in before.update.obstacle
    for a, b in zip(plain, captured, strict=True):
        assert torch.equal(a, b)


def graphed(function):
    return GraphedFunction(function, DryRun, lambda: None)


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
def test_synchronization_in_a_graphed_function_raises(wait, name):
    step = graphed(lambda x: [wait(x)])
    for _ in range(WARMUP):
        step(torch.ones(3))
    with pytest.raises(RuntimeError, match=rf"test_graph_capture calls {name} inside a graphed function"):
        step(torch.ones(3))


def test_synchronization_in_the_backward_pass_raises():
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

    step = graphed(step)
    for _ in range(WARMUP):
        step(torch.ones(3))
    with pytest.raises(RuntimeError, match="calls __float__"):
        step(torch.ones(3))


def test_a_number_or_a_branch_that_changes_between_replays_raises():
    count = itertools.count()
    scaled = graphed(lambda x: [x * next(count)])
    branched = graphed(lambda x: [x + 1 if next(count) % 2 else x - 1])
    for step in (scaled, branched):
        for _ in range(WARMUP + 1):
            step(torch.ones(3))
        with pytest.raises(RuntimeError, match=r"call 0 of the replay is .*, expected .* as captured"):
            step(torch.ones(3))


def test_inputs_are_copied_to_the_graph_and_outputs_from_it():
    step = graphed(lambda x: [x + 1])
    results = [step(torch.full((2,), float(i)))[0] for i in range(STEPS)]
    assert [r.tolist() for r in results] == [[i + 1.0] * 2 for i in range(STEPS)]


@pytest.mark.parametrize("backend", ("gpu", None))
def test_each_replay_draws_another_dropout_mask(backend):
    """Replays advance the generator. Mutation that makes it fail: draw the seed outside of the graphed function."""
    if backend:
        pytest.importorskip("triton")
    step = graphed(lambda x: [dropout(x, p=0.5)])
    torch.manual_seed(0)
    with use_backend(backend) if backend else contextlib.nullcontext():
        first, second = [step(torch.ones(64)) for _ in range(STEPS)][-2:]
        torch.manual_seed(5)
        third = step(torch.ones(64))
        torch.manual_seed(5)
        assert torch.equal(third[0], step(torch.ones(64))[0]), "the same generator state gives the same mask"
    assert not torch.equal(first[0], second[0])


def test_inputs_of_another_shape_run_without_the_graph():
    step = graphed(lambda x: [x + 1])
    for _ in range(STEPS):
        step(torch.ones(3))
    assert step(torch.ones(2))[0].shape == (2,) and step.inputs[0].shape == (3,)


def test_a_change_of_the_captured_state_captures_again():
    state = [0]
    step = GraphedFunction(lambda x: [x + state[0]], DryRun, lambda: state[0])
    for _ in range(STEPS):
        step(torch.ones(3))
    first, state[0] = step.graph, 1
    for _ in range(STEPS):
        assert step(torch.ones(3))[0].tolist() == [2.0] * 3
    assert step.graph is not first


def test_loading_an_optimizer_state_captures_again(monkeypatch):
    """A loaded state has new step counters; the old graph would use the old ones."""
    _, trainer = trained(monkeypatch, "eager", torch.float32, DryRun)
    trainer.optimizer.load_state_dict(trainer.optimizer.state_dict())
    first, (ids, targets) = trainer.update.graph, next(batches())
    with use_backend("eager"):
        trainer.step(ids, targets)
    assert trainer.update.graph is not first


def test_a_failed_capture_warns_and_the_function_runs_normally():
    class Refuses(DryRun):
        def capture(self, function):
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    step = GraphedFunction(lambda x: [x + 1], Refuses, lambda: None)
    for _ in range(WARMUP):
        step(torch.ones(3))
    with pytest.warns(UserWarning, match="uncaptured, capture failed: operation not permitted when"):
        assert step(torch.ones(3))[0].tolist() == [2.0] * 3
    assert step(torch.ones(3))[0].tolist() == [2.0] * 3 and "not permitted" in step.obstacle


def test_delayed_metrics_are_not_delayed_on_a_cpu():
    metrics = DelayedMetrics(torch.device("cpu"))
    assert metrics.put(7, torch.tensor(2.5)) == [(7, 2.5)] and metrics.take() == []


@pytest.mark.parametrize("share", [True, False])
def test_a_capture_uses_a_side_stream_and_one_pool_if_shared(share, monkeypatch):
    """Uses fakes of torch.cuda; also: outputs are copied only if copy_outputs is set."""
    calls = []

    class Stream:
        device = torch.device("cuda", 0)

        def __init__(self, device=None):
            self.name = "main" if device is None else "side"

        def wait_stream(self, other):
            calls.append(f"{self.name} waits for {other.name}")

    class Graph:
        def replay(self):
            calls.append("replay")

    @contextlib.contextmanager
    def graph(cuda_graph, pool, stream, *, capture_error_mode):
        calls.append(f"capture in {pool} on {stream.name}, {capture_error_mode}")
        yield

    main = Stream()
    for name, fake in {"Stream": Stream, "CUDAGraph": Graph, "graph": graph, "graph_pool_handle": lambda: "pool",
                       "stream": lambda stream: contextlib.nullcontext(), "current_stream": lambda device: main,
                       }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: calls.append(f"kept for {stream.name}"))
    make = graph_factory(torch.device("cuda", 0), share_memory=share)
    for copies in (True, False):
        output = torch.ones(2)
        step = GraphedFunction(lambda output=output: [output], make, lambda: None, copy_outputs=copies)
        for _ in range(WARMUP + 2):
            (result,) = step()
        assert (result is output) != copies and step.obstacle is None
    once = [*["side waits for main", "main waits for side", "kept for main"] * WARMUP,
            f"capture in {'pool' if share else None} on side, thread_local", "replay", "replay"]  # fmt: skip
    assert calls == 2 * once
    assert graph_factory(torch.device("cpu")) is None


def test_a_failed_capture_reports_the_first_error_and_restores_the_current_stream(monkeypatch):
    """torch.cuda.graph does neither: it raises a second error at its end, before it restores the stream."""
    current = ["main"]

    class Stream:
        device = torch.device("cuda", 0)
        name = "side"

    @contextlib.contextmanager
    def stream(name):
        before, current[0] = current[0], name
        try:
            yield
        finally:
            current[0] = before

    @contextlib.contextmanager
    def graph(cuda_graph, pool, side, **options):
        current[0] = side
        try:
            yield
        finally:
            raise RuntimeError("failed due to a previous error")

    for name, fake in {"Stream": lambda device: Stream(), "CUDAGraph": object, "graph": graph, "stream": stream,
                       "current_stream": lambda device: current[0]}.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, fake)

    def body():
        raise RuntimeError("operation not permitted\nCompile with")

    graph_of_body = graph_factory(torch.device("cuda", 0))()
    monkeypatch.setattr(graph_of_body, "warm_up", lambda function: [])
    step = GraphedFunction(body, lambda: graph_of_body, lambda: None)
    for _ in range(WARMUP):
        step()
    with pytest.warns(UserWarning), pytest.raises(RuntimeError, match="not permitted"):
        step()
    assert step.obstacle == "capture failed: operation not permitted, then failed due to a previous error"
    assert current == ["main"]
