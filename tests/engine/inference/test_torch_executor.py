"""TorchExecutor: a step of many sequences gives each the logits of the model alone.

Mutations that these tests detect: padding stored in a block; a length without the new token; `is_prefill` decided by
some of the chunks; rotary angles of the first positions; stale padded block tables; weights assumed unchanged.
"""

import gc
import itertools
import weakref
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from peakgpt.engine.checkpoint.quantized.weights import load_quantized, quantize_state
from peakgpt.engine.gpt import GPT
from peakgpt.engine.graph_capture import WARMUP
from peakgpt.engine.graph_dry_run import DryRun
from peakgpt.engine.inference import decode_graphs, executor
from peakgpt.engine.inference.chunk import Chunk
from peakgpt.engine.inference.engine import Engine, SamplingParams
from peakgpt.engine.inference.executor import make_executor
from peakgpt.engine.inference.paged_attention import PagedAttention
from peakgpt.engine.inference.torch_executor import TorchExecutor
from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.model.quantized_linear import Format
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
    "gemma2": {"attention_softcap": 1.5, "attention_scale": 0.4, "position": "rotary", "windows": (70, None),
               "n_kv_head": 2},
    "gpt-oss": {"attention_sinks": True, "position": "rotary", "windows": (70, None), "n_kv_head": 2, "experts": 4,
                "experts_every": 1, "gated_experts": True, "gated_mlp": True, "activation": "clamped_swiglu",
                "router_bias": True},
    "norms of heads": {"position": "rotary", "n_kv_head": 2, "norm": "rms", "norm_offset": 1.0, "qk_norm": "head",
                       "bias": False, "logit_softcap": 2.0},
    "norms of all heads": {"position": "rotary", "rotary_interleaved": True, "qk_norm": "full"},
    "two bases": {"residual": "sandwich_norm", "position": "rotary", "windows": (70, None), "local_rotary_base": 100.0,
                  "embedding_scale": 5.5, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "output norm": {"residual": "output_norm", "position": "rotary", "rotary_layers": (True, False)},
    "glam": {"experts": 4, "experts_per_token": 2, "experts_every": 1},
    "transformer-xl": {"position": "transformer_xl"},  # runs one sequence at a time
}  # fmt: skip


def model_of(name, **changes):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SIZES, **MODELS[name], **changes}))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def varied_model(name):
    """A model whose greedy output does not repeat one token, and whose best two tokens are never nearly equal."""
    model = model_of(name)
    for parameter in model.parameters():
        parameter.data *= 3
    return model


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_chunked_prompts_and_decoding_equal_one_forward_pass(name):
    """Three sequences grow by chunks and by single tokens, in blocks in any order; then all by single tokens."""
    model = model_of(name)
    sequences = torch.randint(97, (3, 140))
    expected = model(sequences)
    with use_backend("eager"):
        model_executor = make_executor(model, 9)
    assert type(model_executor) is TorchExecutor and model_executor.is_one_by_one == (model.config.position in RELATIVE)
    tables, past = ([6, 0, 4], [2, 5, 1], [8, 3, 7]), [0, 0, 0]

    def step(counts, num_logits=lambda new: new):
        live = [i for i, new in enumerate(counts) if new]
        chunks = [
            Chunk(sequences[i, past[i] : past[i] + counts[i]], past[i], tables[i], num_logits(counts[i])) for i in live
        ]
        got, rows = model_executor.step(chunks), []
        for i in live:
            past[i] += counts[i]
            rows.append(expected[i, past[i] - num_logits(counts[i]) : past[i]])
        torch.testing.assert_close(got, torch.cat(rows), rtol=1e-5, atol=2e-5)

    for counts in ((70, 3, 0), (1, 66, 60), (58, 1, 5), (5, 1, 1), (1, 1, 1), (1, 1, 0), (1, 1, 1)):
        step(counts)
    step((1, 9, 2), num_logits=lambda new: new // 2)


# ---- decoding as CUDA graphs, tested by dry runs


@pytest.fixture
def dry_run(monkeypatch):
    monkeypatch.setattr(decode_graphs, "graph_factory", lambda device, share_memory: DryRun)


def decoding(model, batches):
    """Decode the sequences of each entry of `batches` together, one token a step, and compare all logits."""
    pytest.importorskip("triton")
    sequences, past = torch.randint(97, (3, 70)), [1, 62, 5]
    with use_backend("eager"):
        expected = model(sequences)
        model_executor = TorchExecutor(model, 8)
        model_executor.step([Chunk(sequences[i, : past[i]], 0, [i, 7 - i]) for i in range(3)])
    with use_backend("gpu"):
        for live in batches:
            got = model_executor.step([Chunk(sequences[i, past[i] : past[i] + 1], past[i], [i, 7 - i]) for i in live])
            rows = torch.stack([expected[i, past[i]] for i in live])
            torch.testing.assert_close(got, rows, rtol=1e-5, atol=2e-5)
            for i in live:
                past[i] += 1
    return model_executor


def small(name, **changes):
    return model_of(name, n_layer=1, n_head=2, n_embd=16, **changes)


@torch.no_grad()
@pytest.mark.parametrize(("name", "changes"), [
    ("gpt2", {}), ("gptj", {"windows": (60,)}), ("bloom", {}), ("glam", {}),
], ids=str)  # fmt: skip
def test_decode_graphs_follow_growing_sequences_and_changing_batches(name, changes, dry_run):
    """With interpreted kernels: every replay must make the calls of the capture, with the same numbers."""
    model_executor = decoding(small(name, **changes), [(0, 1, 2), (0, 1, 2), (0, 1, 2), (2, 1, 0), (1,)])
    step = model_executor.graphs.steps[4]
    assert step.inputs is not None and step.obstacle is None and set(model_executor.graphs.steps) == {1, 4}


COUNT = itertools.count(1)


@torch.no_grad()
@pytest.mark.parametrize(
    ("planted", "message"),
    [
        (lambda rows: int(rows.lengths.max()), "calls __int__ inside a graphed function"),
        (lambda rows: rows.lengths + next(COUNT), "expected .* as captured"),
    ],
    ids=["wait", "number"],
)
def test_dry_run_rejects_steps_that_a_graph_cannot_capture(planted, message, dry_run, monkeypatch):
    original = PagedAttention.attend

    def attend(self, *args, **options):
        planted(self.batch)
        return original(self, *args, **options)

    monkeypatch.setattr(PagedAttention, "attend", attend)
    with pytest.raises(RuntimeError, match=message):
        decoding(small("gpt2"), [(0,)] * (WARMUP + 2))


@torch.no_grad()
def test_logits_outlive_the_next_step(monkeypatch):
    """A graph returns the same tensor each time, so the executor must copy."""

    class Graph(DryRun):
        def replay(self):
            self.outputs = self.outputs or [torch.empty(1, 97)]
            self.outputs[0].copy_(self.function()[0])
            return self.outputs

    monkeypatch.setattr(decode_graphs, "graph_factory", lambda device, share_memory: Graph)
    model_executor = TorchExecutor(small("gpt2"), 1)
    with use_backend("eager"):
        rows = [model_executor.step([Chunk([past], past, [0])]) for past in range(WARMUP + 3)]
    assert len(torch.cat(rows).unique(dim=0)) == WARMUP + 3


@torch.no_grad()
def test_failed_capture_falls_back_to_running_the_ops(monkeypatch):
    class Fails(DryRun):
        def capture(self, function):
            raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(decode_graphs, "graph_factory", lambda device, share_memory: Fails)
    with pytest.warns(UserWarning, match="runs uncaptured, capture failed: operation not permitted$"):
        model_executor = decoding(small("gpt2"), [(0,)] * (WARMUP + 2))
    assert "not permitted" in model_executor.graphs.steps[1].obstacle


@torch.no_grad()
@pytest.mark.parametrize(("name", "planted"), [("gpt2", False), ("palm", False), ("gpt2", True)])
def test_gpu_kernels_decode_a_sequence_to_the_same_bits_in_any_batch(name, planted, monkeypatch):
    """Up to 16 sequences no kernel depends on the batch size. Planted: products that split C by the number of rows.

    In float32, which shows an order of sums; on a GPU the skinny GEMM is for half precision only.
    """
    skinny_gemm = pytest.importorskip("peakgpt.kernels.gpu.gemm.skinny_gemm")
    monkeypatch.setattr(skinny_gemm, "MAX_ROWS", {("sm_80", "fp32"): skinny_gemm.ROWS})
    if planted:
        cut = replace(skinny_gemm.FLOAT32, SLICES=2, BLOCK_K=16)
        monkeypatch.setattr(skinny_gemm, "_tile", lambda x, outputs: skinny_gemm.FLOAT32 if len(x) == 1 else cut)
    model, sequences = model_of(name, n_layer=1, n_head=2, block_size=64, vocab_size=33), torch.randint(33, (3, 4))
    past, tables = (3, 0, 0), ([2], [3], [1])
    with use_backend("gpu"):
        model_executor = TorchExecutor(model, 4)
        model_executor.step([Chunk(sequences[0, :3], 0, tables[0], 0)])
        new = [Chunk(sequences[i, p : p + 1], p, tables[i], 1) for i, p in enumerate(past)]
        alone = torch.cat([model_executor.step([chunk]) for chunk in new])
        assert torch.equal(model_executor.step(new), alone) != planted


@torch.no_grad()
def test_number_of_kernels_of_a_decoding_step(monkeypatch):
    """Nine kernels a layer of GPT-2, and three more: an additional one would slow down every token."""
    executor = pytest.importorskip("triton.runtime.interpreter").GridExecutor
    original, launched = executor.__call__, Counter()

    def counted(self, *args, **options):
        launched[self.fn.__name__] += 1
        return original(self, *args, **options)

    monkeypatch.setattr(executor, "__call__", counted)
    model_executor = TorchExecutor(small("gpt2").bfloat16(), 2)
    with use_backend("gpu"):
        model_executor.step([Chunk([i], 0, [i]) for i in range(2)])
    layer = {"skinny_gemm_fwd": 4, "norm_fwd": 2, "cache_store": 1, "attention_decode_parts": 1,
             "attention_decode_merge": 1}  # fmt: skip
    assert launched == Counter(layer) + Counter(["embedding_fwd", "norm_fwd", "skinny_gemm_fwd"])


@torch.no_grad()
def test_int8_cache_is_near_the_float_cache():
    """With interpreted and eager kernels in turn; the rounding error of a byte is about 1 %."""
    pytest.importorskip("triton")
    model, sequences = small("palm"), torch.randint(97, (2, 70))
    model_executor = TorchExecutor(model, 4, cache_dtype="int8")
    for past, end, backend in ((0, 61, "eager"), (61, 66, "gpu"), (66, 69, "eager"), (69, 70, "gpu")):
        with use_backend(backend):
            got = model_executor.step([Chunk(sequences[i, past:end], past, [i, 2 + i]) for i in range(2)])
    with use_backend("eager"):
        expected = model(sequences)[:, -1]
    assert (
        1e-5 * expected.norm() < (got - expected).norm() < 1e-2 * expected.norm()
        and model_executor.kv_cache.keys.dtype == torch.int8
    )
    with use_backend("eager"):
        assert Engine(model, blocks=4, cache="int8").executor.kv_cache.keys.dtype == torch.int8


def test_quantized_experts_are_not_captured(dry_run):
    """The host reads how many rows each of them has; float experts are captured, see the decode graphs above."""
    model, form = model_of("glam"), Format(8)
    quantized = load_quantized(GPT(model.config), quantize_state(model.state_dict(), form), form, torch.float32)
    model_executor = TorchExecutor(quantized, 4)
    for past in range(WARMUP + 2):
        model_executor.step([Chunk([past], past, [0])])
    assert "each expert" in model_executor.graphs.steps[1].obstacle and model_executor.graphs.steps[1].inputs is None
    assert TorchExecutor(model, 4).graphs.obstacle is None


# ---- generate and Engine on a TorchExecutor


@pytest.fixture
def use_graphs(monkeypatch):
    """Choose as on a GPU, with eager ops; no dry run, because eager ops read the lengths."""
    monkeypatch.setattr(executor, "has_graphs", lambda device: True)
    monkeypatch.setattr(executor, "_memory_bytes", lambda device: 1 << 30)
    with use_backend("eager"):
        yield


def left_padding(*starts):
    """The mask of prompts of 60 tokens."""
    return (torch.arange(60) >= torch.tensor(starts)[:, None]).long()


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"attention_mask": left_padding(0, 3, 1)}], ids=str)
def test_generate_with_graphs_equals_generate_without(options, use_graphs, monkeypatch):
    model, ids = varied_model("neox"), torch.randint(97, (3, 60))
    got = model.generate(ids, max_new_tokens=15, **options)
    assert len(executor._idle_executors[model].graphs.steps) >= 1 and len(got[:, 60:].unique()) > 9
    monkeypatch.setattr(executor, "has_graphs", lambda device: False)
    assert torch.equal(got, model.generate(ids, max_new_tokens=15, **options))


def test_graphs_are_reused_by_one_generate_call_at_a_time(use_graphs):
    model, ids = model_of("gpt2"), torch.randint(97, (1, 5))
    options = {"max_new_tokens": 10}
    alone = list(model.stream(ids, **options)), list(model.stream(ids[:, 2:], **options))
    model_executor = executor._idle_executors[model]
    model.generate(ids[:, 1:], **options)
    assert executor._idle_executors[model] is model_executor
    both = zip(model.stream(ids, **options), model.stream(ids[:, 2:], **options), strict=True)
    assert [list(tokens) for tokens in zip(*both, strict=True)] == list(alone) and alone[0] != alone[1]
    model_executor = executor._idle_executors[model]
    model.double()
    assert model.generate(ids, **options).shape == (1, 15) and executor._idle_executors[model] is not model_executor
    reference = weakref.ref(model)
    del model, model_executor
    gc.collect()
    assert reference() is None


def test_large_cache_is_freed_after_generate(use_graphs, monkeypatch):
    monkeypatch.setattr(executor, "_memory_bytes", lambda device: 1 << 10)
    model = model_of("gpt2")
    model.generate(torch.zeros(1, 3, dtype=torch.int64), max_new_tokens=9)
    assert model not in executor._idle_executors


@pytest.mark.parametrize("options", [{}, {"blocks": 9}, {"budget": 30}, {"blocks": 5, "streams": 3}], ids=str)
def test_engine_on_torch_ops_gives_the_greedy_output_of_generate(options):
    """Prompts with a common prefix, preempted and chunked: greedy outputs equal those of each alone."""
    model = varied_model("neox")
    prefix = torch.randint(97, (70,)).tolist()
    prompts = [prefix + torch.randint(97, (9 * i + 1,)).tolist() for i in range(5)]
    params = SamplingParams(temperature=0.0, max_tokens=30)
    with use_backend("eager"):
        engine = Engine(model, **options)
        outputs = {engine.submit(ids, params): [] for ids in prompts}
        for output in engine.outputs():
            outputs[output.request_id] += output.token_ids
        assert isinstance(engine.executor, TorchExecutor) and "eager" in engine.executor_note
        for ids, tokens in zip(prompts, outputs.values(), strict=True):
            alone = model.generate(torch.tensor([ids]), max_new_tokens=30)
            assert alone[0, len(ids) :].tolist() == tokens
    assert engine.pool.free_blocks == engine.pool.num_blocks


@torch.no_grad()
def test_integers_of_a_step_are_16_byte_aligned(monkeypatch):
    """Otherwise Triton compiles a kernel again for each combination of alignments. Fails without align_int32."""
    model_executor, seen = TorchExecutor(model_of("gpt2"), 8), []
    inner = TorchExecutor._forward
    monkeypatch.setattr(TorchExecutor, "_forward", lambda self, rows: (seen.append(rows), inner(self, rows))[1])
    for counts in ((3,), (1,), (1, 1), (5, 2, 1), (1, 1, 1, 1, 1)):
        model_executor.step([Chunk(range(new), 0, [i], min(new, 2)) for i, new in enumerate(counts)])
    for rows in seen:
        given = [t for t in rows if isinstance(t, torch.Tensor)]
        assert len(given) in (5, 7) and all(t.data_ptr() % 16 == 0 for t in given)


@torch.no_grad()
def test_executor_and_cache_are_freed_with_their_last_reference():
    """The garbage collector does not know how large the cache is, so a reference cycle would keep it too long."""
    model_executor = TorchExecutor(model_of("gpt2"), 8)
    for past in range(2):
        model_executor.step([Chunk([1], past, [0])])
    reference = weakref.ref(model_executor.kv_cache)
    gc.disable()
    try:
        del model_executor
        assert reference() is None
    finally:
        gc.enable()


@torch.no_grad()
@pytest.mark.parametrize("max_batch", [256, 1])
@pytest.mark.parametrize("name", ["gpt2", "transformer-xl"])
def test_decode_gives_the_logits_of_step(name, max_batch, monkeypatch):
    """Also for models and batches without graphs."""
    monkeypatch.setattr("peakgpt.engine.inference.torch_executor.MAX_BATCH", max_batch)
    model_executor, ids = TorchExecutor(model_of(name), 7), torch.randint(97, (2, 71))
    tables, past = ([6, 0], [2, 5]), (70, 3)
    with use_backend("eager"):
        model_executor.step([Chunk(ids[i, :p], 0, tables[i], 0) for i, p in enumerate(past)])
        new = torch.stack([ids[i, p] for i, p in enumerate(past)])
        padded = np.zeros((2, model_executor.graphs.width), dtype=np.int32)
        padded[:, :2] = tables
        expected = model_executor.step([Chunk(new[i : i + 1], p, tables[i]) for i, p in enumerate(past)])
        got = model_executor.decode(new, np.array(past), padded)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-5)
