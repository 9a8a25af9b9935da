"""Steps of many sequences by a model's ops: each gets what the model alone would give it.

Mutations seen to fail: padding that is stored in a block, a length that does not count the new token, fresh rows told
by some of the chunks, angles of the first places, a grid of tables that is not made anew, weights taken as the same.
"""

import gc
import itertools
import weakref
from collections import Counter
from dataclasses import replace

import pytest
import torch

from peakgpt.engine.gpt import GPT
from peakgpt.engine.graph_capture import WARMUP
from peakgpt.engine.graph_dry_run import DryRun
from peakgpt.engine.inference import decode_graphs, stepper
from peakgpt.engine.inference.block_pool import Chunk
from peakgpt.engine.inference.engine import Engine, SamplingParams
from peakgpt.engine.inference.ops_runner import OpsRunner, runner_for
from peakgpt.engine.inference.paged_cache import PagedCache
from peakgpt.engine.inference.paged_runner import PagedRunner
from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.model.relative_positions import RELATIVE
from peakgpt.kernels.core.dispatch import use_backend

SIZES = {"n_layer": 2, "n_embd": 32, "n_head": 4, "block_size": 200, "vocab_size": 97}
MODELS = {
    "gpt2": {},
    "opt": {"position_offset": 2, "residual": "post_norm", "word_dim": 16, "activation": "relu"},
    "neox": {"residual": "parallel_two_norms", "position": "rotary", "rotary_dim": 4, "tied_head": False},
    "gptj": {"residual": "parallel", "position": "rotary", "rotary_dim": 6, "rotary_interleaved": True,
             "tied_head": False, "head_bias": True},
    "neo": {"windows": (None, 70), "n_kv_head": 2, "attention_scale": 1.0},
    "bloom": {"position": "alibi", "embedding_norm": True},
    "palm": {"residual": "parallel", "position": "rotary", "n_kv_head": 1, "norm": "rms", "gated_mlp": True,
             "activation": "silu", "bias": False, "logit_scale": 0.125},
    "glam": {"experts": 4, "experts_per_token": 2, "experts_every": 1},
    "transformer-xl": {"position": "transformer_xl"},  # one text after the other
}  # fmt: skip


def model_of(name, **changes):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SIZES, **MODELS[name], **changes}))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def chatty(name):
    """Whose greedy text is not one token for ever, and where no two tokens are nearly as likely."""
    model = model_of(name)
    for parameter in model.parameters():
        parameter.data *= 3
    return model


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_prompts_in_pieces_beside_each_other_and_decoding(name):
    """Three texts of which some grow by chunks, some by a token, in blocks that lie anywhere; then all by a token."""
    model = model_of(name)
    texts = torch.randint(97, (3, 140))
    expected = model(texts)
    with use_backend("eager"):
        runner = runner_for(model, 9)
    assert type(runner) is (OpsRunner if model.config.position in RELATIVE else PagedRunner)
    tables, past = ([6, 0, 4], [2, 5, 1], [8, 3, 7]), [0, 0, 0]

    def step(counts, wanted=lambda new: new):
        live = [i for i, new in enumerate(counts) if new]
        chunks = [
            Chunk(texts[i, past[i] : past[i] + counts[i]], past[i], tables[i], wanted(counts[i])) for i in live
        ]
        got, rows = runner.step(chunks), []
        for i in live:
            past[i] += counts[i]
            rows.append(expected[i, past[i] - wanted(counts[i]) : past[i]])
        torch.testing.assert_close(got, torch.cat(rows), rtol=1e-5, atol=2e-5)

    for counts in ((70, 3, 0), (1, 66, 60), (58, 1, 5), (5, 1, 1), (1, 1, 1), (1, 1, 0), (1, 1, 1)):
        step(counts)
    step((1, 9, 2), wanted=lambda new: new // 2)


# ---- decoding as graphs, rehearsed


@pytest.fixture
def rehearsed(monkeypatch):
    monkeypatch.setattr(decode_graphs, "graph_factory", lambda device, share_memory: DryRun)


def decoding(model, batches):
    """Texts that grow by a token a step, those of each entry of `batches` together; compares all logits."""
    pytest.importorskip("triton")
    texts, past = torch.randint(97, (3, 70)), [1, 62, 5]
    with use_backend("eager"):
        expected = model(texts)
        runner = PagedRunner(model, blocks=8)
        runner.step([Chunk(texts[i, : past[i]], 0, [i, 7 - i]) for i in range(3)])
    with use_backend("gpu"):
        for live in batches:
            got = runner.step([Chunk(texts[i, past[i] : past[i] + 1], past[i], [i, 7 - i]) for i in live])
            want = torch.stack([expected[i, past[i]] for i in live])
            torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-5)
            for i in live:
                past[i] += 1
    return runner


def small(name, **changes):
    return model_of(name, n_layer=1, n_head=2, n_embd=16, **changes)


@torch.no_grad()
@pytest.mark.parametrize(("name", "changes"), [("gpt2", {}), ("gptj", {"windows": (60,)}), ("bloom", {})], ids=str)
def test_graphs_follow_growing_texts_and_changing_batches(name, changes, rehearsed):
    """The kernels interpreted; every replay must make the calls of the first one, with the same numbers."""
    runner = decoding(small(name, **changes), [(0, 1, 2), (0, 1, 2), (0, 1, 2), (2, 1, 0), (1,)])
    step = runner.graphs.steps[4]
    assert step.inputs is not None and step.obstacle is None and set(runner.graphs.steps) == {1, 4}


COUNT = itertools.count(1)


@torch.no_grad()
@pytest.mark.parametrize(
    ("planted", "message"),
    [
        (lambda rows: int(rows.lengths.max()), "calls __int__ inside a graphed function"),
        (lambda rows: rows.lengths + next(COUNT), "captured was"),
    ],
    ids=["wait", "number"],
)
def test_what_a_graph_can_not_do_is_told(planted, message, rehearsed, monkeypatch):
    was = PagedCache.attend

    def attend(self, *args, **options):
        planted(self.rows)
        return was(self, *args, **options)

    monkeypatch.setattr(PagedCache, "attend", attend)
    with pytest.raises(RuntimeError, match=message):
        decoding(small("gpt2"), [(0,)] * (WARMUP + 2))


@torch.no_grad()
def test_what_a_step_gave_outlives_the_next_step(monkeypatch):
    """A graph gives the same tensor each time."""

    class Graph(DryRun):
        def replay(self):
            self.outputs = self.outputs or [torch.empty(1, 97)]
            self.outputs[0].copy_(self.function()[0])
            return self.outputs

    monkeypatch.setattr(decode_graphs, "graph_factory", lambda device, share_memory: Graph)
    runner = PagedRunner(small("gpt2"), blocks=1)
    with use_backend("eager"):
        rows = [runner.step([Chunk([past], past, [0])]) for past in range(WARMUP + 3)]
    assert len(torch.cat(rows).unique(dim=0)) == WARMUP + 3


@torch.no_grad()
def test_runs_without_a_graph_where_recording_fails(monkeypatch):
    class Fails(DryRun):
        def capture(self, function):
            raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(decode_graphs, "graph_factory", lambda device, share_memory: Fails)
    with pytest.warns(UserWarning, match="runs uncaptured, capture failed: operation not permitted$"):
        runner = decoding(small("gpt2"), [(0,)] * (WARMUP + 2))
    assert "not permitted" in runner.graphs.steps[1].obstacle


@torch.no_grad()
@pytest.mark.parametrize(("name", "planted"), [("gpt2", False), ("palm", False), ("gpt2", True)])
def test_a_text_decodes_to_the_same_bits_beside_others_by_gpu_kernels(name, planted, monkeypatch):
    """Up to 16 texts: no kernel of the step knows how many. Planted: products that cut C by the number of rows.

    In float32, which shows an order of sums; on a GPU the kernel of few rows is for half precision only.
    """
    skinny_gemm = pytest.importorskip("peakgpt.kernels.gpu.gemm.skinny_gemm")
    monkeypatch.setattr(skinny_gemm, "MAX_ROWS", {("sm_80", "fp32"): skinny_gemm.ROWS})
    if planted:
        cut = replace(skinny_gemm.FLOAT32, SLICES=2, BLOCK_K=16)
        monkeypatch.setattr(skinny_gemm, "_tile", lambda x, outputs: skinny_gemm.FLOAT32 if len(x) == 1 else cut)
    model, texts = model_of(name, n_layer=1, n_head=2, block_size=64, vocab_size=33), torch.randint(33, (3, 4))
    past, tables = (3, 0, 0), ([2], [3], [1])
    with use_backend("gpu"):
        runner = PagedRunner(model, blocks=4)
        runner.step([Chunk(texts[0, :3], 0, tables[0], 0)])
        new = [Chunk(texts[i, p : p + 1], p, tables[i], 1) for i, p in enumerate(past)]
        alone = torch.cat([runner.step([chunk]) for chunk in new])
        assert torch.equal(runner.step(new), alone) != planted


@torch.no_grad()
def test_kernels_of_a_step(monkeypatch):
    """Nine a layer of GPT-2 and three beside them: more is no error, but a cost of every token."""
    executor = pytest.importorskip("triton.runtime.interpreter").GridExecutor
    was, launched = executor.__call__, Counter()

    def counted(self, *args, **options):
        launched[self.fn.__name__] += 1
        return was(self, *args, **options)

    monkeypatch.setattr(executor, "__call__", counted)
    runner = PagedRunner(small("gpt2").bfloat16(), blocks=2)
    with use_backend("gpu"):
        runner.step([Chunk([i], 0, [i]) for i in range(2)])
    layer = {"skinny_gemm_fwd": 4, "norm_fwd": 2, "cache_store": 1, "attention_decode_parts": 1,
             "attention_decode_merge": 1}  # fmt: skip
    assert launched == Counter(layer) + Counter(["embedding_fwd", "norm_fwd", "skinny_gemm_fwd"])


@torch.no_grad()
def test_a_cache_of_bytes():
    """By the interpreted kernels, and eager's in between; a byte is about a hundredth of what it stands for."""
    pytest.importorskip("triton")
    model, texts = small("palm"), torch.randint(97, (2, 70))
    runner = PagedRunner(model, blocks=4, cache="int8")
    for past, end, backend in ((0, 61, "eager"), (61, 66, "gpu"), (66, 69, "eager"), (69, 70, "gpu")):
        with use_backend(backend):
            got = runner.step([Chunk(texts[i, past:end], past, [i, 2 + i]) for i in range(2)])
    with use_backend("eager"):
        want = model(texts)[:, -1]
    assert 1e-5 * want.norm() < (got - want).norm() < 1e-2 * want.norm() and runner.memory.keys.dtype == torch.int8
    with use_backend("eager"):
        assert Engine(model, blocks=4, cache="int8").runner.memory.keys.dtype == torch.int8


def test_experts_are_not_recorded(rehearsed):
    runner = PagedRunner(model_of("glam"), blocks=4)
    for past in range(WARMUP + 2):
        runner.step([Chunk([past], past, [0])])
    assert "each expert" in runner.graphs.steps[1].obstacle and runner.graphs.steps[1].inputs is None


# ---- who takes it


@pytest.fixture
def by_graphs(monkeypatch):
    """As on a GPU, with the eager ops, which a rehearsal would not let read lengths."""
    monkeypatch.setattr(stepper, "has_graphs", lambda device: True)
    monkeypatch.setattr(stepper, "_memory_bytes", lambda device: 1 << 30)
    with use_backend("eager"):
        yield


@pytest.mark.parametrize("options", [{}, {"beams": 3}, {"start": torch.tensor([0, 3, 1])}], ids=str)
def test_generate_by_graphs(options, by_graphs, monkeypatch):
    model, ids = chatty("neox"), torch.randint(97, (3, 60))
    got = model.generate(ids, max_new_tokens=15, temperature=0.0, **options)
    assert len(stepper._kept[model].graphs.steps) >= 1 and len(got[:, 60:].unique()) > 9
    monkeypatch.setattr(stepper, "has_graphs", lambda device: False)
    assert torch.equal(got, model.generate(ids, max_new_tokens=15, temperature=0.0, **options))


def test_graphs_are_kept_for_one_text_at_a_time(by_graphs):
    model, ids = model_of("gpt2"), torch.randint(97, (1, 5))
    options = {"max_new_tokens": 10, "temperature": 0.0}
    alone = list(model.stream(ids, **options)), list(model.stream(ids[:, 2:], **options))
    runner = stepper._kept[model]
    model.generate(ids[:, 1:], **options)
    assert stepper._kept[model] is runner
    both = zip(model.stream(ids, **options), model.stream(ids[:, 2:], **options), strict=True)
    assert [list(text) for text in zip(*both, strict=True)] == list(alone) and alone[0] != alone[1]
    runner = stepper._kept[model]
    model.double()
    assert model.generate(ids, **options).shape == (1, 15) and stepper._kept[model] is not runner
    gone = weakref.ref(model)
    del model, runner
    gc.collect()
    assert gone() is None


def test_a_large_cache_is_not_kept(by_graphs, monkeypatch):
    monkeypatch.setattr(stepper, "_memory_bytes", lambda device: 1 << 10)
    model = model_of("gpt2")
    model.generate(torch.zeros(1, 3, dtype=torch.int64), max_new_tokens=9)
    assert model not in stepper._kept


@pytest.mark.parametrize("options", [{}, {"blocks": 9}, {"budget": 30}, {"blocks": 5, "streams": 3}], ids=str)
def test_the_engine_by_ops(options):
    """Prompts with one prefix, preempted, in chunks: greedy texts are those of one alone."""
    model = chatty("neox")
    prefix = torch.randint(97, (70,)).tolist()
    prompts = [prefix + torch.randint(97, (9 * i + 1,)).tolist() for i in range(5)]
    params = SamplingParams(temperature=0.0, max_tokens=30)
    with use_backend("eager"):
        engine = Engine(model, **options)
        texts = {engine.submit(ids, params): [] for ids in prompts}
        for output in engine.outputs():
            texts[output.request] += output.tokens
        assert isinstance(engine.runner, PagedRunner) and "eager" in engine.runner_note
        for ids, text in zip(prompts, texts.values(), strict=True):
            alone = model.generate(torch.tensor([ids]), max_new_tokens=30, temperature=0.0)
            assert alone[0, len(ids) :].tolist() == text
    assert engine.pool.free_blocks == engine.pool.blocks


@torch.no_grad()
def test_what_kernels_read_lies_on_16_bytes(monkeypatch):
    """Else Triton compiles each of them again for every combination that is met. Fails without on_16_bytes."""
    runner, seen = PagedRunner(model_of("gpt2"), blocks=8), []
    inner = PagedRunner._pass
    monkeypatch.setattr(PagedRunner, "_pass", lambda self, rows: (seen.append(rows), inner(self, rows))[1])
    for counts in ((3,), (1,), (1, 1), (5, 2, 1), (1, 1, 1, 1, 1)):
        runner.step([Chunk(range(new), 0, [i], min(new, 2)) for i, new in enumerate(counts)])
    for rows in seen:
        given = [t for t in rows if isinstance(t, torch.Tensor)]
        assert len(given) in (5, 7) and all(t.data_ptr() % 16 == 0 for t in given)


@torch.no_grad()
def test_a_runner_ends_with_its_last_user():
    """And its cache with it, which the garbage collector does not know to be large."""
    runner = PagedRunner(model_of("gpt2"), blocks=8)
    for past in range(2):
        runner.step([Chunk([1], past, [0])])
    gone = weakref.ref(runner.memory)
    gc.disable()
    try:
        del runner
        assert gone() is None
    finally:
        gc.enable()
