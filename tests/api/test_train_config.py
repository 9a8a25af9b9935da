"""`peakgpt train` as a whole: a file reproduces a run, --init, --tokenizer, longer runs, and flags that are refused."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

from peakgpt import run_reporter
from peakgpt.cli import main
from peakgpt.engine.data.tokenizer import Tokenizer
from peakgpt.engine.data.tokenizer_training import train_tokenizer
from peakgpt.engine.gpt import GPT
from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.training import loop
from peakgpt.engine.training.run_config import run_settings
from peakgpt.kernels.command_line import MAX_COUNT

SIZES = ["--n-layer", "1", "--n-head", "2", "--n-embd", "32", "--block-size", "32", "--batch", "2", "--tokens", "16",
         "--device", "cpu", "--dtype", "float32"]  # fmt: skip


@pytest.fixture(autouse=True)
def workspace(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "peak_flops_s", lambda device, dtype, again=False: 1e9)
    monkeypatch.setattr(run_reporter.RunReporter, "finish", lambda self: None)  # the report takes seconds
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("".join(f"the cat {i} sat on the mat and saw {i * i} hats\n" for i in range(300)))


def losses(run):
    rows = map(json.loads, Path(run, "metrics.jsonl").read_text().splitlines())
    return [(row["step"], row.get("loss"), row.get("validation_loss")) for row in rows]


def train(*argv):
    return main(["train", *argv])


def test_config_toml_begins_the_same_run_again_to_the_bit(capsys):
    flags = ["--dropout", "0.1", "--steps", "4", "--vocab", "280", "--schedule", "cosine", "--lr", "3e-3"]
    assert train("--text", "text", "--out", "one", *SIZES, *flags) == 0
    assert "steps 4 (default 1000)" in capsys.readouterr().out
    assert train("--config", "one/config.toml", "--out", "two") == 0
    assert losses("one") == losses("two") and len(losses("one")) == 5
    assert Path("one/config.toml").read_text() == Path("two/config.toml").read_text()
    assert train("--config", "one/config.toml", "--out", "three", "--lr", "1e-3") == 0, "flags win"
    assert losses("three") != losses("one")


def test_a_profile_of_steps_that_the_run_does_not_make_is_refused(capsys):
    """Fails without the check: the run ended well and wrote no trace."""
    flags = ["--text", "text", "--out", "run", *SIZES, "--vocab", "280", "--steps", "3"]
    assert train(*flags, "--profile", "4:6") == 2
    assert "profile is 4:6, expected steps that the run makes: 1 to 3" in capsys.readouterr().err
    assert not Path("run").exists() or not list(Path("run").iterdir())
    assert train(*flags, "--profile", "3:3") == 0


def test_a_run_is_extended_if_its_schedule_does_not_depend_on_its_length(capsys):
    constant = [*SIZES, "--vocab", "280", "--schedule", "constant", "--warmup-steps", "1"]
    assert train("--text", "text", "--out", "long", *constant, "--steps", "5") == 0
    assert train("--text", "text", "--out", "short", *constant, "--steps", "3") == 0
    capsys.readouterr()
    assert train("--resume", "short", "--steps", "5") == 0
    assert "resumed after step 3" in capsys.readouterr().out
    steps = [row for row in losses("short") if row[1] is not None]
    assert steps == [row for row in losses("long") if row[1] is not None]
    assert train("--resume", "short", "--steps", "4") == 2
    assert "steps is 4, expected at least 5: so many steps are done" in capsys.readouterr().err
    assert train("--resume", "short") == 0, "the longer length was saved"


def test_a_run_whose_schedule_depends_on_its_length_is_not_extended(capsys):
    assert train("--text", "text", "--out", "run", *SIZES, "--vocab", "280", "--steps", "3") == 0
    before = {path: Path(path).read_bytes() for path in ("run/config.toml", "run/metrics.jsonl")}
    assert train("--resume", "run", "--steps", "6") == 2
    error = capsys.readouterr().err
    assert "steps is 6, expected 3: the schedule linear depends on it" in error and "--init" in error
    assert {path: Path(path).read_bytes() for path in before} == before


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(3)
    tokenizer = train_tokenizer([(tmp_path / "text").read_text()], 290)
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=32, vocab_size=300, dropout=0.1))
    model.save_pretrained(tmp_path / "checkpoint", tokenizer)
    return model, tokenizer


def test_a_trace_of_steps_that_are_not_made_is_refused(capsys):
    flags = [*SIZES, "--text", "text", "--vocab", "280", "--steps", "2"]
    assert train(*flags, "--out", "run", "--profile", "3:4") == 2 and not Path("run").exists()
    assert "profile is 3:4, expected steps that the run makes: 1 to 2" in capsys.readouterr().err
    assert train(*flags, "--out", "run") == 0
    before = Path("run/config.toml").read_bytes()
    assert train("--resume", "run", "--profile", "1:2") == 2
    assert Path("run/config.toml").read_bytes() == before


def test_verify_reads_the_prepared_folders_that_a_run_trains_on(capsys):
    for name, options in (("data", ["--vocab", "280"]), ("other", ["--tokenizer", "data"])):
        assert main(["prepare", "text", "--out", name, *options]) == 0
    flags = ["--dataset", "data", "--validation-sets", "other=other", "--steps", "1"]
    assert train(*SIZES, *flags, "--out", "run") == 0
    assert main(["verify", "run"]) == 0
    for path in (*Path("data").glob("train-*.bin"), *Path("other").glob("validation-*.bin")):
        good = path.read_bytes()
        path.write_bytes(bytes([good[0] ^ 1]) + good[1:])
        capsys.readouterr()
        assert main(["verify", "run"]) == 1
        assert path.name in capsys.readouterr().out
        path.write_bytes(good)


def test_init_goes_on_from_the_weights_and_the_tokenizer_of_a_checkpoint(checkpoint):
    """The learning rate is so small that the weights stay: the first loss is the checkpoint's."""
    model, tokenizer = checkpoint
    flags = ["--batch", "2", "--tokens", "16", "--steps", "2", "--dtype", "float32", "--device", "cpu", "--lr", "1e-9"]
    assert train("--init", "checkpoint", "--text", "text", "--out", "run", "--dropout", "0", *flags) == 0
    after = GPT.from_pretrained("run")
    assert after.config.dropout == 0 and after.config.vocab_size == 300, "the padded vocabulary is kept"
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(after.state_dict()[name], tensor, rtol=1e-4, atol=1e-6)
    assert Tokenizer.load("run").encode("the cat") == tokenizer.encode("the cat")
    assert train("--init", "run", "--text", "text", "--out", "next", *flags) == 0, "a run folder is a checkpoint too"


def test_the_file_of_a_run_is_not_for_another_checkpoint(checkpoint, capsys):
    """The file has the fields of its checkpoint, which another one may not have."""
    model, tokenizer = checkpoint
    other = GPT(dataclasses.replace(model.config, layer_norm_epsilon=1e-3))
    other.save_pretrained("other", tokenizer=tokenizer)
    flags = ["--batch", "2", "--tokens", "16", "--steps", "1", "--dtype", "float32", "--device", "cpu"]
    assert train("--init", "checkpoint", "--text", "text", "--out", "one", *flags) == 0
    assert train("--config", "one/config.toml", "--init", "other", "--out", "two") == 2 and not Path("two").exists()
    assert "layer_norm_epsilon is 1e-05, expected 0.001, that of init" in capsys.readouterr().err


def test_a_run_from_init_is_resumed_without_the_checkpoint(checkpoint, tmp_path):
    flags = ["--batch", "2", "--tokens", "16", "--dtype", "float32", "--schedule", "constant", "--warmup-steps", "1"]
    assert train("--init", "checkpoint", "--text", "text", "--out", "run", "--steps", "2", *flags) == 0
    (tmp_path / "checkpoint").rename(tmp_path / "gone")
    assert train("--resume", "run", "--steps", "3") == 0
    assert [row[0] for row in losses("run") if row[1] is not None] == [1, 2, 3]


@pytest.mark.parametrize("source", ["--init", "--tokenizer"])
def test_a_run_on_a_prepared_folder_is_resumed_without_the_model_of_its_tokenizer(source, checkpoint, tmp_path):
    """Mutation that makes it fail: resume loads the tokenizer of the run's source."""
    sizes = SIZES if source == "--tokenizer" else ["--batch", "2", "--tokens", "16", "--dtype", "float32"]
    flags = [*sizes, "--dataset", "data", source, "checkpoint", "--schedule", "constant", "--warmup-steps", "1"]
    assert main(["prepare", "text", "--out", "data", "--tokenizer", "checkpoint"]) == 0
    assert train(*flags, "--out", "run", "--steps", "2") == 0
    (tmp_path / "checkpoint").rename(tmp_path / "gone")
    assert train("--resume", "run", "--steps", "3") == 0
    assert [row[0] for row in losses("run") if row[1] is not None] == [1, 2, 3]
    assert Tokenizer.load("run").digest == Tokenizer.load("gone").digest


def test_a_run_whose_newest_checkpoint_is_damaged_goes_on_from_the_one_before(capsys):
    """Mutation that makes it fail: config.json of the newest one is read before the damage is looked for."""
    assert train(*SIZES, "--text", "text", "--out", "run", "--steps", "2", "--save-every", "1") == 0
    newest = Path("run/checkpoints/step-00000002")
    (newest / "config.json").write_text("{")
    capsys.readouterr()
    assert train("--resume", "run") == 0
    printed = capsys.readouterr().out
    assert f"checkpoint of step 2: {newest / 'config.json'}" in printed and "resumed after step 1" in printed
    assert main(["verify", "run"]) == 0


@pytest.mark.parametrize("flag", [["--optimizer", "adamw"], ["--momentum", "0.5"]])
def test_a_resumed_run_keeps_its_optimizer(flag, capsys):
    assert train(*SIZES, "--text", "text", "--out", "run", "--steps", "1", "--optimizer", "muon") == 0
    capsys.readouterr()
    assert train("--resume", "run", *flag) == 2
    assert flag[0] in capsys.readouterr().err


def test_a_tokenizer_folder_is_used_and_its_vocabulary_checked(checkpoint, capsys):
    _, tokenizer = checkpoint
    flags = [*SIZES, "--steps", "1", "--text", "text", "--tokenizer", "checkpoint"]
    assert train(*flags, "--out", "run") == 0
    assert Tokenizer.load("run").encode("the cat") == tokenizer.encode("the cat")
    assert train(*flags, "--out", "wide", "--vocab-size", "320") == 0
    assert GPT.from_pretrained("wide").config.vocab_size == 320
    assert train(*flags, "--out", "narrow", "--vocab-size", "260") == 2
    assert "vocab_size is 260, expected at least" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--config", "gpt9"], "--config: got 'gpt9', expected a TOML file or one of the recipes"),
        (["--config", "no.toml"], "no.toml: No such file or directory"),
        (["--config", "gpt1", "--resume", "run"], "--config: got it with --resume"),
        (["--model", "gpt2"], "unrecognized arguments: --model, expected --preset"),
        (["--global-batch-size", "3"], "--global-batch-size, expected --batch (litgpt: global_batch_size)"),
        (["--train.micro_batch_size", "3"], "expected --micro-batch (litgpt: micro_batch_size)"),
        (["--learning_rate", "1"], "--learning_rate, expected --lr (nanoGPT: learning_rate)"),
        (["--stpes", "1"], "--stpes, expected --steps"),
        (["--init", "nowhere"], "nowhere: got no such folder"),
        (["--init", "checkpoint", "--preset", "gpt2"], "expected one of the two"),
        (["--init", "checkpoint", "--n-layer", "2"], "n_layer is 2, expected 1, that of init"),
        (["--init", "checkpoint", "--vocab", "300"], "vocab is 300, expected none with the tokenizer of"),
        (["--tokenizer", "nowhere", "--text", "text"], "nowhere"),
        (["--rotary-base", "1"], "rotary_base: got it with position learned"),
        (["--bias", "some"], "bias is ('some',), expected true or false, or some of qkv, out, mlp, norm"),
        (["--betas", "0.9"], "--betas is ['0.9'], expected a list of 2"),
        (["--fp8", "maybe"], "--fp8 is 'maybe', expected true or false"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_bad_input_is_one_sentence_and_nothing_is_written(argv, message, checkpoint, capsys, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    assert train(*argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("peakgpt: error: ") and error.count("\n") == 1 and message in error, error
    assert sorted(tmp_path.rglob("*")) == before


def out_of_range(setting):
    """Yield texts that a setting refuses."""
    yield from ("nan", "text words", "1" + "0" * 30)
    if setting.at_least is not None:
        yield f"{setting.at_least - 1:g}"
    if setting.above is not None:
        yield f"{setting.above:g}"
    if setting.below is not None:
        yield f"{setting.below:g}"
    if setting.at_most is None and setting.below is None and "float" not in str(setting.kind):
        yield str(MAX_COUNT + 1)
    if setting.at_most is not None:
        yield f"{setting.at_most * 1.5:.15g}"


NUMBERS = [s for s in run_settings().values() if re.search(r"\b(int|float)\b", str(s.kind))]


@pytest.mark.parametrize("setting", NUMBERS, ids=lambda s: s.name)
def test_each_number_out_of_range_is_refused_by_its_flag(setting, capsys):
    """Before anything is read. Regression: `train --lr nan` trained and overwrote a good checkpoint."""
    for text in out_of_range(setting):
        assert train(setting.flag, text) == 2, text
        error = capsys.readouterr().err
        assert setting.flag in error and "expected" in error and error.count("\n") == 1, error
    assert len(NUMBERS) > 30
