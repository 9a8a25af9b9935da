"""Weights of 8 and 4 bits: the formats, the products' error and bits, folders and `peakgpt quantize`.

Mutations that these tests detect: sums that start at 0 although the instruction takes unsigned weights; swapped
nibbles; the first block's scale used for all blocks; tiles of fewer rows read with the stride of 8; a block length that
depends on the batch or the threads; scales cast to the model's dtype; a loss without the head.
"""

import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F

from peakgpt.bench.check import FLOOR
from peakgpt.cli import main
from peakgpt.engine.checkpoint.quantized.folder import write_quantized
from peakgpt.engine.checkpoint.quantized.weights import quantize_state
from peakgpt.engine.data.tokenizer import Tokenizer
from peakgpt.engine.data.tokenizer_training import train_tokenizer
from peakgpt.engine.gpt import GPT
from peakgpt.engine.inference.chunk import Chunk
from peakgpt.engine.inference.program_executor import ProgramExecutor
from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.model.quantized_linear import Format, QuantizedLinear
from peakgpt.kernels.core.dispatch import use_backend
from peakgpt.kernels.cpu import linear_q4 as cpu_q4
from peakgpt.kernels.cpu import linear_q8 as cpu_q8
from peakgpt.kernels.ops.linear_quantized import linear_q4, linear_q8
from peakgpt.kernels.ops.quantize import (
    GROUPS,
    LEVELS,
    dequantize_4,
    dequantize_8,
    pack_4,
    pack_8,
    quantize_4,
    quantize_8,
    round_inputs,
    unpack_4,
    unpack_8,
)

CONFIG = GPTConfig(vocab_size=300, block_size=80, n_layer=2, n_embd=48, n_head=3)
DTYPES = (torch.float32, torch.bfloat16)
FORMATS = (Format(8), Format(4, 32), Format(4, 64), Format(4, 128))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def packed(w, form):
    """Return the op as a function of (x, b), and its dequantized weight in float64."""
    width = w.shape[1]
    if form.bits == 8:
        q, scale = quantize_8(w)
        panels = pack_8(q)
        return lambda x, b=None: linear_q8(x, panels, scale, b), dequantize_8(q, scale.double())
    stored = quantize_4(w, form.group)
    panels, scale = pack_4(*stored)
    call = lambda x, b=None: linear_q4(x, panels, scale, b, out=w.shape[0], group=form.group)  # noqa: E731
    return call, dequantize_4(stored[0], stored[1].double(), width, form.group)


# ---- formats ----


def test_8_bit_weights_are_rounded_to_nearest():
    w = torch.randn(17, 200) * torch.logspace(-6, 6, 17)[:, None]
    w[3], w[5, 7] = 0.0, 0.0
    q, scale = quantize_8(w)
    assert q.abs().amax(1).tolist() == [127] * 3 + [0] + [127] * 13
    assert ((dequantize_8(q, scale) - w).abs() <= scale[:, None] * 0.5001).all()


@pytest.mark.parametrize("group", GROUPS)
def test_4_bit_levels_lose_less_than_uniform_levels(group):
    """The reference is llama.cpp's Q4_0; for normal weights and for weights with heavy tails."""
    for w in (torch.randn(64, 3 * group), torch.randn(64, 3 * group) / torch.rand(64, 3 * group).sqrt()):
        q, scale = quantize_4(w, group)
        error = (dequantize_4(q, scale, w.shape[1], group) - w).square().mean()
        groups = w.view(-1, group)
        step = groups.gather(1, groups.abs().argmax(1, keepdim=True)) / -8  # as in Q4_0
        uniform = (groups / step).round().clamp(-8, 7) * step
        assert error < 0.88 * (uniform - groups).square().mean()


def test_weights_on_4_bit_levels_are_quantized_without_loss():
    """Dequantization restores every bit, also with negative scales and an incomplete last group."""
    index, scale = torch.randint(16, (9, 150)), torch.randn(9, 3).bfloat16()
    index[:, ::20] = 0  # every group has the outermost level
    w = torch.tensor(LEVELS)[index] * scale.float().repeat_interleave(64, 1)[:, :150]
    q, stored_scale = quantize_4(w, 64)
    assert torch.equal(dequantize_4(q, stored_scale, 150, 64), w) and torch.equal(stored_scale, scale)


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (16, 8), (17, 9), (33, 66), (5, 130)])
def test_packed_weights_unpack_to_the_same_values(rows, width):
    q, _ = quantize_8(torch.randn(rows, width))
    assert torch.equal(unpack_8(pack_8(q), rows, width), q)
    stored = quantize_4(torch.randn(rows, width), 32)
    back = unpack_4(*pack_4(*stored), rows, width)
    assert all(torch.equal(a, b) for a, b in zip(back, stored, strict=True))


def test_inputs_are_rounded_per_block():
    x = torch.randn(3, 70)
    x[1, 40], x[2, 3], x[0, 64:] = 1000.0, math.inf, 0.0
    rounded = round_inputs(x, 32)
    assert rounded[2, :32].isnan().all() and rounded[:, 32:].isfinite().all()
    step = F.pad(x[:2], (0, 26)).view(2, 3, 32).abs().amax(2) / 127
    assert ((rounded - x)[:2].abs() <= 0.5001 * step.repeat_interleave(32, 1)[:, :70]).all()
    assert (x - rounded)[1, :32].abs().max() < 0.02 < (x - rounded)[1, 32:64].abs().max()


def test_bad_arguments_of_quantized_products_are_named_in_the_error():
    w, x = torch.randn(20, 40), torch.randn(2, 40)
    for call, message in (
        (lambda: quantize_8(w[0]), r"quantize: got torch.float32 of shape \(40,\), expected a floating matrix"),
        (lambda: quantize_8(w / 0), "got infinities or NaN in the weight, expected finite numbers"),
        (lambda: quantize_4(w, 48), "group is 48, expected one of 32, 64, 128"),
        (lambda: linear_q8(x, pack_8(quantize_8(w)[0]), torch.ones(33)), r"w has shape \(2, 10, 16, 4\), expected \(3"),
        (
            lambda: linear_q8(x, pack_8(quantize_8(w)[0]).int(), torch.ones(20)),
            "w is torch.int32 on cpu, expected uint8",
        ),
        (
            lambda: linear_q4(x, *pack_4(*quantize_4(w, 32)), out=20),
            r"scale has shape \(2, 2, 16\), expected \(2, 1, 16",
        ),
        (lambda: linear_q8(x, pack_8(quantize_8(w)[0]), torch.ones(20), activation="tanh"), "activation is 'tanh'"),
        (lambda: Format(5), "bits is 5, expected 8 or 4"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# ---- products ----


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_quantized_products_stay_within_the_error_rule(isa, form):
    """The error against float64 is below 1 % of the norm, and within half a rounding step of each input."""
    w, x, b = torch.randn(70, 300), torch.randn(13, 300), torch.randn(70)
    call, exact = packed(w, form)
    block = 128 if form.bits == 8 else form.group
    truth = x.double() @ exact.t()
    assert (call(x) - truth).norm() < 0.01 * truth.norm()
    x[:, 17] *= 50  # an outlier costs precision in its own block only
    y, truth = call(x, b), x.double() @ exact.t() + b.double()
    steps = F.pad(x, (0, -300 % block)).view(13, -1, block).abs().amax(2) / 127
    bound = 0.5001 * steps.repeat_interleave(block, 1)[:, :300].double() @ exact.abs().t() + 1e-4
    assert ((y - truth).abs() <= bound).all()
    rounded = round_inputs(x, block).double() @ exact.t() + b.double()
    torch.testing.assert_close(y.double(), rounded, rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_quantized_products_accept_strides_and_leading_axes(form, dtype):
    call, _ = packed(torch.randn(33, 40), form)
    x = torch.randn(3, 2, 80).to(dtype)[..., ::2]
    y = call(x)
    assert y.shape == (3, 2, 33) and torch.equal(y, call(x.contiguous()))
    assert torch.equal(y[2, 1], call(x[2, 1]))


def in_batches(call, x):
    return [call(x), *(torch.cat([call(p) for p in x.split(n)]) for n in (1, 3, 8, 20, 40))]


def same(results):
    return all(torch.equal(results[0], r) for r in results[1:])


def plant_block_length(monkeypatch, count):
    """Plant a bug that both tests below must detect: a block length that depends on count(x)."""
    real = cpu_q8.multiply

    def planted(bits, out, x, w, scale, b, block, activation, saved=()):
        real(bits, out, x, w, scale, b, 64 if bits == 8 and count(x) > 4 else block, activation)

    for module in (cpu_q8, cpu_q4):
        monkeypatch.setattr(module, "multiply", planted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_quantized_products_have_the_same_bits_in_any_batch(isa, form, dtype, monkeypatch):
    call, _ = packed(torch.randn(83, 200), form)
    x = torch.randn(45, 200).to(dtype)
    assert same(in_batches(call, x))
    if form.bits == 8:
        plant_block_length(monkeypatch, len)
        assert not same(in_batches(call, x)), "the check does not detect the planted bug"


@pytest.mark.parametrize("rows", (1, 45))
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_quantized_products_have_the_same_bits_for_any_threads(form, rows, threads, monkeypatch):
    call, _ = packed(torch.randn(300, 200), form)
    x = torch.randn(rows, 200)

    def by_threads():
        results = []
        for count in (1, 2, 3, 5):
            threads(count)
            results.append(call(x))
        return results

    assert same(by_threads())
    if form.bits == 8:
        plant_block_length(monkeypatch, lambda x: torch.get_num_threads())
        assert not same(by_threads()), "the check does not detect the planted bug"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_input_gradient_is_the_product_with_the_dequantized_weight(isa, form, dtype):
    """For fewer and more rows than a tile, outputs around a panel, and more outputs than a block of the sum has.

    Mutations that make it fail: the lower half of each byte read twice; scales of the first group for all groups.
    """
    for rows, out, width in ((1, 33, 40), (19, 15, 300), (70, 2500, 83)):
        call, exact = packed(torch.randn(out, width), form)
        x = torch.randn(rows, width).to(dtype).requires_grad_()
        b, dy = torch.randn(out).to(dtype).requires_grad_(), torch.randn(rows, out).to(dtype)
        dx, db = torch.autograd.grad(call(x, b), (x, b), dy)
        torchs = (dy @ exact.to(dtype), dy.sum(0))
        for ours, theirs, truth in zip((dx, db), torchs, (dy.double() @ exact, dy.double().sum(0)), strict=True):
            limit = 2 * (theirs - truth).abs().max() + FLOOR[dtype] * truth.abs().max()
            assert ours.dtype == dtype and (ours - truth).abs().max() <= limit, (rows, out, width)


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_input_gradient_has_the_same_bits_in_any_batch_and_for_any_threads(isa, form, threads):
    call, _ = packed(torch.randn(300, 200), form)
    x, dy = torch.randn(45, 200, requires_grad=True), torch.randn(45, 300)

    def gradient(rows=slice(None)):
        part = x[rows].detach().requires_grad_()
        return torch.autograd.grad(call(part), part, dy[rows])[0]

    results = [gradient(), torch.cat([gradient(slice(i, i + 9)) for i in range(0, 45, 9)])]
    for count in (1, 2, 5):
        threads(count)
        results.append(gradient())
    assert same(results)


def test_forward_saves_no_tensor_of_the_inputs_size_for_backward():
    """QLoRA's memory: backward needs the weight alone, and with an activation also its input."""
    call, _ = packed(torch.randn(33, 40), Format(4))
    y = call(torch.randn(500, 40, requires_grad=True))
    saved = [t for t in y.grad_fn.saved_tensors if t is not None]
    assert sum(t.nbytes for t in saved) < 40 * 33


def test_a_gradient_of_the_scale_takes_the_eager_function():
    w, x = quantize_8(torch.randn(33, 40)), torch.randn(5, 40)
    scale = w[1].clone().requires_grad_()
    assert linear_q8.explain(x, pack_8(w[0]), scale)["cpu"] == "has no gradient for scale yet"
    y = linear_q8(x, pack_8(w[0]), scale)
    dy = torch.randn_like(y)
    (grad,) = torch.autograd.grad(y, scale, dy)
    expected = (dy.double() * (round_inputs(x, 128).double() @ w[0].double().t())).sum(0)
    torch.testing.assert_close(grad.double(), expected, rtol=1e-5, atol=1e-4)


# ---- models ----


@pytest.fixture
def checkpoint(tmp_path):
    """A folder with a model, its tokenizer, and a text."""
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog, and the dog sleeps on\n" * 20)
    tokenizer = train_tokenizer([text.read_text()], 300)
    model = GPT(GPTConfig(**{**vars(CONFIG), "vocab_size": tokenizer.vocab_size}))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4.0 if p.dim() > 1 else 1.0)
    model.save_pretrained(tmp_path / "float", tokenizer)
    return tmp_path


def quantized(checkpoint, bits, group=64):
    out = checkpoint / f"out{bits}-{group}"
    groups = ["--group", str(group)] if bits == 4 else []
    assert main(["quantize", str(checkpoint / "float"), str(out), "--bits", str(bits), *groups]) == 0
    return out


@pytest.mark.parametrize(("bits", "group"), [(8, 64), (4, 32), (4, 64)])
def test_a_quantized_folder_loads_as_the_rounded_model(checkpoint, bits, group):
    """Logits and loss are those of the float model with rounded weights, up to the rounding of inputs."""
    model, exact = (GPT.from_pretrained(f) for f in (quantized(checkpoint, bits, group), checkpoint / "float"))
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    assert len(layers) == 4 * CONFIG.n_layer + 1 and layers["lm_head"].form.bits == 8
    assert all(layer.form.bits == bits for name, layer in layers.items() if name != "lm_head")
    rounded, state = quantize_state(exact.state_dict(), Format(bits, group)), dict(exact.state_dict())
    for name in layers:
        source = "transformer.wte" if name == "lm_head" else name
        q, scale, width = rounded[f"{source}.q"], rounded[f"{source}.scale"], state[f"{source}.weight"].shape[1]
        is_8_bit = bits == 8 or name == "lm_head"
        restored = dequantize_8(q, scale) if is_8_bit else dequantize_4(q, scale, width, group)
        state[f"{source}.weight"] = restored
    exact.load_state_dict(state)
    ids = torch.randint(model.config.vocab_size, (3, 71))
    with torch.no_grad():
        logits, exact_logits = model(ids), exact(ids)
        assert (logits - exact_logits).norm() < 0.03 * exact_logits.norm()
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        torch.testing.assert_close(model(ids[:, :-1].contiguous(), ids[:, 1:].contiguous()), loss)
        with use_backend("eager"):
            assert (logits - model(ids)).norm() < 0.01 * logits.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", (8, 4))
def test_quantized_logits_have_the_same_bits_in_any_batch(checkpoint, bits, dtype, monkeypatch):
    model = GPT.from_pretrained(quantized(checkpoint, bits)).to(dtype)
    assert model.lm_head.scale.dtype == torch.float32
    ids = torch.randint(model.config.vocab_size, (5, 70))

    @torch.no_grad()
    def in_batches():
        return model(ids), torch.cat([model(ids[:1]), model(ids[1:3]), model(ids[3:])])

    assert torch.equal(*in_batches())
    assert model.generate(ids[:1, :5], max_new_tokens=6).shape == (1, 11)
    if bits == 8:
        plant_block_length(monkeypatch, len)
        assert not torch.equal(*in_batches()), "the check does not detect the planted bug"


def test_untied_heads_and_gated_mlps_are_quantized(tmp_path):
    changes = {"tied_head": False, "gated_mlp": True, "activation": "silu", "norm": "rms", "bias": False}
    config = GPTConfig(**{**vars(CONFIG), **changes})
    model = GPT(config)
    with pytest.warns(UserWarning, match="no layout of transformers"):
        model.save_pretrained(tmp_path / "float")
    restored = GPT.from_pretrained(quantized(tmp_path, 8))
    assert torch.equal(restored.transformer.wte.weight, model.transformer.wte.weight)
    ids = torch.randint(300, (2, 9))
    with torch.no_grad():
        assert (restored(ids) - model.eval()(ids)).norm() < 0.03 * model(ids).norm()


@pytest.mark.parametrize("form", FORMATS[:2], ids=str)
def test_experts_are_quantized_one_by_one(form, tmp_path):
    """The program and the modules compute the same; folders of older releases have tensors of single experts."""
    config = dataclasses.replace(CONFIG, experts=3, experts_every=1, expert_inner=33, gated_experts=True, bias=("mlp",))
    model, ids = GPT(config).eval(), torch.randint(300, (1, 9))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    with pytest.warns(UserWarning, match="own layout"):
        model.save_pretrained(tmp_path / "float")
    state = quantize_state(model.state_dict(), form)
    name = "transformer.h.1.mlp.experts.c_gate"
    alone = quantize_state({"transformer.h.1.mlp.c_gate.weight": model.state_dict()[f"{name}.weight"][2]}, form)
    assert torch.equal(state[f"{name}.q"][2], alone["transformer.h.1.mlp.c_gate.q"])
    older = {n: t for n, t in state.items() if ".experts." not in n}
    for stacked in state.keys() - older.keys():
        older |= {stacked.replace(".experts.", f".experts.{e}."): t for e, t in enumerate(state[stacked])}
    outputs = []
    for folder, tensors in (("new", state), ("old", older)):
        write_quantized(tmp_path / "float", tmp_path / folder, tensors, form)
        again = GPT.from_pretrained(tmp_path / folder)
        with torch.no_grad():
            outputs.append(again(ids)[0])
        program = ProgramExecutor(again, 1).step([Chunk(ids[0], 0, [0], num_logits=9)])
        torch.testing.assert_close(program, outputs[-1], rtol=1e-4, atol=1e-4)
    assert torch.equal(*outputs)


def test_quantize_prints_the_perplexity_before_and_after(checkpoint, capsys):
    out = checkpoint / "out"
    arguments = ["quantize", str(checkpoint / "float"), str(out), "--bits", "4", "--text", str(checkpoint / "text.txt")]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    before, after = (float(part.split()[0].rstrip(",")) for part in printed.split(": ")[-1].split(", "))
    model = GPT.from_pretrained(checkpoint / "float")
    tokenizer = Tokenizer.load(out)
    ids = torch.tensor([tokenizer.end_id, *tokenizer.encode((checkpoint / "text.txt").read_text())])
    size, nll, end = model.config.block_size, 0.0, 1
    with torch.no_grad():
        while end < len(ids):  # every token once, in windows that move by half of their length
            begin, end = end, min(len(ids), end + size // 2 if end > 1 else size)
            x = ids[max(end - size, 0) : end]
            nll -= model(x[None, :-1])[0].log_softmax(-1)[range(len(x) - 1), x[1:]][begin - end :].sum()
    assert before == pytest.approx(math.exp(nll / (len(ids) - 1)), rel=1e-4)
    assert after == pytest.approx(before, rel=0.2) and after != before
    for folder, value in (("float", before), ("out", after)):  # Regression: two perplexities for one model and text
        assert main(["score", str(checkpoint / folder), "--text", str(checkpoint / "text.txt")]) == 0
        assert f"perplexity {value:.4f} of" in capsys.readouterr().out


def test_transformers_refuses_a_quantized_folder(checkpoint):
    """Regression: transformers opened a model.safetensors without its tensors, and continued with random weights."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    out = quantized(checkpoint, 8)
    for loader in (transformers.AutoModelForCausalLM, transformers.GPT2LMHeadModel):
        with pytest.raises(OSError, match=r"no file named model\.safetensors"):
            loader.from_pretrained(out)


def test_quantized_folders_with_older_file_names_load(checkpoint):
    ids, out = torch.randint(CONFIG.vocab_size, (1, 9)) % 250, quantized(checkpoint, 8)
    expected = GPT.from_pretrained(out)(ids)
    (out / "quantised.safetensors").rename(out / "model.safetensors")
    assert torch.equal(GPT.from_pretrained(out)(ids), expected)
    (out / "model.safetensors").rename(out / "quantised.safetensors")
    GPT.from_pretrained(checkpoint / "float").save_pretrained(out)
    assert not (out / "quantised.safetensors").exists() and GPT.from_pretrained(out)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "pytorch_model.bin", "quantised.safetensors", "model-00001-of-00002.safetensors",
             "consolidated.00.pth", "adapter_model.safetensors", "training_state.safetensors", "model.gguf",
             "MODEL.SAFETENSORS", "weights.npz", "README.md", ".hidden"]
)  # fmt: skip
def test_quantize_never_writes_into_a_folder_with_files(checkpoint, name, capsys):
    """Regression: it deleted a tuned model whose folder was given as OUT."""
    out = checkpoint / "tuned"
    out.mkdir()
    (out / name).write_bytes(b"the only copy")
    assert main(["quantize", str(checkpoint / "float"), str(out), "--bits", "8"]) == 2
    assert f"has {name} already, expected a new or an empty folder" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == [name] and (out / name).read_bytes() == b"the only copy"


def test_quantize_copies_links_of_a_hub_cache_and_no_others(checkpoint):
    snapshot = checkpoint / "models--a--b" / "snapshots" / "0123"
    blobs = checkpoint / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, file in enumerate((checkpoint / "float").iterdir()):
        (blobs / str(i)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(blobs / str(i))
    (snapshot / "notes.txt").symlink_to(checkpoint / "text.txt")
    with pytest.warns(UserWarning, match=r"notes\.txt is a link out of its folder and is not copied"):
        assert main(["quantize", str(snapshot), str(checkpoint / "out"), "--bits", "8"]) == 0
    assert not (checkpoint / "out" / "notes.txt").exists()
    assert all(not path.is_symlink() for path in (checkpoint / "out").iterdir())
    assert Tokenizer.load(checkpoint / "out") and GPT.from_pretrained(checkpoint / "out")


def test_bad_quantized_folders_are_named_in_the_error(checkpoint, capsys):
    out, source = quantized(checkpoint, 8), checkpoint / "float"
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "n_layer": 1}))
    with pytest.raises(ValueError, match=r"h.1.attn.c_attn.bias is floating point of shape .*, expected nothing"):
        GPT.from_pretrained(out)
    (out / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "hqq"}}))
    with pytest.raises(ValueError, match="quant_method 'hqq', expected 'peakgpt' of"):
        GPT.from_pretrained(out)
    with pytest.raises(ValueError, match="save_pretrained: got a quantized model"):
        GPT.from_pretrained(quantized(checkpoint, 4)).save_pretrained(checkpoint / "again")
    assert main(["quantize", str(source), str(source), "--bits", "8"]) == 2
    assert "expected another folder than IN" in capsys.readouterr().err
    assert main(["quantize", str(checkpoint / "none"), str(out), "--bits", "8"]) == 2
