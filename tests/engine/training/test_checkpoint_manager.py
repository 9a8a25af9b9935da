"""Checkpoints of a training loop: exact for every family and dtype, kept as configured, written in the background."""

import shutil
import threading
from dataclasses import asdict

import numpy as np
import pytest
import torch
from small_configs import SMALL
from tiny_run import checkpoint_bytes, make_loop, new_run, train

from peakgpt.engine.checkpoint import run_checkpoints
from peakgpt.engine.checkpoint.checkpoint_config import CheckpointConfig
from peakgpt.engine.checkpoint.families.catalogue import FAMILIES, OWN
from peakgpt.engine.data.run_layout import model_folder, saved_steps, step_folder
from peakgpt.engine.data.tokenizer_training import train_tokenizer
from peakgpt.engine.gpt import GPT
from peakgpt.engine.training import checkpoint_manager
from peakgpt.engine.training.checkpoint_manager import CheckpointManager
from peakgpt.engine.training.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("one_thread", "no_flush")

OTHER = {"position": "rotary", "norm": "rms", "bias": False}  # no family of transformers has it


def family_config(name):
    """Return the fields of a small config of a family, with dropout."""
    if name == OWN:
        return OTHER
    content = {**SMALL[name], "vocab_size": 67, "seq_length": 32}
    return asdict(FAMILIES[name].config(content, dropout=0.1))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of 20 steps with a checkpoint of every 5th."""
    run = new_run(tmp_path_factory.mktemp("whole") / "run")
    train(run, make_loop(run.tokens), config=CheckpointConfig(save_every=5, keep_last=None))
    return run


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole.path, tmp_path / "run")


@pytest.mark.filterwarnings("ignore:checkpoint .*no layout of transformers")
@pytest.mark.parametrize(
    ("family", "dtype"),
    [(OWN, torch.float32), *((family, torch.bfloat16) for family in (*SMALL, OWN)),
     *(pytest.param(family, torch.float32, marks=pytest.mark.slow) for family in SMALL)],
)  # fmt: skip
def test_a_resumed_run_has_the_same_bits(family, dtype, tmp_path):
    """No tensor is in a checkpoint twice: the weights come from the model folder, in the family's layout.

    Seen to fail: random state not restored; data one batch ahead; metrics not cut; the remainder of bfloat16 dropped.
    """
    found = []
    for name, stops in (("whole", []), ("resumed", [7, 13])):
        run = new_run(tmp_path / name)
        for stop in [*stops, None]:
            loop = make_loop(run.tokens, steps=14, dtype=dtype, **family_config(family))
            if saved_steps(run.path):
                torch.manual_seed(5)  # the state of the process that resumes does not count
            rows = train(run, loop, until=stop, killed=stop == 13, validate_every=6)
            run = RunFolder.reopen(run.path)
        run.close()
        found.append((rows, checkpoint_bytes(step_folder(run.path, 14))))
    assert found[0] == found[1] and len(found[0][0]) == 17
    state = found[0][1]["training_state.safetensors"]
    assert b"remainder" not in state and b"exp_avg_sq" in state


def test_a_checkpoint_loads_in_transformers(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run, tokenizer = new_run(tmp_path / "run"), train_tokenizer(["the cat sat on the mat "] * 9, 270)
    loop = make_loop(run.tokens, vocab_size=tokenizer.vocab_size)
    train(run, loop, until=3, tokenizer=tokenizer)
    folder = step_folder(run.path, 3)
    model = AutoModelForCausalLM.from_pretrained(folder)
    masters = loop.trainer.master_weights()
    assert torch.equal(model.transformer.h[0].attn.c_attn.weight.T, masters["transformer.h.0.attn.c_attn.weight"])
    text = "the cat sat"
    assert AutoTokenizer.from_pretrained(folder)(text)["input_ids"] == tokenizer.encode(text)


@pytest.mark.parametrize(
    ("options", "best", "expected"),
    [
        ({}, None, {35, 40}),
        ({"keep_last": 1}, 15, {15, 40}),
        ({"keep_last": 3, "keep_every": 10}, None, {10, 20, 30, 35, 40}),
        ({"keep_last": None}, None, {*range(5, 45, 5)}),
        ({"keep_last": 1}, 12, {40}),
        ({"keep_last": 99}, None, {*range(5, 45, 5)}),
    ],
)
def test_the_configured_checkpoints_are_kept(options, best, expected, tmp_path):
    config = CheckpointConfig(save_every=5, **options)
    assert config.kept(range(5, 45, 5), best) == expected


@pytest.mark.parametrize("options", [{"save_every": 5, "keep_every": 12}, {"keep_every": 250, "keep_last": None},
                                     {"keep_last": 0}])  # fmt: skip
def test_contradictory_settings_are_refused(options):
    with pytest.raises(ValueError, match="expected"):
        CheckpointConfig(**options)


def test_the_best_checkpoint_is_kept_and_linked(tmp_path):
    run = new_run(tmp_path / "run")
    loop = make_loop(run.tokens)
    with run, CheckpointManager(run, loop, config=CheckpointConfig(save_every=5, keep_last=1)) as checkpoints:
        for event in loop.run(save_every=5):
            if not hasattr(event, "loss"):
                checkpoints.save(best=min(event.step, 10))
    assert saved_steps(run.path) == [10, 20] and model_folder(run.path) == step_folder(run.path, 20)
    best = run.path / "checkpoints" / "best"
    assert best.resolve() == step_folder(run.path, 10).resolve() and model_folder(best) == best
    assert GPT.from_pretrained(best) and GPT.from_pretrained(run.path) and GPT.from_pretrained(best.resolve())
    best.unlink()  # as if killed between the move of the folder and the new link
    with RunFolder.reopen(run.path) as again, CheckpointManager(again, make_loop(again.tokens)) as checkpoints:
        assert checkpoints.load() == 20
    assert best.resolve() == step_folder(run.path, 10).resolve()



def test_a_run_that_was_copied_without_links_goes_on(copy):
    """A copy has a folder instead of the link."""
    best = copy / "checkpoints" / "best"
    shutil.copytree(step_folder(copy, 10), best)
    run_checkpoints.link_best(copy, 10)
    assert best.is_symlink() and best.resolve() == step_folder(copy, 10).resolve()
    best.unlink()
    shutil.copytree(step_folder(copy, 10), best)
    with RunFolder.reopen(copy) as run, CheckpointManager(run, make_loop(run.tokens)) as checkpoints:
        assert checkpoints.load() == 20
    assert not best.exists() and not list(best.parent.glob(".*"))  # its checkpoints name no best one
    best.mkdir()
    (best / "notes").touch()
    with pytest.raises(ValueError, match=r"best: got a folder, expected a link to a checkpoint or a copy of one: move"):
        run_checkpoints.link_best(copy, 10)
    assert (best / "notes").exists()


@pytest.mark.parametrize("file", ["model.safetensors", "training_state.safetensors", "config.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "missing"])
def test_the_newest_undamaged_checkpoint_is_loaded_and_the_damaged_one_named(file, damage, copy, whole):
    path = step_folder(copy, 20) / file
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.unlink()
    if damage != "missing":
        path.write_bytes(data if damage == "flipped" else data[: len(data) // 2])
    named = []
    with RunFolder.reopen(copy) as run, CheckpointManager(run, make_loop(run.tokens)) as checkpoints:
        assert checkpoints.load(report=named.append) == 15
    assert len(named) == 1 and f"checkpoint of step 20: {path.parent}" in named[0] and file in named[0]
    with pytest.warns(UserWarning, match="checkpoint of step 20"):
        train(RunFolder.reopen(copy), make_loop(copy / "tokens"))
    assert checkpoint_bytes(step_folder(copy, 20)) == checkpoint_bytes(step_folder(whole.path, 20))


@pytest.mark.filterwarnings("ignore:checkpoint of step")
def test_damaged_metrics_take_the_run_back_to_before_the_damage(copy, whole):
    """The rows are computed again, with the same losses."""
    expected, file = whole.rows(), copy / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    lines[11] = lines[11].replace(b"loss", b"lnss")
    file.write_bytes(b"".join(lines))
    with pytest.warns(UserWarning, match="metrics.jsonl: got another digest of the rows up to step 1"):
        train(run := RunFolder.reopen(copy), make_loop(copy / "tokens"))
    assert [row["loss"] for row in run.rows()] == [row["loss"] for row in expected]


def test_a_run_without_an_undamaged_checkpoint_is_refused(copy):
    for step in saved_steps(copy):
        (step_folder(copy, step) / "config.json").unlink()
    before = sorted(copy.rglob("*"))
    with RunFolder.reopen(copy) as run:
        checkpoints = CheckpointManager(run, make_loop(run.tokens))
        with pytest.raises(ValueError, match=r"got no undamaged checkpoint, expected one; .*config\.json"):
            checkpoints.load(report=lambda fault: None)
    assert sorted(copy.rglob("*")) == before and len(run.rows()) == 20


@pytest.mark.parametrize("change", [{"n_layer": 2}, {"n_embd": 32}, {"dropout": 0.2}])
def test_the_checkpoint_of_another_model_is_refused(change, copy):
    """It is not taken for damage: no older checkpoint is loaded instead."""
    with RunFolder.reopen(copy) as run:
        checkpoints = CheckpointManager(run, make_loop(run.tokens, **change))
        with pytest.raises(ValueError, match="got another model, expected the run's"):
            checkpoints.load(report=lambda fault: pytest.fail(fault))


def test_a_loop_with_other_parts_is_refused(copy):
    loop = make_loop(copy / "tokens")
    loop.parts["early stopping"] = loop.batches
    with RunFolder.reopen(copy) as run:
        checkpoints = CheckpointManager(run, loop)
        with pytest.raises(ValueError, match=r"got .*, validation, expected .*, validation, early"):
            checkpoints.load()


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    """The copy in memory is of the step of the save; the next save waits for this one."""
    started, go_on, write = threading.Event(), threading.Event(), run_checkpoints.write_checkpoint
    order = []

    def slow(run, step, *args):
        order.append(f"begin {step}")
        started.set()
        assert go_on.wait(60)
        write(run, step, *args)
        order.append(f"end {step}")

    monkeypatch.setattr(checkpoint_manager, "write_checkpoint", slow)
    run = new_run(tmp_path / "run")
    loop = make_loop(run.tokens)
    with run, CheckpointManager(run, loop) as checkpoints:
        list(loop.run(5))
        expected = {name: tensor.clone() for name, tensor in loop.trainer.saved_weights()}
        checkpoints.save()
        assert started.wait(60)
        list(loop.run(5))  # 5 steps while nothing can be written
        checkpoints.check()
        assert checkpoints.saved_step is None and not saved_steps(run.path)
        threading.Timer(0.1, go_on.set).start()
        checkpoints.save()
        assert order[:3] == ["begin 5", "end 5", "begin 10"] or order == ["begin 5", "end 5"]
    assert order == ["begin 5", "end 5", "begin 10", "end 10"]
    saved = GPT.from_pretrained(step_folder(run.path, 5)).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in saved.items())


def test_a_second_save_of_one_step_does_nothing(copy, monkeypatch):
    with RunFolder.reopen(copy) as run, CheckpointManager(run, make_loop(run.tokens)) as checkpoints:
        checkpoints.load()
        monkeypatch.setattr(checkpoint_manager, "write_checkpoint", lambda *_: pytest.fail("written again"))
        checkpoints.save()


def test_weights_that_are_not_finite_are_not_saved(copy):
    loop = make_loop(copy / "tokens", steps=25)
    before = sorted(copy.rglob("*"))
    with RunFolder.reopen(copy) as run, CheckpointManager(run, loop) as checkpoints:
        checkpoints.load()
        list(loop.run(1))
        loop.trainer.model.transformer.wte.weight.data[3, 3] = np.nan
        checkpoints.save()
        with pytest.raises(FloatingPointError, match=r"step 21: transformer.wte.weight has values"):
            checkpoints.wait()
    assert sorted(copy.rglob("*")) == before


def test_a_model_that_no_folder_can_have_is_refused_before_the_first_step(tmp_path):
    from torch.nn.utils import parametrizations

    run = new_run(tmp_path / "run")
    loop = make_loop(run.tokens)
    parametrizations.weight_norm(loop.trainer.model.transformer.h[0].attn.c_proj)
    with run, pytest.raises(ValueError, match="merge adapters"):
        CheckpointManager(run, loop)
