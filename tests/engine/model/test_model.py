"""The model: logits, loss and gradients equal transformers' GPT-2 on every backend; error messages; model FLOPs."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
import transformers

import peakgpt
from peakgpt.engine.model import attention as attention_module
from peakgpt.engine.model import flops
from peakgpt.engine.model.presets import PRESETS, preset
from peakgpt.kernels.core.dispatch import Op, load, use_backend
from peakgpt.kernels.ops.attention import attention_qkv
from peakgpt.kernels.ops.rotary import rotary

SIZES = {"n_layer": 2, "n_head": 3, "n_embd": 48, "block_size": 24, "vocab_size": 97}
BACKENDS = ["auto", "eager", "cpu", "gpu"]
OPS = ("embedding", "layernorm", "add_layernorm", "attention_qkv", "mlp", "linear_cross_entropy", "adamw")


def on(backend):
    """Return a context that forces the backend; skip the test, with the reason, if it lacks an op of the model."""
    if backend == "auto":
        return contextlib.nullcontext()
    missing = [reason for name in OPS if backend != "eager" and isinstance(reason := load(backend, name), str)]
    if missing:
        pytest.skip("; ".join(missing))
    return use_backend(backend)


def reference(**changes):
    """Build a tiny GPT-2 of transformers with large weights; with a std of 0.02 attention would be uniform."""
    sizes = {**SIZES, **changes}
    config = transformers.GPT2Config(
        n_layer=sizes["n_layer"], n_head=sizes["n_head"], n_embd=sizes["n_embd"], n_positions=sizes["block_size"],
        vocab_size=sizes["vocab_size"], resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, use_cache=False,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def twin(hf_model, **changes):
    ours = peakgpt.GPT(peakgpt.GPTConfig(**{**SIZES, **changes}))
    state = {name: tensor for name, tensor in hf_model.state_dict().items() if name != "lm_head.weight"}
    ours.load_state_dict(state, conv1d=True)
    return ours


def batch(rows=2, tokens=17):
    """Return ids and shifted targets, some of which are ignored."""
    ids = torch.randint(SIZES["vocab_size"], (rows, tokens + 1))
    targets = ids[:, 1:].clone()
    targets[0, -3:] = -100
    return ids[:, :-1].contiguous(), targets


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_loss_and_gradients_equal_transformers(backend):
    forced = on(backend)
    torch.manual_seed(0)
    hf_model = reference()
    ours = twin(hf_model)
    ids, targets = batch()
    logits = hf_model(ids).logits
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    with forced:
        torch.testing.assert_close(ours(ids), logits, rtol=1e-5, atol=1e-5)
        ours_loss = ours(ids, targets)
        ours_loss.backward()
    torch.testing.assert_close(ours_loss, loss, rtol=1e-5, atol=1e-5)
    expected = dict(hf_model.named_parameters())
    for name, parameter in ours.named_parameters():
        grad = expected[name].grad
        grad = grad.t() if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else grad
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_twenty_steps_give_the_losses_of_transformers(backend):
    """The reference is transformers' GPT-2 with torch's AdamW and gradient clipping."""
    forced, steps = on(backend), 4 if backend == "gpu" else 20
    torch.manual_seed(0)
    hf_model = reference()
    ours = twin(hf_model)
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
    a = peakgpt.AdamW(ours.parameters(), **options, max_norm=1.0)
    b = torch.optim.AdamW(hf_model.parameters(), **options)
    losses = []
    ids, targets = batch(2, 9) if backend == "gpu" else batch(3, 20)
    for _ in range(steps):
        a.zero_grad()
        with forced if backend == "auto" else use_backend(backend):
            loss = ours(ids, targets)
            loss.backward()
            a.step()
        b.zero_grad()
        expected = F.cross_entropy(hf_model(ids).logits.flatten(0, 1), targets.flatten())
        expected.backward()
        torch.nn.utils.clip_grad_norm_(hf_model.parameters(), 1.0)
        b.step()
        losses.append((loss.item(), expected.item()))
    got, expected = torch.tensor(losses).unbind(1)
    assert expected[-1] < 0.9 * expected[0], "a model that does not learn proves little"
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["auto", "eager", "cpu"])
def test_compiles_as_one_graph(backend):
    forced = on(backend)
    torch.manual_seed(0)
    model = twin(reference())
    ids, targets = batch()
    with forced:
        loss = model(ids, targets)
        loss.backward()
        expected = {name: p.grad for name, p in model.named_parameters()}
        model.zero_grad()
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        ours = compiled(ids, targets)
        ours.backward()
        torch.testing.assert_close(compiled(ids), model(ids))
    torch.testing.assert_close(ours, loss)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, expected[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("backend", ["auto", "eager", "cpu"])
def test_autocast_error_is_at_most_twice_torchs(backend):
    """Weights stay in float32, products are in bfloat16, as with a model in plain torch."""
    forced = on(backend)
    torch.manual_seed(0)
    hf_model = reference()
    ours = twin(hf_model)
    ids, targets = batch()
    wide = ours(ids, targets).detach()
    with torch.autocast("cpu", torch.bfloat16):
        expected = F.cross_entropy(hf_model(ids).logits.float().flatten(0, 1), targets.flatten())
        with forced:
            loss = ours(ids, targets)
    loss.backward()
    assert {p.grad.dtype for p in ours.parameters()} == {torch.float32}
    assert (loss - wide).abs() <= 2 * (expected - wide).abs() + 1e-3


def test_a_forward_pass_of_gpt2_calls_exactly_these_ops(monkeypatch):
    """The benchmarks time these ops; the variants of other families add no call to GPT-2."""
    seen, call = [], Op.__call__
    monkeypatch.setattr(Op, "__call__", lambda self, *args, **kw: (seen.append(self.name), call(self, *args, **kw))[1])
    peakgpt.GPT(peakgpt.GPTConfig(**SIZES))(*batch())
    layer = ["linear", "attention_qkv", "linear", "add_layernorm", "mlp", "add_layernorm"]
    assert seen == ["embedding", "layernorm", *layer * SIZES["n_layer"], "linear_cross_entropy"]


def attention_after_rotary(qkv, cos, sin, *_, n_head, interleaved, **params):
    """Run rotary as a separate op before attention."""
    heads = (n_head + qkv.shape[2]) // 2
    return attention_qkv(rotary(qkv, cos, sin, heads=heads, interleaved=interleaved), n_head=n_head, **params)


@pytest.mark.parametrize(
    "family",
    [{"residual": "parallel_two_norms"}, {"residual": "parallel", "rotary_interleaved": True}],
    ids=("gpt-neox", "gpt-j"),
)
def test_rotary_fused_into_attention_gives_the_losses_of_a_separate_op(family, monkeypatch):
    def losses():
        torch.manual_seed(1)
        small = {**SIZES, "n_layer": 1, "position": "rotary", "rotary_dim": 6}
        model = peakgpt.GPT(peakgpt.GPTConfig(**small, **family))
        optimizer = model.configure_optimizer(lr=1e-2)
        ids, targets = batch()
        steps = []
        for _ in range(6):
            optimizer.zero_grad()
            steps.append(model(ids, targets))
            steps[-1].backward()
            optimizer.step()
        return torch.stack(steps).detach()

    with on("cpu"):
        inside = losses()
        monkeypatch.setattr(attention_module, "attention_qkv", attention_after_rotary)
        torch.testing.assert_close(inside, losses(), rtol=1e-6, atol=0)
    assert inside[-1] < 0.9 * inside[0]


def test_loss_falls_in_bfloat16():
    torch.manual_seed(0)
    model = peakgpt.GPT(peakgpt.GPTConfig(**SIZES))
    optimizer = model.configure_optimizer(lr=1e-2, dtype=torch.bfloat16)
    ids, targets = batch()
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = model(ids, targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_logits_do_not_depend_on_later_tokens():
    model = peakgpt.GPT(peakgpt.GPTConfig(**SIZES))
    ids, _ = batch()
    changed = ids.clone()
    changed[:, 9] = (ids[:, 9] + 1) % SIZES["vocab_size"]
    before, after = model(ids), model(changed)
    assert torch.equal(before[:, :9], after[:, :9]) and not torch.allclose(before[:, 9:], after[:, 9:])


def test_dropout_is_active_in_training_mode_only():
    torch.manual_seed(0)
    model = peakgpt.GPT(peakgpt.GPTConfig(**SIZES, dropout=0.3))
    ids, _ = batch()
    assert not torch.equal(model(ids), model(ids))
    model.eval()
    plain = peakgpt.GPT(peakgpt.GPTConfig(**SIZES))
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(ids), model(ids)) and torch.equal(model(ids), plain(ids))


@pytest.mark.parametrize(
    "changes",
    [
        {"n_kv_head": 1},
        {"head_dim": 8, "n_inner": 20},
        {"bias": False},
        {"n_layer": 1},
        {"attention_softcap": 2.0, "attention_sinks": True},
    ],
)
def test_other_shapes_have_finite_gradients_of_all_parameters(changes):
    config = peakgpt.GPTConfig(**{**SIZES, **changes})
    model = peakgpt.GPT(config)
    model(*batch()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert flops.parameter_count(config) == sum(p.numel() for p in model.parameters())


def test_initialization_is_gpt2s_and_repeatable():
    torch.manual_seed(0)
    model = peakgpt.GPT.from_preset("gpt2-tiny")
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            expected = 0.02 / 8**0.5 if name.endswith("c_proj.weight") else 0.02
            assert abs(parameter.std().item() / expected - 1) < 0.02, name
        else:
            assert (parameter == (0.0 if name.endswith("bias") else 1.0)).all(), name
    torch.manual_seed(0)
    again = peakgpt.GPT.from_preset("gpt2-tiny").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())
    ids = torch.randint(4096, (2, 65))
    assert abs(model(ids[:, :-1], ids[:, 1:].contiguous()).item() - torch.tensor(4096.0).log().item()) < 0.1


@pytest.mark.parametrize("changes", [{}, {"tied_head": False, "head_bias": True}], ids=("fused", "logits"))
def test_return_logits_gives_the_same_loss_and_the_logits(changes):
    model = peakgpt.GPT(peakgpt.GPTConfig(**SIZES, **changes))
    ids, targets = batch()
    loss, logits = model(ids, targets, return_logits=True)
    assert torch.equal(loss, model(ids, targets)) and torch.equal(logits, model(ids))
    assert torch.equal(model(ids, return_logits=True), logits)
    (loss + logits.sum()).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_attention_mask_without_padding_changes_no_bit():
    model = peakgpt.GPT(peakgpt.GPTConfig(**SIZES)).eval()
    ids, _ = batch()
    for dtype in (torch.int64, torch.bool):
        assert torch.equal(model(ids, attention_mask=torch.ones_like(ids, dtype=dtype)), model(ids))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(2, 16), r"got shape \(2, 16\), expected the shape of input_ids, \(2, 17\)"),
        ([[1] * 17] * 2, r"got \[\[1, 1, .*, expected the shape of input_ids"),
        (torch.tensor([[1] * 17, [1] * 16 + [0]]), r"row 1 is \[1, 1, .*, expected zeros \(padding on the left\)"),
        (torch.tensor([[0] * 17, [1] * 17]), "row 0 is .*, expected zeros"),
        (torch.full((2, 17), 2), "row 0 is .*, expected zeros"),
    ],
    ids=("shape", "list", "right padding", "only padding", "values"),
)
def test_attention_masks_other_than_left_padding_raise(mask, message):
    model = peakgpt.GPT(peakgpt.GPTConfig(**SIZES))
    with pytest.raises(ValueError, match=f"attention_mask: {message}"):
        model(batch()[0], attention_mask=mask)


def test_bad_inputs_raise_with_got_and_expected():
    model = peakgpt.GPT(peakgpt.GPTConfig(**SIZES))
    ids, targets = batch()
    bad = [
        ((torch.zeros(1, 25, dtype=torch.int64),), r"shape \(1, 25\) after 0 tokens, expected .* block_size 24"),
        ((ids[0],), r"shape \(17,\) after 0 tokens, expected \(B, T\)"),
        ((ids.float(),), "ids has dtype torch.float32, expected int64 or int32"),
        ((ids + 90,), r"ids has values .*, expected 0 to 96"),
        ((ids - 97,), r"ids has values .*, expected 0 to 96"),
        ((ids, targets.float()), "target has dtype torch.float32, expected int64 or int32"),
        ((ids, targets[:, 1:]), r"target has shape \(2, 16\), expected \(2, 17\)"),
        ((ids, targets * 0 + 97), "target has values 97 to 97, expected 0 to 96"),
    ]
    for arguments, message in bad:
        with pytest.raises(ValueError, match=message):
            model(*arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layer": 0}, "n_layer is 0, expected at least 1"),
        ({"n_embd": 16.0}, "n_embd is 16.0, expected an integer"),
        ({"n_embd": 50}, "n_embd is 50, expected a multiple of n_head 3"),
        ({"n_kv_head": 2}, "n_kv_head is 2, expected a divisor of n_head 3"),
        ({"activation": "swish"}, "activation is 'swish', expected one of gelu_tanh, gelu_erf, relu"),
        ({"dropout": 1.0}, "dropout is 1.0, expected below 1"),
        ({"layer_norm_epsilon": 0.0}, "layer_norm_epsilon is 0.0, expected more than 0"),
        ({"bias": 1}, "bias is 1, expected true or false or a list"),
        ({"bias": ("mlp", "head")}, r"bias is \('mlp', 'head'\), expected true or false, or some of qkv"),
        ({"position": "sinusoid"}, "position is 'sinusoid', expected one of learned, rotary, alibi"),
        ({"residual": "sandwich"}, "residual is 'sandwich', expected one of pre_norm, post_norm, parallel"),
        ({"rotary_dim": 8}, "rotary_dim is 8, expected None as position is learned"),
        ({"position": "rotary", "rotary_dim": 0}, "rotary_dim is 0, expected at least 2"),
        ({"position": "rotary", "rotary_dim": 18}, "rotary_dim is 18, expected an even number up to head_dim 16"),
        ({"position": "rotary", "rotary_dim": 7}, "rotary_dim is 7, expected an even number"),
        ({"position": "rotary", "rotary_base": 0}, "rotary_base is 0, expected more than 0"),
        ({"position": "alibi", "position_offset": 2}, "position_offset is 2, expected 0, or more with learned"),
        ({"position_offset": -1}, "position_offset is -1, expected at least 0"),
        ({"windows": ()}, r"windows is \(\), expected at least one"),
        ({"windows": (None, 0)}, r"windows is \[none, 0\], expected at least 1"),
        ({"windows": 4}, "windows is 4, expected a list"),
        ({"attention_softcap": 0.0}, "attention_softcap is 0.0, expected more than 0"),
        ({"attention_sinks": 1}, "attention_sinks is 1, expected true or false"),
        ({"tied_head": 0}, "tied_head is 0, expected true or false"),
        ({"head_bias": True}, "head_bias is True, expected false with tied_head"),
        ({"attention_dropout": 1.5}, "attention_dropout is 1.5, expected below 1"),
        ({"word_dim": 0}, "word_dim is 0, expected at least 1"),
        ({"activation": "silu"}, "activation is 'silu', expected one of gelu_tanh, gelu_erf, relu$"),
        ({"activation": "swiglu", "gated_mlp": True}, "is 'swiglu', expected one of gelu_.*, silu, clamped_swiglu$"),
        ({"norm": "rms"}, "bias is True, expected no bias of norms, as norm is rms"),
        ({"norm": "batch"}, "norm is 'batch', expected one of layer, rms"),
        ({"logit_scale": 0}, "logit_scale is 0, expected more than 0"),
        ({"logit_softcap": 0}, "logit_softcap is 0, expected more than 0"),
        ({"qk_norm": "layer"}, "qk_norm is 'layer', expected one of none, head, full"),
        ({"norm_offset": 1.0}, "norm_offset is 1.0, expected 0, as norm is layer"),
        ({"experts": -1}, "experts is -1, expected at least 0"),
        ({"experts": 1}, "experts_per_token is 2, expected at most experts 1"),
        ({"experts": 4, "experts_every": 3}, "experts_every is 3, expected at most n_layer 2"),
        ({"z_loss": -1.0}, "z_loss is -1.0, expected at least 0"),
        ({"experts": 4, "balance_loss": -1.0}, "balance_loss is -1.0, expected at least 0"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else "",
)
def test_bad_configs_raise_with_got_and_expected(changes, message):
    with pytest.raises(ValueError, match=message):
        peakgpt.GPTConfig(**{**SIZES, **changes})


def test_presets_are_gpt2_by_default_and_unknown_ones_raise():
    with pytest.raises(ValueError, match="unknown preset: got 'gpt5', expected one of openai-gpt, gpt2, "):
        preset("gpt5")
    with pytest.raises(ValueError, match="preset gpt2: got layers, expected fields of GPTConfig: n_layer, "):
        peakgpt.GPT.from_preset("gpt2", layers=3)
    for name in PRESETS:
        assert preset(name, block_size=8).block_size == 8
    assert preset("gpt2", n_embd=1536).head_dim == 128


def test_model_flops_follow_palms_formula():
    """GPT-2 at T = 1024: N = 124439808 - 1024 * 768 by hand, 12 * 12 * 12 * 64 * 1024 of attention."""
    config, tokens = preset("gpt2"), 1024
    n = 124439808 - 1024 * 768
    assert flops.training_flops(config, tokens) == 6 * n + 12 * 12 * 12 * 64 * tokens
    assert flops.forward_flops(config, tokens) == 2 * n + 4 * 12 * 12 * 64 * tokens
    assert flops.forward_flops(config, tokens, causal=True) == 2 * n + 4 * 12 * 12 * 64 * 1025 / 2
    banded = preset("gpt2", windows=(None, 256))
    assert flops.forward_flops(banded, tokens) == 2 * n + 4 * 6 * 12 * 64 * (1024 + 256)
    reach = sum(min(i + 1, 256) for i in range(tokens)) / tokens
    assert flops.forward_flops(banded, tokens, causal=True) == 2 * n + 4 * 6 * 12 * 64 * (1025 / 2 + reach)
    untied = preset("gpt2", tied_head=False)
    assert flops.forward_flops(untied, tokens) == flops.forward_flops(config, tokens)
    assert flops.mfu(1000.0, 2e9, 4e12) == 0.5
