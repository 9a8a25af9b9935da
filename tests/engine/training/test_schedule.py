"""Batch size and learning rate of each update, the length of a run, and settings that contradict each other."""

import itertools
import math

import pytest

from peakgpt.engine.training.schedule import Schedule
from peakgpt.engine.training.train_config import TrainConfig

GPT3 = {"batch": 1600, "tokens": 2048, "max_tokens": 300 * 10**9, "micro_batch": 16, "ramp_batch": 16,
        "ramp_tokens": 12 * 10**9, "schedule": "cosine", "warmup_tokens": 375 * 10**6, "decay_tokens": 260 * 10**9,
        "min_lr_fraction": 0.1, "lr": 6e-5}  # fmt: skip
PALM = {"batch": 2048, "tokens": 2048, "schedule": "constant",
        "batch_stages": ("512:52428800000", "1024:188743680000")}  # fmt: skip


def rates(steps, **fields):
    config = TrainConfig(lr=1.0, **fields)
    schedule = Schedule(config)
    return [schedule.lr(step, steps) for step in range(steps + 1)]


@pytest.mark.parametrize("lr", [1.0, 1e-3, 3e-4])
@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.1, 0.3])
@pytest.mark.parametrize("steps", [1, 2, 20, 997])
def test_the_default_schedule_has_the_bits_of_version_0_1_0(lr, warmup, steps):
    schedule, rise = Schedule(TrainConfig(lr=lr, warmup=warmup)), max(1, round(warmup * steps))
    for step in range(steps + 2):
        expected = lr * min((step + 1) / rise, max(0, steps - step) / max(1, steps - rise))
        assert schedule.lr(step, steps) == expected


def test_a_warmup_reaches_lr_with_its_last_update():
    """Mutation that makes it fail: a warmup off by one, progress(step) instead of progress(step + 1)."""
    for fields in ({"warmup": 0.1}, {"warmup_steps": 10}, {"warmup_tokens": 10 * 8 * 256}):
        lr = rates(100, schedule="constant", **fields)
        assert lr[:10] == pytest.approx([(step + 1) / 10 for step in range(10)]) and set(lr[9:]) == {1.0}


def test_a_cosine_equals_that_of_nanogpt_and_stays_at_its_floor():
    lr = rates(120, schedule="cosine", warmup_steps=10, decay_steps=100, min_lr=0.1)
    for step in range(10, 101):  # get_lr of nanoGPT's train.py
        assert lr[step] == pytest.approx(0.1 + 0.5 * (1 + math.cos(math.pi * (step - 10) / 90)) * 0.9)
    assert set(lr[100:]) == {0.1}
    assert lr == rates(120, schedule="cosine", warmup_steps=10, decay_steps=100, min_lr_fraction=0.1)


@pytest.mark.parametrize(("shape", "middle"), [(None, 0.5), ("cosine", 0.5), ("sqrt", 1 - math.sqrt(0.5))])
def test_wsd_is_stable_and_decays_in_its_last_share(shape, middle):
    fields = {} if shape is None else {"decay_shape": shape}
    lr = rates(100, schedule="wsd", warmup_steps=10, decay_fraction=0.4, **fields)
    assert set(lr[9:61]) == {1.0} and lr[80] == pytest.approx(middle) and lr[100] == 0.0
    assert all(a > b for a, b in itertools.pairwise(lr[60:]))


def test_gpt3s_schedule_is_in_tokens():
    schedule = Schedule(TrainConfig(**GPT3))
    steps = schedule.steps()
    assert schedule.tokens(steps) <= 300 * 10**9 < schedule.tokens(steps + 1)
    lr = {step: schedule.lr(step, steps) for step in range(0, steps, 10)}
    assert lr[0] < 1e-8 and lr[steps // 10 * 10] == pytest.approx(6e-6)
    for step, rate in lr.items():
        if schedule.tokens(step + 1) < 375e6:
            assert rate == pytest.approx(6e-5 * schedule.tokens(step + 1) / 375e6)
        if schedule.tokens(step) > 260e9:
            assert rate == pytest.approx(6e-6)
    half = min(lr, key=lambda step: abs(schedule.tokens(step) - (260e9 + 375e6) / 2))
    assert lr[half] == pytest.approx(3.3e-5, rel=1e-3)


def test_a_linear_ramp_grows_by_micro_batches_with_the_tokens():
    schedule = Schedule(TrainConfig(**GPT3))
    sizes = [stage.batch for stage in schedule.stages]
    assert sizes == list(range(16, 1601, 16)), "32 thousand tokens at first, then a micro-batch more each time"
    for last, stage in itertools.pairwise(schedule.stages):
        assert stage.tokens - last.tokens == (stage.step - last.step) * last.batch * 2048
        begin = 12e9 * (stage.batch - 16) / (1600 - 16)
        assert begin <= stage.tokens < begin + last.batch * 2048
    first = schedule.stages[-1].step
    assert schedule.batch(first - 1) == 1584 and schedule.batch(first) == schedule.batch(first + 10**6) == 1600


def test_palms_batch_doubles_at_its_steps():
    assert [(s.step, s.batch) for s in Schedule(TrainConfig(**PALM)).stages] == [(0, 512), (50_000, 1024),
                                                                               (115_000, 2048)]  # fmt: skip


def test_tokens_are_those_of_the_batches():
    schedule = Schedule(TrainConfig(batch=13, tokens=7, ramp_batch=2, ramp_tokens=2000))
    total = 0
    for step in range(80):
        assert schedule.tokens(step) == total
        total += 7 * schedule.batch(step)
    sizes = [schedule.batch(step) for step in range(80)]
    assert sizes == sorted(sizes) and set(sizes) == {2, 4, 6, 8, 10, 12, 13}


def test_the_ramp_skips_sizes_that_would_have_no_update():
    schedule = Schedule(TrainConfig(batch=8, tokens=100, ramp_batch=1, ramp_tokens=200))
    assert [schedule.batch(step) for step in range(5)] == [1, 4, 8, 8, 8]


@pytest.mark.parametrize(
    ("fields", "steps"),
    [
        ({}, 1000),
        ({"steps": 7}, 7),
        ({"max_tokens": 2048 * 5 + 2047}, 5),
        ({"epochs": 2}, 9),
        ({"epochs": 0.5}, 2),
        ({"max_tokens": 2048 * 5, "ramp_batch": 4, "ramp_tokens": 2048}, 6),
    ],
)
def test_the_length_of_a_run_is_in_steps_tokens_or_epochs(fields, steps):
    assert Schedule(TrainConfig(**fields)).steps(data_tokens=10_000) == steps


@pytest.mark.parametrize(
    ("fields", "data_tokens", "message"),
    [
        ({"epochs": 2}, None, "epochs is 2 for data of unknown length"),
        ({"epochs": 0.1}, 10_000, "epochs is 0.1, which is 1000 tokens, expected at least the 2048 of one update"),
        ({"max_tokens": 2047}, None, "max_tokens is 2047, which is 2047 tokens, expected at least the 2048"),
    ],
)
def test_a_length_without_an_update_is_refused(fields, data_tokens, message):
    with pytest.raises(ValueError, match=message):
        Schedule(TrainConfig(**fields)).steps(data_tokens)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 5, "max_tokens": 9}, "got steps and max_tokens, expected one of steps, max_tokens, epochs"),
        ({"warmup": 0.1, "warmup_steps": 3}, "got warmup and warmup_steps"),
        ({"warmup_steps": 3, "warmup_tokens": 3}, "got warmup_steps and warmup_tokens"),
        ({"decay_steps": 3, "decay_tokens": 3}, "got decay_steps and decay_tokens"),
        ({"min_lr": 1e-4, "min_lr_fraction": 0.1}, "got min_lr and min_lr_fraction"),
        ({"min_lr": 1.0}, "min_lr is 1.0, expected at most lr 0.001"),
        ({"schedule": "constant", "min_lr": 1e-5}, "min_lr is 1e-05, expected another schedule than constant"),
        ({"schedule": "constant", "decay_steps": 5}, "decay_steps is 5, expected another schedule than constant"),
        ({"schedule": "cosine", "decay_fraction": 0.1}, "decay_fraction is 0.1, expected schedule wsd"),
        ({"decay_shape": "sqrt"}, 'decay_shape is "sqrt", expected schedule wsd'),
        ({"decay_steps": 5, "warmup_steps": 5}, "decay_steps is 5, expected more than warmup_steps 5"),
        ({"decay_tokens": 5, "warmup_tokens": 6}, "decay_tokens is 5, expected more than warmup_tokens 6"),
        ({"schedule": "poly"}, "schedule is 'poly', expected one of constant, linear, cosine, wsd"),
        ({"ramp_batch": 4}, "ramp_batch is 4, expected ramp_tokens too"),
        ({"ramp_tokens": 4}, "ramp_tokens is 4, expected ramp_batch too"),
        ({"ramp_batch": 8, "ramp_tokens": 4}, "ramp_batch is 8, expected less than batch 8"),
        ({"ramp_batch": 4, "ramp_tokens": 4, "batch_stages": ("4:5",)}, "got ramp_batch and batch_stages"),
        ({"batch_stages": ("8",)}, "batch_stages has '8', expected SEQUENCES:TOKENS"),
        ({"batch_stages": ("0:8",)}, "batch_stages has '0:8'"),
        ({"batch_stages": ("2:9", "4:9")}, "batch_stages has '4:9', expected .* in the order of their tokens"),
        ({"spike_skip": 3}, "spike_skip is 3, expected spike_sigma too"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0"),
    ],
)  # fmt: skip
def test_settings_that_contradict_each_other_are_refused(fields, message):
    with pytest.raises(ValueError, match=f"TrainConfig: {message}"):
        TrainConfig(**fields)
