"""Training states: any nesting of tensors and numbers comes back with its types and bits, or is refused."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peakgpt.engine.checkpoint.safetensors_io import DTYPES, write_safetensors
from peakgpt.engine.checkpoint.training_state import (
    join_tensors,
    read_training_state,
    split_tensors,
    write_training_state,
)

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
TENSORS = st.builds(
    lambda dtype, shape: torch.full(shape, 3).to(dtype),
    st.sampled_from(sorted(DTYPES, key=str)), st.lists(st.integers(0, 3), max_size=3),
)  # fmt: skip
KEYS = st.integers() | st.text(alphabet="ab0_", min_size=1)  # a dot in a key may give two tensors one path
STATES = st.recursive(
    SCALARS | TENSORS,
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=9,
)


def equal(a, b):
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        if a.dtype != b.dtype or a.shape != b.shape:
            return False
        if a.dtype.itemsize == 1:  # torch.equal does not know float8
            a, b = a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)
        return torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    return a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b))


@given(STATES)
def test_a_state_comes_back_with_its_types(state):
    try:
        tensors, structure = split_tensors(state)
    except ValueError as error:  # {"0": tensor, 0: tensor}
        assert "expected different keys" in str(error)
        return
    assert equal(join_tensors(tensors, structure), state)


def test_a_state_comes_back_from_a_file(tmp_path):
    state = {
        "steps_done": 3, "best": math.inf, "betas": (0.9, 0.95), "none": None, "text": "\u00e9\ud83d\ude00",
        "state": {0: {"step": torch.tensor(3.0), "m": torch.randn(3, 5)[:, 1:]}, 7: {}}, "empty": torch.ones(0, 2),
        "all": [torch.ones(2).to(dtype) for dtype in DTYPES],
    }  # fmt: skip
    state["text"] = state["text"].encode("utf-16", "surrogatepass").decode("utf-16")
    write_training_state(tmp_path / "a.safetensors", *split_tensors(state))
    assert equal(read_training_state(tmp_path / "a.safetensors"), state)


@pytest.mark.parametrize("value", [{1, 2}, b"bytes", object(), 1j, {"a": {"b": len}}])
def test_a_value_that_cannot_be_saved_is_named(value):
    with pytest.raises(ValueError, match=r"training state: (rate|rate\.a\.b) is a \w+, expected a tensor, number or"):
        split_tensors({"rate": value})


def test_two_tensors_of_one_path_are_refused():
    with pytest.raises(ValueError, match=r"got two tensors a\.b, expected different keys"):
        split_tensors({"a.b": torch.ones(1), "a": {"b": torch.ones(1)}})


def test_a_file_without_a_state_is_refused(tmp_path):
    write_safetensors(tmp_path / "a.safetensors", {"x": torch.ones(1)}, {})
    with pytest.raises(ValueError, match=r"a\.safetensors: got no training state in it"):
        read_training_state(tmp_path / "a.safetensors")
