"""Batches: each token comes out once an epoch, in a reproducible order, from one source or a mixture of several."""

import json

import pytest
import torch
from token_streams import stream

from peakgpt.engine.data.batches import Batches, validation_batches
from peakgpt.engine.data.shards import TokenShards
from peakgpt.kernels.ops.linear_cross_entropy import IGNORE_INDEX


def epochs(batches, count):
    """The (ids, targets) windows of the next epochs of a single source, each epoch in a list."""
    groups = [[] for _ in range(count + 1)]
    while not groups[count]:
        window = batches.take(1)
        groups[batches.state_dict()["sources"][0]["epoch"]].append(window)
    return groups[:count]


@pytest.mark.parametrize(("count", "tokens"), [(1000, 16), (300, 1), (17, 16), (18, 16), (33, 16), (1001, 250)])
def test_epoch_uses_every_token_at_most_once(tmp_path, count, tokens):
    batches = Batches(stream(tmp_path, count), 4, tokens, seed=1)
    for windows in epochs(batches, 4):
        seen, targets_seen = [], []
        for ids, targets in windows:
            assert ids.shape == targets.shape == (1, tokens)
            assert ids.dtype == targets.dtype == torch.int64
            assert ids.is_contiguous()
            assert targets.is_contiguous()
            # The token at position p is p: the rows are windows of the stream, the targets are shifted by one.
            assert torch.equal(ids, ids[:, :1] + torch.arange(tokens))
            assert torch.equal(targets, ids + 1)
            seen += ids.flatten().tolist()
            targets_seen += targets.flatten().tolist()
        assert len(set(seen)) == len(seen)
        assert len(set(targets_seen)) == len(targets_seen)
        assert max(targets_seen) < count
        # An epoch leaves out the tokens before its offset, and less than a window at the end.
        assert len(seen) >= max(tokens, count - 1 - 2 * (tokens - 1))


def test_epochs_differ_in_order_and_offset(tmp_path):
    shards = stream(tmp_path, 2000)
    batches = Batches(shards, 2, 16, seed=3)
    starts = [[int(ids[0, 0]) for ids, _ in windows] for windows in epochs(batches, 20)]
    assert all(order != sorted(order) for order in starts)
    assert len({tuple(order) for order in starts}) == 20
    assert len({order[0] % 16 for order in starts}) > 8
    other = Batches(shards, 2, 16, seed=4)
    assert [[int(ids[0, 0]) for ids, _ in windows] for windows in epochs(other, 1)] != starts[:1]


def test_order_of_windows_never_changes(tmp_path):
    """Resuming after an upgrade of numpy or torch needs the same order: these numbers may never change."""
    batches = Batches(stream(tmp_path, 200), 2, 16, seed=5)
    assert [next(batches)[0][:, 0].tolist() for _ in range(8)] == [
        [177, 129],
        [145, 17],
        [49, 33],
        [1, 65],
        [81, 161],
        [97, 113],
        [149, 101],
        [53, 69],
    ]


def test_resumed_batches_equal_uninterrupted_ones(tmp_path):
    shards = stream(tmp_path, 500)
    whole = Batches(shards, 3, 16, seed=7)
    expected = [next(whole) for _ in range(60)]
    assert whole.windows == 180 and whole.epochs[0] >= 5
    for count in (0, 1, 9, 10, 11, 37):
        first = Batches(shards, 3, 16, seed=7)
        for _ in range(count):
            next(first)
        state = json.loads(json.dumps(first.state_dict()))
        resumed = Batches(TokenShards.open(tmp_path, "train"), 3, 16, seed=7)
        next(resumed)
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        for ids, targets in expected[count:]:
            again = next(resumed)
            assert torch.equal(again[0], ids)
            assert torch.equal(again[1], targets)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": "x"}, "data position: got data='x'"),
        ({"tokens": 8}, "data position: got tokens=8, expected 16"),
        ({"seed": 8}, "data position: got seed=8, expected 7"),
        ({"weight": 0.3}, "data position: got weight=0.3, expected 500"),
        ({"index": 1000}, "data position: got index=1000, expected 0 to 30"),
        ({"index": -1}, "data position: got index=-1"),
        ({"epoch": None}, "data position: got epoch=None"),
        ({"windows": None}, "data position: got windows=None"),
        ({"sources": []}, r"data position: got sources \[\], expected 1"),
        ({"sources": [7]}, "data position: got data=7"),
    ],
)
def test_position_in_other_data_is_refused(tmp_path, change, message):
    batches = Batches(stream(tmp_path, 500), 3, 16, seed=7)
    next(batches)
    state = batches.state_dict()
    changed = state | {key: value for key, value in change.items() if key in state}
    if changed == state:
        changed["sources"] = [state["sources"][0] | change]
    with pytest.raises(ValueError, match=message):
        batches.load_state_dict(changed)
    assert batches.state_dict() == state


def test_too_little_data_raises(tmp_path):
    shards = stream(tmp_path, 64)
    with pytest.raises(ValueError, match="training data: got 64 tokens, expected at least 65 for one window of 64"):
        Batches(shards, 4, 64, seed=0)
    with pytest.raises(ValueError, match="validation data: got 1 tokens, expected at least 2"):
        validation_batches(stream(tmp_path / "one", 1), 1, 64)
    for sizes in ((0, 16), (4, 0)):
        with pytest.raises(ValueError, match="batch x tokens: got"):
            Batches(shards, *sizes, seed=0)
    for seed in (-1, 1 << 64):
        with pytest.raises(ValueError, match=f"seed: got {seed}"):
            Batches(shards, 1, 16, seed)


@pytest.mark.parametrize("count", [2, 16, 17, 18, 49, 50, 640, 641])
@pytest.mark.parametrize("batch", [1, 4])
def test_every_token_but_the_first_is_a_validation_target_once(tmp_path, count, batch):
    """The last window and the last batch may be short. Fails if they are left out, or if padding counts."""
    sweep = list(validation_batches(stream(tmp_path, count), batch, 16))
    targets = torch.cat([targets.flatten() for _, targets in sweep])
    assert torch.equal(targets[targets != IGNORE_INDEX], torch.arange(1, count))
    for ids, targets in sweep:
        assert ids.shape == targets.shape and len(ids) <= batch and ids.min() >= 0
        assert torch.equal(targets[targets != IGNORE_INDEX], ids[targets != IGNORE_INDEX] + 1)
        assert (targets[:-1] != IGNORE_INDEX).all(), "only the last row is padded"
    assert all(len(ids) == batch for ids, _ in sweep[:-1])


def test_ids_above_65535_are_kept(tmp_path):
    shards = stream(tmp_path, 70_001, vocab_size=70_001, shard_tokens=50_000)
    assert max(int(targets.max()) for _, targets in validation_batches(shards, 10, 100)) == 70_000


# Rows and several sources


def test_the_rows_of_batches_of_any_size_are_the_same_windows(tmp_path):
    """A batch ramp changes the number of rows; a batch may span two epochs."""
    shards = stream(tmp_path, 300)
    whole, ramp = Batches(shards, 60, 16, seed=7), Batches(shards, 1, 16, seed=7)
    parts = [ramp.take(rows) for rows in (1, 2, 5, 17, 35)]
    for side, whole_side in enumerate(next(whole)):
        assert torch.equal(torch.cat([part[side] for part in parts]), whole_side)
    assert ramp.windows == 60 and ramp.state_dict() == whole.state_dict() and ramp.epochs[0] > 3
    with pytest.raises(ValueError, match="batch x tokens: got 0 x 16"):
        ramp.take(0)


def three_sources(tmp_path):
    """Ids say their source: 0 to 199, 1000 to 1399, 2000 to 2099."""
    sizes = {"a": (0, 200), "b": (1000, 400), "c": (2000, 100)}
    return [stream(tmp_path, count, name=name, first=first, end_id=9) for name, (first, count) in sizes.items()]


def sources_of(ids):
    return (ids[:, 0] // 1000).tolist()


def test_a_mixture_has_its_proportions_at_every_window_and_over_epochs(tmp_path):
    weights = [60, 22, 18]
    batches, counts = Batches(three_sources(tmp_path), 4, 16, seed=1, weights=weights), [0, 0, 0]
    for n in range(1, 501):
        ids, targets = batches.take(1)
        assert torch.equal(ids, ids[:, :1] + torch.arange(16)) and torch.equal(targets, ids + 1)
        counts[sources_of(ids)[0]] += 1
        assert all(abs(count - n * weight / 100) < 1 for count, weight in zip(counts, weights, strict=True))
    assert counts == [300, 110, 90] and batches.epochs[0] > 20 > 5 > batches.epochs[1] and batches.end_id == 9


def test_a_source_of_a_mixture_has_the_order_that_its_number_and_epoch_give(tmp_path):
    """Each source shuffles anew in each epoch; the first one has the order of a run on it alone."""
    sources = three_sources(tmp_path)
    mixed, alone = Batches(sources, 1, 16, seed=1, weights=[1, 1, 1]), Batches(sources[0], 1, 16, seed=1)
    rows = [int(mixed.take(1)[0][0, 0]) for _ in range(180)]
    first = [row for row in rows if row < 1000]
    assert first == [int(alone.take(1)[0][0, 0]) for _ in first]
    last = [row for row in rows if row >= 2000]
    twice = Batches([sources[0]] * 2, 1, 16, seed=1)
    pairs = [int(twice.take(1)[0][0, 0]) for _ in range(24)]
    assert pairs[::2] != pairs[1::2], "two sources of the same length have different orders"
    assert len({tuple(last[i : i + 6]) for i in range(0, 60, 6)}) == 10


def test_a_resumed_mixture_equals_an_uninterrupted_one(tmp_path):
    sources, weights = three_sources(tmp_path), [0.5, 0.3, 0.2]
    whole = Batches(sources, 3, 16, seed=7, weights=weights)
    expected = [next(whole) for _ in range(60)]
    for count in (0, 1, 7, 40):
        first = Batches(sources, 3, 16, seed=7, weights=weights)
        for _ in range(count):
            next(first)
        resumed = Batches(sources, 3, 16, seed=7, weights=weights)
        next(resumed)
        resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
        for ids, targets in expected[count:]:
            again = next(resumed)
            assert torch.equal(again[0], ids) and torch.equal(again[1], targets)
    state = whole.state_dict()
    for weights_now, message in (([0.5, 0.3, 0.3], "weight=0.2"), ([0.5, 0.5], "sources")):
        other = Batches(sources[: len(weights_now)], 3, 16, seed=7, weights=weights_now)
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(state)
    uneven = [{**source, "windows": 60} for source in state["sources"]]
    with pytest.raises(ValueError, match="expected them in its proportions"):
        whole.load_state_dict(state | {"sources": uneven})
    assert whole.state_dict() == state


def test_sources_that_do_not_fit_are_refused(tmp_path):
    sources = three_sources(tmp_path)
    for weights, message in (
        ([1, 2], "weights: got 2, expected one for each of 3 sources"),
        ([1, 2, 0], "weights: got 0, expected finite numbers above 0"),
        ([1, 2, float("nan")], "weights: got nan"),
    ):
        with pytest.raises(ValueError, match=message):
            Batches(sources, 1, 16, seed=0, weights=weights)
    other = stream(tmp_path, 100, name="other", end_id=8)
    with pytest.raises(ValueError, match="got sources of different tokenizers"):
        Batches([*sources, other], 1, 16, seed=0)
    with pytest.raises(ValueError, match="got no sources, expected at least one"):
        Batches([], 1, 16, seed=0)


def test_a_position_of_version_0_1_0_is_read(tmp_path):
    """It counted batches of one source; every window that it had not given comes next."""
    shards = stream(tmp_path, 500)
    batches, old = Batches(shards, 3, 16, seed=7), Batches(shards, 3, 16, seed=7)
    expected = [old.take(3) for _ in range(8)][5:]
    state = {"data": shards.digest, "batch": 3, "tokens": 16, "seed": 7, "epoch": 0, "index": 5}
    batches.load_state_dict(state)
    for ids, targets in expected:
        again = next(batches)
        assert torch.equal(again[0], ids) and torch.equal(again[1], targets)
    for change, message in (({"data": "x"}, "data='x'"), ({"batch": None}, "batch=None"), ({"index": 99}, "index=297")):
        with pytest.raises(ValueError, match=f"data position: got {message}"):
            batches.load_state_dict(state | change)
