"""Checkpoints: logits equal to transformers' both ways, bit-exact resume, and a clear error for each kind of damage."""

import json
import os
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import peakgpt
from peakgpt.engine.checkpoint import model_folder
from peakgpt.engine.model.state_dicts import CONV1D

SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 12, "vocab_size": 37}


def make_model(**changes):
    torch.manual_seed(1)
    model = peakgpt.GPT(peakgpt.GPTConfig(**{**SIZES, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def make_hf_model(**changes):
    torch.manual_seed(2)
    config = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=16, n_positions=12, vocab_size=37, bos_token_id=0, eos_token_id=0, **changes
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


IDS = torch.arange(22).view(2, 11) % 37


@pytest.mark.parametrize(
    "changes",
    [{}, {"activation": "gelu_erf"}, {"activation": "relu", "n_inner": 24}, {"bias": False}, {"dropout": 0.25}],
    ids=lambda c: next(iter(c), "plain"),
)
def test_transformers_loads_our_checkpoints(tmp_path, changes):
    model = make_model(**changes)
    model.save_pretrained(tmp_path / "new" / "folder")
    hf_model, info = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "new" / "folder", output_loading_info=True)
    assert not any(info.values()), info
    torch.testing.assert_close(model(IDS), hf_model.eval()(IDS).logits, rtol=1e-5, atol=1e-5)
    again = peakgpt.GPT.from_pretrained(tmp_path / "new" / "folder")
    assert again.config == model.config and not again.training
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))


@pytest.mark.parametrize("kind", ["plain", "sharded", "bin", "unprefixed", "head", "gelu"])
def test_checkpoints_of_transformers_load(tmp_path, kind):
    hf_model = make_hf_model(activation_function="gelu" if kind == "gelu" else "gelu_new")
    hf_model.save_pretrained(tmp_path, **({"max_shard_size": "4KB"} if kind == "sharded" else {}))
    path = tmp_path / "model.safetensors"
    if kind == "sharded":
        assert not path.exists() and (tmp_path / "model.safetensors.index.json").exists()
    if kind == "bin":
        torch.save(load_file(path), tmp_path / "pytorch_model.bin")
        path.unlink()
    if kind == "unprefixed":  # as in the first GPT-2 checkpoints, which also have masks
        tensors = {name.removeprefix("transformer."): t for name, t in load_file(path).items()}
        save_file({**tensors, "h.0.attn.bias": torch.ones(1, 1, 12, 12)}, path)
    if kind == "head":
        tensors = load_file(path)
        save_file({**tensors, "lm_head.weight": tensors["transformer.wte.weight"].clone()}, path)
    model = peakgpt.GPT.from_pretrained(tmp_path)
    assert model.config.dropout == 0.1
    torch.testing.assert_close(model(IDS), hf_model(IDS).logits, rtol=1e-5, atol=1e-5)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("size", [1, 2500, "4KB", "1GB"])
def test_shards_hold_the_whole_model_within_the_size_limit(tmp_path, size):
    """One tensor per file, some, or all. The tensors equal those of a single file, and transformers reads them."""
    model = make_model()
    model.save_pretrained(tmp_path, max_shard_size=size)
    files = sorted(path for path in tmp_path.iterdir() if path.suffix == ".safetensors")
    parts = [load_file(path) for path in files]
    model.save_pretrained(tmp_path / "whole")
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    assert sum(map(len, parts)) == len(whole) and (len(files) > 1) == (size != "1GB")
    assert len(files) == {1: len(whole), "1GB": 1}.get(size, len(files))
    assert all(torch.equal(t, whole[name]) for part in parts for name, t in part.items())
    limit = {"4KB": 4000, "1GB": 10**9}.get(size, size)
    assert all(len(part) == 1 or sum(t.nbytes for t in part.values()) <= limit for part in parts)
    hf_model, info = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    torch.testing.assert_close(hf_model.eval()(IDS).logits, model(IDS), rtol=1e-5, atol=1e-5)
    again = peakgpt.GPT.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_new_weights_replace_old_ones_in_other_files(tmp_path):
    """A reader takes model.safetensors before an index, and an index may name shards of another model."""
    for layer, size in enumerate((None, "4KB", 2000, None), 1):
        model = make_model(n_layer=layer)
        model.save_pretrained(tmp_path, max_shard_size=size)
        assert torch.equal(peakgpt.GPT.from_pretrained(tmp_path)(IDS), model(IDS))
        index = tmp_path / "model.safetensors.index.json"
        named = set(json.loads(index.read_text())["weight_map"].values()) if size else {"model.safetensors"}
        assert {path.name for path in tmp_path.glob("*.safetensors")} == named and index.exists() == bool(size)


def test_an_interrupted_move_of_shards_never_mixes_two_models(tmp_path, monkeypatch):
    make_model().save_pretrained(tmp_path, max_shard_size="4KB")
    replace, left = os.replace, 3

    def interrupted_replace(source, target):
        nonlocal left
        if not (left := left - 1):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", interrupted_replace)
    with pytest.raises(KeyboardInterrupt):
        make_model(activation="relu").save_pretrained(tmp_path, max_shard_size="4KB")
    with pytest.raises(ValueError, match="got no weights, expected"):
        peakgpt.GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize("size", [0, -5, "5XB", "big", ""])
def test_a_bad_shard_size_is_named_in_the_error(tmp_path, size):
    message = f"max_shard_size is {size!r}, expected a number of bytes, a string such as '5GB'"
    with pytest.raises(ValueError, match=message):
        make_model().save_pretrained(tmp_path, max_shard_size=size)
    assert not list(tmp_path.iterdir())


def test_loading_casts_to_dtype_and_replaces_dropout(tmp_path):
    make_model(dropout=0.1).save_pretrained(tmp_path)
    model = peakgpt.GPT.from_pretrained(tmp_path, dtype=torch.bfloat16, dropout=0.0)
    assert model.config.dropout == 0.0 and {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_three_dropout_rates_are_read(tmp_path):
    make_hf_model(attn_pdrop=0.3).save_pretrained(tmp_path)
    config = peakgpt.GPT.from_pretrained(tmp_path).config
    assert (config.dropout, config.embedding_dropout, config.attention_dropout) == (0.1, 0.1, 0.3)


def test_float32_masters_and_tokenizer_are_saved(tmp_path):
    class Tokenizer:
        begin_id, end_id = None, 5

        def save(self, folder):
            (folder / "tokenizer.json").write_text("{}")

    model = make_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = model.configure_optimizer(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path, Tokenizer(), weights=optimizer.master_weights(model))
    again = peakgpt.GPT.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in before.items())
    assert load_file(tmp_path / "model.safetensors")["transformer.wte.weight"].dtype == torch.float32
    model.save_pretrained(tmp_path / "half", weights=optimizer.master_weights(model), dtype=torch.bfloat16)
    half = load_file(tmp_path / "half" / "model.safetensors")
    assert all(torch.equal(t, before[n].bfloat16().t() if n.endswith(CONV1D) else before[n].bfloat16())
               for n, t in half.items())  # fmt: skip
    shutil.rmtree(tmp_path / "half")
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1, "all files have the mode of the umask"
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == 5


def edit_config(**changes):
    def damage(folder):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return damage


def edit_tensors(change):
    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return damage


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def cut_to(size):
    return lambda folder: os.truncate(folder / "model.safetensors", size)


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 16
    path.write_bytes(data)


def flip_in_a_shard(folder):
    """Flip a bit in a shard that peakgpt wrote, since those have digests."""
    model = peakgpt.GPT.from_pretrained(folder)
    model.save_pretrained(folder, max_shard_size="4KB")
    flip_a_bit(min(folder.glob("model-00002-*")))


def shards(change):
    """Save two shards; `change` damages the first one."""

    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        first = {name: tensors.pop(name) for name in list(tensors)[:5]}
        files = {name: f"{i}.safetensors" for i, part in enumerate((first, tensors)) for name in part}
        save_file(tensors, folder / "1.safetensors")
        save_file(first, folder / "0.safetensors")
        change(folder / "0.safetensors", first, tensors)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))

    return damage


def only_a_pickle(content):
    def damage(folder):
        (folder / "model.safetensors").unlink()
        torch.save(content, folder / "pytorch_model.bin")

    return damage


def only_an_index(text):
    def damage(folder):
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(text)

    return damage


LN_F, WTE, ATTN = "transformer.ln_f.weight", "transformer.wte.weight", "transformer.h.1.attn.c_attn.weight"
DAMAGE = {
    "no config": (lambda f: (f / "config.json").unlink(), r"config.json: No such file"),
    "config not JSON": (write("config.json", "{"), "config.json: .* expected a JSON object"),
    "config a list": (write("config.json", "[]"), "config.json: got a JSON list, expected an object"),
    "foreign": (edit_config(model_type="bert"), "config.json: model_type is 'bert', expected one of gpt2"),
    "activation": (edit_config(activation_function="silu"), "activation_function is 'silu', expected one of"),
    "untied": (edit_config(tie_word_embeddings=False), r"got no tensor lm_head.weight, expected .* \(37, 16\)"),
    "tied by halves": (edit_config(tie_word_embeddings=0.5), "tied_head is 0.5, expected true or false"),
    "cross attention": (edit_config(add_cross_attention=True), "add_cross_attention is True, expected False"),
    "size a string": (edit_config(n_layer="2"), "config.json: GPTConfig: n_layer is '2', expected an integer"),
    "epsilon a string": (edit_config(layer_norm_epsilon="x"), "config.json: "),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "got no weights, expected model.safetensors"),
    "truncated": (
        truncate,
        r"model.safetensors: got \d+ bytes, but transformer\S* ends at byte \d+, expected a whole safetensors file",
    ),
    "truncated in its header": (cut_to(100), "model.safetensors: .*expected a whole safetensors file"),
    "empty": (cut_to(0), "model.safetensors: .*expected a whole safetensors file"),
    "a bit flipped in a shard": (
        flip_in_a_shard, r"model-00002-of-\d{5}.safetensors: transformer\S* has digest \w{16}, expected \w{16}: the f"
    ),
    "a bit flipped": (
        lambda f: flip_a_bit(f / "model.safetensors"),
        r"model.safetensors: transformer\S* has digest \w{16}, expected \w{16}: the f",
    ),
    "a shard truncated": (
        shards(lambda path, *_: path.write_bytes(path.read_bytes()[:-9])),
        r"0.safetensors: got \d+ bytes, but transformer\S* ends at byte \d+, expected a whole safetensors file",
    ),
    "a shard without a tensor": (
        shards(lambda path, first, _: save_file(dict(list(first.items())[1:]), path)),
        "0.safetensors: got no tensor transformer",
    ),
    "a misshapen tensor in a shard": (
        shards(lambda path, first, _: save_file({n: t[:3].clone() for n, t in first.items()}, path)),
        r"0.safetensors: transformer\S* is torch.float32 of shape \(3",
    ),
    "a tensor in two shards": (
        shards(lambda path, first, rest: save_file({**first, LN_F: rest[LN_F]}, path)),
        f"1.safetensors: got tensor {LN_F} again, expected it in one shard",
    ),
    "a name like a path": (edit_tensors(lambda t: t.update({"../x": torch.ones(1)})), r"got tensor \.\./x, "),
    "not safetensors": (write("model.safetensors", "hello"), "model.safetensors: .*expected a whole safetensors"),
    "missing": (edit_tensors(lambda t: t.pop(LN_F)), rf"got no tensor {LN_F}, expected one of shape \(16,\)"),
    "extra": (edit_tensors(lambda t: t.update(x=torch.ones(1))), "got tensor x, expected only the 28 of config.json"),
    "misshapen": (edit_tensors(lambda t: t.update({LN_F: torch.ones(3)})), rf"{LN_F} is .*\(3,\), expected .*\(16,\)"),
    "linear layout": (edit_tensors(lambda t: t.update({ATTN: torch.ones(48, 16)})), r"c_attn.weight is .* \(16, 48\)"),
    "integers": (edit_tensors(lambda t: t.update({LN_F: torch.ones(16, dtype=torch.int32)})), "expected floating"),
    "other head": (edit_tensors(lambda t: t.update({"lm_head.weight": torch.ones(37, 16)})), "expected a tied head"),
    "other size": (edit_config(vocab_size=38), rf"{WTE} is .*\(37, 16\), expected .*\(38, 16\)"),
    "pickle of objects": (only_a_pickle({"x": os.getcwd}), "pytorch_model.bin: .*of tensors only"),
    "pickle of a number": (only_a_pickle({"x": 3}), "pytorch_model.bin: x is a int, expected a tensor"),
    "pickle of a list": (only_a_pickle([torch.ones(1)]), "pytorch_model.bin: got a list, expected tensors by their n"),
    "pickle cut off": (
        lambda f: (only_a_pickle({"x": torch.ones(99)})(f), os.truncate(f / "pytorch_model.bin", 200)),
        "pytorch_model.bin: .*expected an undamaged file of tensors only",
    ),
    "a name like a path in an index": (
        only_an_index('{"weight_map": {"../../x": "a.safetensors"}}'), "a.safetensors: .*expected a whole safetensors"
    ),
    "index without map": (only_an_index("{}"), "got no weight_map"),
    "index of other folders": (only_an_index('{"weight_map": {"x": "../x"}}'), "got no weight_map to files of this"),
    "index of a missing file": (only_an_index('{"weight_map": {"x": "a.safetensors"}}'), "a.safetensors: .*expected a"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_checkpoints_are_named_in_the_error(tmp_path, kind):
    damage, message = DAMAGE[kind]
    make_model().save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        peakgpt.GPT.from_pretrained(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position": "sinusoid"}, "position is 'sinusoid', expected one of learned, rotary, alibi, "),
        ({"activation": "swish"}, "activation is 'swish', expected one of gelu_tanh, gelu_erf, relu"),
        ({"n_head": 3, "head_dim": None}, "n_embd is 16, expected a multiple of n_head 3"),
        ({"n_kv_head": 3}, "n_kv_head is 3, expected a divisor of n_head 2"),
        ({"experts": "8"}, "experts is '8', expected an integer"),
        ({"windows": "all"}, "windows is 'all', expected a list"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:checkpoint")
def test_bad_fields_of_our_own_layout_are_named_in_the_error(tmp_path, changes, message):
    make_model(n_kv_head=1, position="relative_bias").save_pretrained(tmp_path)
    edit_config(**changes)(tmp_path)
    with pytest.raises(ValueError, match=f"config.json: GPTConfig: {message}") as error:
        peakgpt.GPT.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_a_missing_folder_is_named_in_the_error(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere: got no such folder or .gguf file, expected the path of a model"):
        peakgpt.GPT.from_pretrained(tmp_path / "nowhere")


def test_an_interrupted_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    model = make_model()
    model.save_pretrained(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def half(path, tensors, metadata):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(model_folder, "write_safetensors", half)
    for folder in (tmp_path, tmp_path / "new"):
        with pytest.raises(KeyboardInterrupt):
            make_model(activation="relu").save_pretrained(folder)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_weights_are_moved_last(tmp_path, monkeypatch):
    """Old weights under a new config fail by their shapes; new weights under an old config could load and be wrong."""
    moved, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (moved.append(b.name), replace(a, b)))
    make_model().save_pretrained(tmp_path)
    assert moved == ["config.json", "model.safetensors"]


def test_an_unwritable_folder_is_named_in_the_error(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match=f"checkpoint {folder}: .*, expected a folder to write into"):
            make_model().save_pretrained(folder)
    assert os.listdir(tmp_path) == ["file"]


def test_models_without_a_layout_in_transformers_are_saved_in_our_own(tmp_path):
    every = {"n_kv_head": 1, "head_dim": 16, "word_dim": 8, "embedding_norm": True, "windows": (None, 3),
             "bias": ("mlp",), "tied_head": False, "head_bias": True, "attention_dropout": 0.5}  # fmt: skip
    for changes, lacking in (({"position": "relative_bias"}, r"gpt2, lacks position\."), (every, "lacks .*word_dim")):
        model = make_model(**changes)
        with pytest.warns(UserWarning, match=lacking):
            model.save_pretrained(tmp_path)
        again = peakgpt.GPT.from_pretrained(tmp_path)
        assert again.config == model.config and torch.equal(again(IDS), model(IDS))
        with pytest.raises(ValueError, match="peakgpt"):
            transformers.AutoConfig.from_pretrained(tmp_path)


def train(model, optimizer, steps):
    """Train on data from torch's generator. Dropout draws from it too, so a wrong state changes the losses."""
    losses = []
    for _ in range(steps):
        ids = torch.randint(37, (2, 9))
        optimizer.zero_grad()
        loss = model(ids[:, :-1], ids[:, 1:].contiguous())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
