"""A checkpoint has all state of a training loop: every attribute that differs between two steps is found by a walk."""

import enum
import hashlib
import os
import re
import types
from collections.abc import Iterable, Mapping
from threading import Thread

import numpy as np
import pytest
import torch
from tiny_run import make_loop, new_run

from peakgpt.engine.training.checkpoint_manager import CheckpointManager

# Attributes that differ in a resumed loop, and why that changes no result.
EXEMPT = {
    r"\._last_step_s$": "a clock",
    r"\.gradients\._(blocks|memory|versions)": "every step sets the gradients to zero first",
    r"\.grad\b": "the gradient memory above",
    r"\.grad_norm\b": "the norm of the last step; every step writes it first",
    r"\.trainer\.lr$": "that of the last step, for its metrics; every step writes it first",
    r"\._shapes\b": "the inputs that a CUDA graph is recorded for",
    r"\.lr_scale\b": "every step writes it first, from the number of steps",
    r"\.optimizer\._launches": "tables of addresses",
    r"\.model\.source_files": "the checkpoint's JSON files, which the next checkpoint has unchanged",
    r"\.update\.(calls|inputs|graph|state|obstacle)": "a CUDA graph is recorded again",
}
ATOMS = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device, enum.Enum, range)
WITHOUT_STATE = (types.FunctionType, types.MethodType, types.BuiltinFunctionType, types.ModuleType, type, Thread)


def is_exempt(path):
    return any(re.search(expression, path) for expression in EXEMPT)


def content(array):
    """Return what identifies the bits of an array; a list of Python numbers would take seconds."""
    return str(array.dtype), array.shape, hashlib.sha256(np.ascontiguousarray(array)).digest()


def leaves(value, path, seen):
    """Yield (path, comparable value) of everything that can be reached from an object, without exempt attributes."""
    if is_exempt(path):  # here, so that the memory of a graph is not walked
        return
    if isinstance(value, ATOMS):
        yield path, value
        return
    if isinstance(value, WITHOUT_STATE) or id(value) in seen:
        return
    if not isinstance(value, tuple):  # the config and the optimizer may share one
        seen[id(value)] = value
    if isinstance(value, torch.Tensor):
        bits = value.detach().flatten().view(torch.uint8).numpy()
        yield path, (str(value.dtype), tuple(value.shape), content(bits))
        yield from leaves(value.grad, f"{path}.grad", seen)
    elif isinstance(value, (np.ndarray, np.generic)):
        yield path, content(np.asarray(value))
    elif isinstance(value, Mapping):
        for number, (key, item) in enumerate(value.items()):  # parameters as keys have no name
            yield from leaves(item, f"{path}[{key if isinstance(key, ATOMS) else number}]", seen)
    elif isinstance(value, Iterable) and hasattr(value, "__len__") and type(value).__module__ != "peakgpt":
        for number, item in enumerate(value):
            yield from leaves(item, f"{path}[{number}]", seen)
    if hasattr(value, "__dict__") or hasattr(type(value), "__slots__"):
        names = [*getattr(value, "__dict__", ()), *getattr(type(value), "__slots__", ())]
        for name in names:
            if hasattr(value, name):
                yield from leaves(getattr(value, name), f"{path}.{name}", seen)


def state(loop):
    found = dict(leaves(loop, "loop", {}))
    found["random"] = content(torch.get_rng_state().numpy())
    return found


def differences(a, b):
    return sorted(path for path in a.keys() | b.keys() if a.get(path, "none") != b.get(path, "none"))


def resumed_and_whole(tmp_path, prepare=lambda loop: None):
    """Compare a loop after 7 steps with one that has loaded its checkpoint, and with itself before the steps."""
    run = new_run(tmp_path / "run")
    loops = [make_loop(run.tokens, dtype=torch.bfloat16) for _ in range(2)]
    for loop in loops:
        prepare(loop)
    before = state(loops[0])
    list(loops[0].run(7, validate_every=3))
    with run, CheckpointManager(run, loops[0]) as checkpoints:
        checkpoints.save()
        expected = state(loops[0])
        checkpoints.wait()
        torch.manual_seed(77)
        CheckpointManager(run, loops[1]).load()
    return differences(expected, state(loops[1])), differences(before, expected)


@pytest.fixture(autouse=True)
def quick(threads, monkeypatch):
    threads(1)
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def test_every_attribute_that_training_changes_is_saved(tmp_path):
    """Fails for a new attribute of the loop or of anything in it that training changes and no part saves.

    Add it to the `state_dict` of its owner, or make its owner a part of the loop. Exempt it if no result depends on it.
    """
    wrong, changed = resumed_and_whole(tmp_path)
    assert wrong == []
    found = " ".join(changed)
    for name in ("steps_done", "index", "exp_avg", "wte", "remainder", "random", "[step]"):
        assert name in found, f"the walk does not reach {name}"


@pytest.mark.parametrize("owner", ["loop", "loop.trainer", "loop.trainer.optimizer", "loop.trainer.model"])
@pytest.mark.parametrize("kind", [int, torch.tensor, lambda n: [{"a": n}], np.ones])
def test_the_walk_finds_a_counter_that_nobody_saves(owner, kind, tmp_path):
    def prepare(loop):
        place = eval(owner, {"loop": loop})
        place.forgotten = kind(0)
        step, count = loop.trainer.step, [0]

        def counted(*args):
            count[0] += 1
            place.forgotten = kind(count[0])
            return step(*args)

        loop.trainer.step = counted

    wrong, _ = resumed_and_whole(tmp_path, prepare)
    assert wrong and all("forgotten" in path for path in wrong)
