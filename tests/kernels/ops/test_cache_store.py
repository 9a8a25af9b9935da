"""cache_store on every backend: the stored values, their quantization and their positions.

Mutations that fail here, in Triton: multiplication by a reciprocal instead of division, a maximum that drops NaN,
values stored with the strides of the keys, negative slots stored.
"""

import pytest
import torch

from peakgpt.kernels.core.dispatch import load, use_backend
from peakgpt.kernels.ops.cache_store import cache_store, quantize_heads

BACKENDS = ("eager", *(b for b in ("cpu", "gpu") if not isinstance(load(b, "cache_store"), str)))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def draw(dtype, bits, tokens=5, heads=3, head_dim=20, blocks=3, block=4):
    """Return the tensors of a call. Keys and values are slices of a packed projection. Caches and scales are all 7."""
    torch.manual_seed(tokens)
    both = (3 * torch.randn(2, tokens, 2 * heads, head_dim) + 1).to(dtype)
    caches = torch.full((2, heads, blocks, block, head_dim), 7, dtype=torch.int8 if bits else dtype)
    scales = torch.full((2, blocks, block, heads), 7.0) if bits else []
    slots = torch.randperm(blocks * block)[:tokens]
    return [*both[:, :, heads:], *caches.permute(0, 2, 3, 1, 4), slots, *scales]


def stored(backend, tensors):
    """Run the op. Return the caches and scales, flat over blocks and positions."""
    k, v, *caches, slots = tensors[:5]
    with use_backend(backend):
        cache_store(k, v, *caches, slots, *tensors[5:])
    return [t.flatten(0, 1) for t in (*caches, *tensors[5:])]


@pytest.mark.parametrize("bits", (None, 8))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_stores_the_exact_values_and_writes_nothing_else(backend, dtype, bits):
    tensors = draw(dtype, bits)
    k, v, _, _, slots = tensors[:5]
    slots[-1] = -3
    results = stored(backend, tensors)
    (kq, ks), (vq, vs) = quantize_heads(k), quantize_heads(v)
    for values, got in zip((k, v) if bits is None else (kq, vq, ks, vs), results, strict=True):
        expected = torch.full_like(got, 7)
        expected[slots[slots >= 0]] = values[slots >= 0]
        assert torch.equal(got, expected)


def test_int8_values_are_the_nearest():
    x = torch.randn(50, 64, dtype=torch.float64)
    q, scale = quantize_heads(x)
    assert q.abs().amax(-1).eq(127).all() and scale.dtype == torch.float64
    assert ((q * scale[:, None] - x).abs() <= scale[:, None] * (0.5 + 1e-9)).all()
    q, scale = quantize_heads(torch.tensor([[127.0, 2.5, -3.5, 0.49]]).bfloat16())
    assert q.tolist() == [[127, 2, -4, 0]] and scale.tolist() == [1.0] and scale.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # from numpy in Triton's interpreter
@pytest.mark.parametrize("backend", BACKENDS)
def test_int8_of_zeros_tiny_values_and_non_finite_heads(backend):
    """Zeros stay zeros, values too small for a scale become zero, and a head with an infinity or NaN reads as NaN."""
    tensors = draw(torch.float32, 8, tokens=4, heads=1)
    k, slots = tensors[0], tensors[4].tolist()
    k[0], k[1] = 0.0, 1e-37
    k[2, 0, 3], k[3, 0, 5] = torch.inf, torch.nan
    q, _, scale, _ = stored(backend, tensors)
    assert not q[slots[:2]].any() and not scale[slots[:2]].any()
    assert (q[slots[2:]] * scale[slots[2:], :, None]).isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_round_to_the_same_value_on_every_backend(backend):
    """bfloat16 has many ties: half of the largest value is 63.5 steps if the scale is exact, else nearly that."""
    torch.manual_seed(0)
    tensors = draw(torch.bfloat16, 8, tokens=96, heads=1, head_dim=64, blocks=24)
    k = tensors[0]
    k.copy_(torch.randint(1, 256, k.shape))
    k[:, :, 1] = k.float().amax(-1).bfloat16() / 2
    results = stored(backend, tensors)
    for got, expected in zip((results[0], results[2]), quantize_heads(k), strict=True):
        assert torch.equal(got[tensors[4]], expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_tokens_write_nothing(backend):
    tensors = draw(torch.float32, 8, tokens=0)
    assert all((t == 7).all() for t in stored(backend, tensors))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("v", lambda t: t[1:], r"v has shape \(4, 3, 20\), expected \(5, 3, 20\)"),
        ("v", lambda t: t.double(), r"v has dtype torch.float64, expected k's dtype torch.float32"),
        ("k_cache", lambda t: t[:, :, 1:], r"k_cache has shape \(3, 4, 2, 20\), expected \(any, any, 3, 20\)"),
        ("k_cache", lambda t: t.float(), r"k_cache is torch.float32 on cpu, expected int8 on cpu with scales"),
        ("slots", lambda t: t + 12, r"slots has a value \d+, expected below 12: 3 blocks"),
        ("slots", lambda t: t.float(), r"slots has dtype torch.float32, expected int64 or int32"),
        ("k_scale", lambda t: None, r"got v_scale without k_scale, expected both or neither"),
        ("v_scale", lambda t: t.half(), r"v_scale is torch.float16 on cpu .* expected contiguous torch.float32 on cpu"),
        ("v_scale", lambda t: t[1:], r"v_scale has shape \(2, 4, 3\), expected \(3, 4, 3\)"),
    ],
)
def test_invalid_tensors_raise_got_and_expected(name, change, message):
    tensors = draw(torch.float32, 8)
    index = cache_store.tensor_names.index(name)
    tensors[index] = change(tensors[index])
    with pytest.raises(ValueError, match=f"cache_store: {message}"):
        cache_store(*tensors)
