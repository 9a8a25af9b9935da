"""The config of a run: one declaration per setting, TOML files, contradictions, names of other programs, recipes."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import tomllib
import torch

from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.model.flops import parameter_count
from peakgpt.engine.model.presets import PRESETS
from peakgpt.engine.settings.setting import check_settings, setting, settings_of
from peakgpt.engine.settings.values import from_text, from_toml, show
from peakgpt.engine.training.run_config import RunConfig, run_settings
from peakgpt.engine.training.run_file import listing, read_config_file, read_run_file, recipe_names, write_run_file
from peakgpt.engine.training.schedule import Schedule
from peakgpt.engine.training.synonyms import PROGRAMS, SYNONYMS, our_name

CPU = torch.device("cpu")


def file(folder, text):
    path = folder / "run.toml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (int | None, "none", None),
        (int | None, "3", 3),
        (float, "1e-3", 1e-3),
        (bool, "true", True),
        (torch.dtype, "bfloat16", torch.bfloat16),
        (str, "none", "none"),
        (tuple[int | None, ...], ["none", "256"], (None, 256)),
        (tuple[float, float], ["0.9", "0.95"], (0.9, 0.95)),
        (bool | tuple[str, ...], ["true"], True),
        (bool | tuple[str, ...], ["qkv", "out"], ("qkv", "out")),
        (tuple[str, ...] | None, ["none"], None),
    ],
    ids=str,
)
def test_a_value_is_the_same_from_a_flag_and_from_toml(kind, text, value):
    assert from_text(kind, text) == value
    assert from_toml(kind, tomllib.loads(f"v = {show(value)}")["v"]) == value


@pytest.mark.parametrize(
    ("kind", "value"), [(int, 1.5), (int, True), (float, "1"), (bool, 1), (tuple[float, float], [1.0]), (str, 1)]
)
def test_toml_of_another_type_is_refused(kind, value):
    with pytest.raises(ValueError):
        from_toml(kind, value)


def test_ranges_are_checked_for_python_callers_too():
    @dataclass(kw_only=True, frozen=True)
    class Config:
        rate: float = setting(0.5, "a rate", section="a", at_least=0, below=1)

        def __post_init__(self):
            check_settings(self)

    for value, words in ((1.0, "below 1"), (-0.1, "at least 0"), (float("nan"), "a finite number"), ("x", "a number")):
        with pytest.raises(ValueError, match=rf"Config: rate is .*, expected {words}"):
            Config(rate=value)
    assert settings_of(Config)[0].flag == "--rate" and Config(rate=0).rate == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[training]\nstepz = 1", r"\[training\] got unknown stepz, expected steps"),
        ("[trainig]\nsteps = 1", "got unknown trainig, expected training"),
        ("steps = 1", r"got steps outside of a table, expected it in \[training\]"),
        ("[training]\nlr = 1.0", r"got lr in \[training\], expected it in \[optimizer\]"),
        ("[training]\nsteps = true", r"\[training\] steps is True, expected an integer or none"),
        ("[training]\nsteps = 0", r"\[training\] steps is 0, expected at least 1"),
        ("[optimizer]\nbetas = [0.9]", "betas is .*, expected a list of 2"),
        ("[optimizer]\nbetas = [0.9, 1.5]", "betas is .*, expected below 1"),
        ("[training]\ndtype = 'float64'", "dtype is 'float64', expected one of float32, bfloat16"),
        ("training = 3", r"training is 3, expected a table \[training\]"),
        ("[training\n", "expected a TOML file"),
        ("[optimizer]\nlearning_rate = 1.0", r"unknown learning_rate, expected lr \(nanoGPT: learning_rate\)"),
        ("[model]\nnum_hidden_layers = 2", r"expected n_layer \(transformers: num_hidden_layers\)"),
        ("[training]\nglobal_batch_size = 2", r"expected batch \(litgpt: global_batch_size\)"),
    ],
    ids=lambda v: "",
)
def test_bad_files_are_one_sentence_with_the_right_name(text, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        read_config_file(file(tmp_path, text))
    assert str(error.value).startswith(str(tmp_path / "run.toml")) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"preset": "gpt2", "init": "x"}, "preset is gpt2 and init is x, expected one of the two"),
        ({"vocab": 300, "tokenizer": "x"}, "vocab is 300, expected none with the tokenizer of x"),
        ({"tokens": 300}, "tokens is 300, expected at most block_size 256"),
        ({"rotary_base": 5.0}, "rotary_base: got it with position learned, expected it only with position rotary"),
        ({"balance_loss": 0.5}, "balance_loss: got it with experts 0, expected it only with experts set"),
        ({"head_bias": True}, "head_bias is True, expected false with tied_head"),
        ({"sample_tokens": 5}, r"sample_tokens: got it with prompts \[\], expected it only with prompts set"),
        ({"sample_temperature": 0.0}, "sample_temperature: got it with prompts"),
        ({"n_head": 5}, "n_embd is 192, expected a multiple of n_head 5"),
    ],
    ids=str,
)
def test_values_that_contradict_each_other_or_would_be_ignored_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        RunConfig.of(values)


def test_the_vocabulary_is_the_tokenizers_unless_given_and_never_smaller():
    assert RunConfig.of({}).model_config(300).vocab_size == 300
    assert RunConfig.of({"vocab_size": 512}).model_config(300).vocab_size == 512
    with pytest.raises(ValueError, match="vocab_size is 299, expected at least 300, the tokenizer's size"):
        RunConfig.of({"vocab_size": 299}).model_config(300)


def test_fields_replace_those_of_the_preset_and_derived_sizes_follow():
    config = RunConfig.of({"preset": "gpt2", "n_embd": 384, "n_head": 6, "dropout": 0.1}).model_config()
    assert (config.n_layer, config.n_inner, config.head_dim, config.attention_dropout) == (12, 1536, 64, 0.1)
    assert RunConfig.of({"preset": "gpt2"}).train.tokens == 1024, "the model's block_size"


def test_config_toml_gives_the_same_config_and_flags_win_over_it(tmp_path):
    given = {"preset": "gpt2", "n_layer": 6, "windows": (None, 16), "lr": 2e-3, "text": ("/a b",), "dropout": 0.1,
             "dtype": torch.bfloat16, "betas": (0.8, 0.9), "bias": ("mlp",)}  # fmt: skip
    config = RunConfig.of(given)
    write_run_file(tmp_path, config, config.model_config(300))
    values = read_run_file(tmp_path)
    assert RunConfig.of(values).values() | {"n": 0} == {**config.values(), "n": 0} | RunConfig.of(values).fields
    assert RunConfig.of(values).model_config(300) == config.model_config(300)
    again = read_config_file(str(tmp_path / "config.toml"))
    larger = RunConfig.of({**again, "preset": "gpt2-medium"}).model_config(300)
    assert (larger.n_embd, larger.n_inner, larger.n_layer, larger.dropout) == (1024, 4096, 6, 0.1)
    assert set(values) | {"vocab_size"} == set(run_settings()), "every setting is written"
    text = (tmp_path / "config.toml").read_text()
    (tmp_path / "config.toml").write_text(text.replace("lr = 0.002", "lr = 0.003"))
    with pytest.raises(ValueError, match=r"config.toml.*; --config .*config.toml begins another run"):
        read_run_file(tmp_path)


def test_a_table_of_values_is_an_inline_table_of_toml_and_json_of_a_flag(tmp_path):
    config = RunConfig.of({"preset": "llama-3.2-1b"})
    write_run_file(tmp_path, config, config.model_config(300))
    assert 'rope_scaling = {rope_type = "llama3", ' in (tmp_path / "config.toml").read_text()
    assert RunConfig.of(read_run_file(tmp_path)).model_config(300) == config.model_config(300)
    setting, given = run_settings()["rope_scaling"], {"rope_type": "linear", "factor": 2.0}
    assert setting.read('{"rope_type": "linear", "factor": 2.0, "beta_fast": null}', is_text=True) == given
    for text in ("[1]", "linear", "{"):
        with pytest.raises(ValueError, match="expected a table of values or none"):
            setting.read(text, is_text=True)


def test_the_listing_has_every_setting_and_marks_changes():
    config = RunConfig.of({"steps": 7, "n_layer": 2})
    text = listing(config, config.model_config(300), CPU)
    words = " ".join(text.split())
    assert all(f"{name} " in words for name in run_settings())
    assert "steps 7 (default 1000)" in words and "n_layer 2 (default 4)" in words and "lr 0.001," in words
    assert "none)" not in words.replace("(default none)", ""), "what a run chooses is shown"


def test_names_of_other_programs_lead_to_settings_that_exist():
    for ours, theirs in SYNONYMS.items():
        assert ours.startswith("--") or ours in run_settings(), ours
        assert len(theirs) == len(PROGRAMS) and any(theirs)
        for name in " ".join(theirs).split():
            assert our_name(name, run_settings()) is not None
    assert our_name("train.global-batch-size", run_settings()).startswith("expected batch (")
    assert our_name("eval.max_iters", run_settings()).startswith("expected validation_batches (")
    assert our_name("nothing", run_settings()) is None
    for name in ("training.seed", "train.min_lr", "optimizer.init_args.weight_decay"):
        assert our_name(name, run_settings()) == f"expected {name.rpartition('.')[2]}", "our own name behind a section"
    assert our_name("train.log_interval", run_settings()) == "expected none: metrics.jsonl has every step"


def test_every_setting_has_one_line_of_help():
    for name, declared in run_settings().items():
        assert declared.help and "\n" not in declared.help, name
        assert declared.default is None or from_text(
            declared.kind,
            [show(v, quoted=False) for v in declared.default] if isinstance(declared.default, tuple)
            else show(declared.default, quoted=False),
        ) == declared.default, name  # fmt: skip


# Recipes: name -> millions of parameters, tokens per update at the end, peak learning rate, all from the papers. The
# printed heads of GPT-3 1.3B (24 of 128) make it larger than its printed 1320; see engine/model/presets.py.
PAPERS = {
    "gpt1": (117, 64 * 512, 2.5e-4), "gpt2": (124, 512 * 1024, 6e-4),
    "gpt3-125m": (125, 0.5e6, 6.0e-4), "gpt3-350m": (356, 0.5e6, 3.0e-4), "gpt3-760m": (760, 0.5e6, 2.5e-4),
    "gpt3-1.3b": (1517, 1e6, 2.0e-4), "gpt3-2.7b": (2650, 1e6, 1.6e-4), "gpt3-6.7b": (6660, 2e6, 1.2e-4),
    "gpt3-13b": (12850, 2e6, 1.0e-4), "gpt3-175b": (174600, 3.2e6, 0.6e-4),
    "chinchilla-70b": (70000, 3e6, 1e-4), "palm-8b": (8630, 2048 * 2048, None),
    "nanogpt-shakespeare": (10.65, 64 * 256, 1e-3), "nanogpt-shakespeare-cpu": (0.80, 12 * 64, 1e-3),
    "nanogpt-gpt2-124m": (124, 491520, 6e-4), "tiny": (None, 8 * 256, 2e-3),
}  # fmt: skip
VOCAB = {"nanogpt-shakespeare": 65, "nanogpt-shakespeare-cpu": 65}


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_has_the_values_of_its_paper(name):
    config = RunConfig.of(read_config_file(name), CPU)
    millions, tokens, lr = PAPERS[name]
    model, schedule = config.model_config(VOCAB.get(name)), Schedule(config.train)
    if millions is not None:
        # nanoGPT leaves the positions out of its number.
        positions = model.block_size * model.n_embd if name.startswith("nanogpt-shakespeare") else 0
        assert (parameter_count(model) - positions) / 1e6 == pytest.approx(millions, rel=0.035)
    assert config.train.batch * config.train.tokens == pytest.approx(tokens, rel=0.08)
    assert lr is None or config.train.lr == lr
    steps = schedule.steps(10**9)
    rates = [schedule.lr(step, steps) for step in range(0, steps, max(1, steps // 2000))]
    assert max(rates) == pytest.approx(config.train.lr, rel=0.01) and rates[0] <= 0.02 * config.train.lr
    assert Path(__file__).parents[3].joinpath("engine/training/recipes", f"{name}.toml").read_text().startswith("# ")


def test_the_schedules_of_the_papers():
    gpt1, gpt3, palm, chinchilla = (
        RunConfig.of(read_config_file(name)).train for name in ("gpt1", "gpt3-125m", "palm-8b", "chinchilla-70b")
    )
    steps = Schedule(gpt1).steps(10**9)
    assert steps == 100 * 10**9 // (64 * 512) and Schedule(gpt1).lr(1999, steps) == 2.5e-4
    assert Schedule(gpt1).lr(steps - 1, steps) < 1e-9
    schedule = Schedule(gpt3)
    steps = schedule.steps()
    assert schedule.batch(0) * 2048 == 32768 and schedule.batch(steps - 1) == 256
    warm = next(step for step in range(steps) if schedule.tokens(step + 1) >= 375e6)
    assert schedule.lr(warm, steps) == pytest.approx(6e-4, rel=1e-3)
    late = next(step for step in range(steps - 1, 0, -1) if schedule.tokens(step) <= 260e9)
    assert schedule.lr(late, steps) == pytest.approx(6e-5, rel=1e-3) == schedule.lr(steps - 1, steps)
    assert abs(schedule.tokens(steps) - 300e9) < 1e6
    batches = [Schedule(palm).batch(step) for step in (0, 49_999, 50_000, 114_999, 115_000)]
    assert batches == [512, 512, 1024, 1024, 2048]
    assert Schedule(palm).steps() == 255_000
    assert Schedule(chinchilla).batch(0) == 768 and Schedule(chinchilla).batch(Schedule(chinchilla).steps() - 1) == 1536


def test_every_recipe_is_known_and_an_unknown_one_is_refused():
    assert sorted(PAPERS) == recipe_names()
    with pytest.raises(ValueError, match="--config: got 'gpt9', expected a TOML file or one of the recipes chinchilla"):
        read_config_file("gpt9")
    assert GPTConfig(**PRESETS["gpt2"]) == RunConfig.of({"preset": "gpt2"}).model_config()
