"""attention_decode on every backend: values against float64, and properties that hold bitwise.

Mutations that fail here, in eager: a window one key too wide, tables of other sequences, the wrong sign of a slope, a
missing last block. In Triton: key scales used for values, the scale of the next head, VALUE_FOLD not undone.
"""

import itertools

import pytest
import torch

from peakgpt.bench.check import FLOOR
from peakgpt.kernels.core.dispatch import load, use_backend
from peakgpt.kernels.ops.attention_decode import attention_decode
from peakgpt.kernels.ops.cache_store import quantize_heads

BACKENDS = ("eager", *(b for b in ("cpu", "gpu") if not isinstance(load(b, "attention_decode"), str)))
FUSED = BACKENDS[1:]

# lengths, queries of each sequence, H, K, D, block, parameters; "bits" = 8 gives an int8 cache
CASES = [
    ([40, 1, 17], None, 2, 2, 16, 16, {}),
    ([70, 33], None, 4, 1, 80, 1, {}),
    ([130, 3, 0, 65], [2, 3, 0, 1], 4, 2, 24, 32, {}),
    ([5, 2], [7, 2], 2, 2, 64, 16, {}),
    ([100, 31], [3, 1], 2, 1, 16, 128, {"window": 20}),
    ([50], [5], 4, 2, 8, 16, {"alibi": [0.5, -0.25, 0.125, 1.0], "scale": 0.4}),
    ([600, 529], [1, 18], 2, 2, 16, 16, {"window": 520}),
    ([130, 3, 0, 65], [2, 3, 0, 1], 4, 2, 24, 32, {"bits": 8}),
    ([60, 31], [18, 1], 2, 1, 16, 1, {"bits": 8, "window": 40, "alibi": [0.25, -0.125]}),
    ([40, 1, 17], None, 4, 2, 16, 16, {"softcap": 2.0, "sinks": [2.0, 0.5, -1.0, 300.0]}),
    ([600, 31], [3, 18], 2, 1, 16, 1, {"bits": 8, "window": 520, "alibi": [0.25, 0.125], "softcap": 2.0}),
    ([5, 130], [7, 2], 2, 2, 24, 16, {"sinks": [2.0, 3.0], "window": 20}),
    ([1100], None, 16, 1, 16, 64, {}),
]
IDS = ["-".join(map(str, (*case[:6], *case[6]))).replace(" ", "") for case in CASES]


def draw(case, dtype=torch.float32):
    """The tensors and parameters of a call. Blocks are in random order, and all cache values without a key are NaN."""
    lengths, counts, heads, kv_heads, head_dim, block, params = case
    generator = torch.Generator().manual_seed(sum(lengths))
    blocks = [-(-length // block) for length in lengths]
    order = iter((torch.randperm(sum(blocks), generator=generator) + 1).tolist())
    tables = torch.full((len(lengths), max(blocks)), -7, dtype=torch.int32)
    caches = torch.full((2, sum(blocks) + 2, block, kv_heads, head_dim), torch.nan)
    for b, length in enumerate(lengths):
        for j in range(length):
            if j % block == 0:
                tables[b, j // block] = next(order)
            caches[:, tables[b, j // block], j % block] = torch.randn(2, kv_heads, head_dim, generator=generator)
    starts = None if counts is None else torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32)
    q = torch.randn(sum(counts or [1] * len(lengths)), heads, head_dim, generator=generator)
    params = {n: torch.tensor(v) if isinstance(v, list) else v for n, v in params.items()}
    params["cu_queries"], caches = starts, caches.to(dtype)
    if params.pop("bits", None):
        caches, (params["k_scale"], params["v_scale"]) = quantize_heads(caches)
    return [q.to(dtype), *caches, tables, torch.tensor(lengths, dtype=torch.int32)], params


def scales_of(params):
    return [params[name] for name in ("k_scale", "v_scale") if name in params]


def reference(tensors, params):
    """attention_decode in float64, one query and head at a time."""
    q, k_cache, v_cache, tables, lengths = tensors
    if scales := scales_of(params):
        k_cache, v_cache = (c * s.double()[..., None] for c, s in zip((k_cache, v_cache), scales, strict=True))
    starts = params["cu_queries"]
    starts = list(range(len(lengths) + 1)) if starts is None else starts.tolist()
    out, group = torch.zeros_like(q, dtype=torch.float64), q.shape[1] // k_cache.shape[2]
    scale = params.get("scale") or q.shape[2] ** -0.5
    for b, (begin, end) in enumerate(itertools.pairwise(starts)):
        for n, h in itertools.product(range(begin, end), range(q.shape[1])):
            p = lengths[b].item() - (end - n)
            keys = range(max(0, p + 1 - (params.get("window") or p + 1)), p + 1)
            if not len(keys):
                continue
            entries = [(tables[b, j // k_cache.shape[1]].item(), j % k_cache.shape[1], h // group) for j in keys]
            k, v = (torch.stack([cache[i].double() for i in entries]) for cache in (k_cache, v_cache))
            s = k @ q[n, h].double() * scale
            if cap := params.get("softcap"):
                s = cap * (s / cap).tanh()
            if params.get("alibi") is not None:
                s += params["alibi"][h].double() * (torch.tensor(list(keys)) - p)
            if params.get("sinks") is not None:
                s = torch.cat((s, params["sinks"][h : h + 1].double()))
            out[n, h] = s.softmax(0)[: len(v)] @ v
    return out


def call(backend, tensors, params):
    with use_backend(backend):
        return attention_decode(*tensors, **params)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_values_are_within_twice_eagers_error_against_float64(case, backend, dtype):
    tensors, params = draw(case, dtype)
    truth, torchs, ours = reference(tensors, params), call("eager", tensors, params), call(backend, tensors, params)
    error, allowed = ((y.double() - truth).abs().max().item() for y in (ours, torchs))
    allowed = FLOOR[dtype] if backend == "eager" else allowed  # eager is not compared with itself
    assert ours.dtype == dtype and error <= 2 * allowed + 2 * FLOOR[dtype] * truth.abs().max().item()


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_bits_of_a_query_do_not_depend_on_batch_chunking_or_block_location(case, backend):
    """Alone or in a batch, with other queries of its sequence or after them, and for any order of the blocks."""
    tensors, params = draw(case)
    q, k_cache, v_cache, tables, lengths = tensors
    whole = call(backend, tensors, params)
    assert torch.equal(whole, call(backend, tensors, params)), "not repeatable"
    starts = params["cu_queries"]
    starts = list(range(len(lengths) + 1)) if starts is None else starts.tolist()
    alone = params | {"cu_queries": None}
    for b, (begin, end) in enumerate(itertools.pairwise(starts)):
        for n in {begin, (begin + end) // 2, end - 1} if begin < end else ():
            length = (lengths[b] - (end - n - 1)).clamp(min=0)[None]
            one = call(backend, [q[n : n + 1], k_cache, v_cache, tables[b : b + 1], length], alone)
            assert torch.equal(one[0], whole[n]), (b, n)
    order = torch.randperm(len(k_cache))
    new_block = order.argsort().int()
    moved = torch.where(tables < 0, tables, new_block[tables.clamp(min=0).long()])
    scales = {name: params[name][order] for name in ("k_scale", "v_scale") if name in params}
    assert torch.equal(whole, call(backend, [q, k_cache[order], v_cache[order], moved, lengths], params | scales))


@pytest.mark.skipif("gpu" not in BACKENDS, reason="no Triton kernels")
def test_another_key_split_changes_the_bits(monkeypatch):
    """Shows that the test above would fail if the split depended on the batch."""
    tensors, params = draw(CASES[-1])
    before = call("gpu", tensors, params)
    monkeypatch.setattr(load("gpu", "attention_decode"), "SPLIT", 128)
    assert not torch.equal(before, call("gpu", tensors, params)), "the bits do not depend on the split"


@pytest.mark.skipif("gpu" not in BACKENDS, reason="no Triton kernels")
def test_bits_do_not_depend_on_the_workspace_size(monkeypatch):
    tensors, params = draw(CASES[2])
    before = call("gpu", tensors, params)
    monkeypatch.setattr(load("gpu", "attention_decode"), "WORKSPACE_BYTES", 1)
    assert torch.equal(before, call("gpu", tensors, params))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.double(), "takes float32, bfloat16 or float16, got torch.float64"),
        (lambda t: t.repeat(*[1] * (t.dim() - 1), 17), "takes head widths 1 to 256, got 272"),
        (lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2), "contiguous last axis"),
    ],
)
@pytest.mark.skipif("gpu" not in BACKENDS, reason="no Triton kernels")
def test_gpu_objects_to_unsupported_tensors_with_a_reason(change, reason):
    (q, *caches, tables, lengths), params = draw(CASES[0])
    with pytest.raises(NotImplementedError, match=reason):
        call("gpu", [change(q), *map(change, caches), tables, lengths], params)


@pytest.mark.parametrize("backend", BACKENDS)
def test_contiguous_strided_cache_as_one_block_per_sequence_gives_the_same_bits(backend):
    """Here the caches are (B, K, S, D) views between keys and values of other layers."""
    tensors, params = draw(([70, 33], None, 4, 2, 16, 16, {}))
    q, k_cache, v_cache, tables, lengths = tensors
    both = torch.full((2, 3, 2, 2, 90, 16), torch.nan)
    for cache, layer in zip((k_cache, v_cache), both[:, 1], strict=True):
        for b, length in enumerate(lengths.tolist()):
            used = tables[b, : -(-length // 16)].long()
            layer[b, :, :length] = cache[used].flatten(0, 1)[:length].transpose(0, 1)
    flat = [q, *(t.transpose(1, 2) for t in both[:, 1]), torch.arange(2, dtype=torch.int32)[:, None], lengths]
    assert torch.equal(call(backend, flat, params), call(backend, tensors, params))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", [([], None, 2, 2, 16, 16, {}), ([7], [0], 2, 2, 16, 16, {})], ids=("B=0", "N=0"))
def test_empty_batch_and_zero_queries_give_an_empty_result(case, backend):
    lengths, counts, heads, kv_heads, head_dim, block, _ = case
    caches = torch.zeros(2, 3, block, kv_heads, head_dim)
    tables = torch.zeros(len(lengths), 1, dtype=torch.int32)
    params = {"cu_queries": None if counts is None else torch.tensor([0, *counts], dtype=torch.int32)}
    tensors = [torch.zeros(0, heads, head_dim), *caches, tables, torch.tensor(lengths, dtype=torch.int32)]
    assert call(backend, tensors, params).shape == (0, heads, head_dim)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_with_fullgraph(backend):
    """Fails if tracing reads the lengths. Eager reads them, so it is not forced here but chosen by dispatch."""
    tensors, params = draw(CASES[2])
    torch._dynamo.reset()
    compiled = torch.compile(lambda *t: attention_decode(*t, **params), fullgraph=True, backend="aot_eager")
    expected = call(backend, tensors, params)
    if backend == "eager":
        compiled_result = compiled(*tensors)
    else:
        with use_backend(backend):
            compiled_result = compiled(*tensors)
    torch.testing.assert_close(compiled_result, expected, rtol=1e-5, atol=1e-6)


def test_input_that_requires_grad_raises():
    tensors, params = draw(CASES[0])
    tensors[0].requires_grad_()
    with pytest.raises(NotImplementedError, match=r"an input requires grad but .* expected a call under torch.no_grad"):
        attention_decode(*tensors, **params)
    with torch.no_grad():
        assert not attention_decode(*tensors, **params).requires_grad


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("q", lambda t: t[:2], r"q has shape \(2, 2, 16\), expected \(3, any, any\)"),
        ("q", lambda t: t.bfloat16(), r"k_cache has dtype torch.float32, expected q's dtype torch.bfloat16"),
        ("q", lambda t: t[:, [0, 1, 1]], r"3 query heads over 2 key heads"),
        ("v_cache", lambda t: t[1:], r"v_cache has shape"),
        ("block_tables", lambda t: t.long(), r"block_tables has dtype torch.int64, expected int32"),
        ("block_tables", lambda t: t[:2], r"lengths has shape \(3,\), expected \(2\)"),
        ("block_tables", lambda t: t + 9, r"block_tables has values 10 to 15, expected 0 to 7"),
        ("lengths", lambda t: t + 9, r"lengths has values 10 to 49, expected 0 to 48: 3 blocks of 16"),
        ("lengths", lambda t: t - 9, r"lengths has values -8 to 31, expected 0 to 48"),
    ],
)
def test_invalid_tensors_raise_got_and_expected(name, change, message):
    tensors, params = draw(CASES[0])
    index = attention_decode.tensor_names.index(name)
    tensors[index] = change(tensors[index])
    with pytest.raises(ValueError, match=message):
        attention_decode(*tensors, **params)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"window": 0}, r"window is 0, expected at least 1"),
        ({"alibi": torch.ones(3)}, r"alibi has shape \(3,\), expected \(2\)"),
        ({"softcap": 0.0}, r"softcap is 0.0, expected a finite number above 0"),
        ({"sinks": torch.ones(3)}, r"sinks has shape \(3,\), expected \(2\)"),
        ({"cu_queries": torch.tensor([0, 1, 3], dtype=torch.int32)}, r"cu_queries has shape \(3,\), expected \(4\)"),
        ({"cu_queries": torch.tensor([0, 2, 1, 3], dtype=torch.int32)}, r"expected to ascend from 0 to 3"),
        ({"k_scale": torch.ones(8, 16, 2)}, r"got k_scale without v_scale, expected both or neither"),
        ({"k_scale": torch.ones(8, 16, 2), "v_scale": torch.ones(8, 16, 2)}, r"k_cache is torch.float32 on cpu, exp"),
    ],
)
def test_invalid_parameters_raise_got_and_expected(params, message):
    tensors, _ = draw(CASES[0])
    with pytest.raises(ValueError, match=message):
        attention_decode(*tensors, **params)
