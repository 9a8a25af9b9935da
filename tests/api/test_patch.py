"""peakgpt.patch on tiny random models of transformers gives the same outputs, gradients and greedy tokens."""

import copy
import importlib

import pytest
import torch
import torch.nn.functional as F
import transformers
from tiny_transformers import BERT, LLAMA, MODELS, batch, build, close, outputs_of, train_step
from torch.nn.functional import scaled_dot_product_attention

import peakgpt
from peakgpt.dropin import attention_function
from peakgpt.dropin.known_classes import KNOWN_CLASSES
from peakgpt.dropin.patching import row_of
from peakgpt.dropin.replacements import layers
from peakgpt.dropin.report import LEFT


@pytest.mark.parametrize("name", MODELS)
def test_patched_model_gives_same_outputs_and_gradients_and_unpatch_restores_bits(name):
    model = build(name)
    inputs, labels = batch(model)
    state = model.state_dict()
    before = outputs_of(model, inputs), train_step(model, labels, inputs)
    has_experts = hasattr(model.config, "num_experts_per_tok")
    report = peakgpt.patch(model, strict=not has_experts)
    assert report.replaced and all(e.kind.endswith(("Experts", "Router")) for e in report.left)
    close(outputs_of(model, inputs), before[0])
    loss, grads = train_step(model, labels, inputs)
    close(loss, before[1][0])
    assert model(**inputs, labels=labels).logits is None
    assert grads.keys() == before[1][1].keys()
    for key, grad in grads.items():
        close(grad, before[1][1][key], 1e-4)
    patched_state = model.state_dict()
    assert list(patched_state) == list(state) and all(patched_state[k].data_ptr() == state[k].data_ptr() for k in state)

    peakgpt.unpatch(model)
    assert torch.equal(outputs_of(model, inputs), before[0])
    again = train_step(model, labels, inputs)
    assert all(torch.equal(again[1][k], g) for k, g in before[1][1].items())
    assert not any("eakgpt" in str(type(m).__mro__) + str(vars(m).keys()) for m in model.modules())


@pytest.mark.parametrize("name", [n for n in MODELS if not n.startswith(("bert", "roberta", "distilbert"))])
def test_patched_model_generates_same_greedy_tokens(name):
    model = build(name).eval()
    model.config.output_router_logits = False  # transformers' balance loss fails in a step with a cache and padding
    inputs, _ = batch(model)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    expected = model.generate(**inputs, **options)
    peakgpt.patch(model, check=False)
    assert torch.equal(model.generate(**inputs, **options), expected)


@pytest.mark.parametrize("name", MODELS)
def test_bf16_autocast_error_is_at_most_twice_the_unpatched_error(name):
    """Errors of loss and gradients against the float32 model, patched versus unpatched."""
    model = build(name)
    inputs, labels = batch(model)
    truth = train_step(model, labels, inputs)

    def errors():
        with torch.autocast("cpu", torch.bfloat16):
            loss, grads = train_step(model, labels, inputs)
        return abs(loss - truth[0]), sum((grads[k] - g).norm() / g.norm().clamp(min=1e-6) for k, g in truth[1].items())

    stock = errors()
    peakgpt.patch(model, check=False)
    ours = errors()
    assert ours[0] <= 2 * stock[0] + 0.01 and ours[1] <= 2 * stock[1]


RATES = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout", "attention_dropout", "hidden_dropout",
                       "activation_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob", "dropout_rate",
                       "resid_dropout", "embed_dropout"), 0.1)  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_dropout_follows_torch_seed_and_keeps_its_rate(name):
    """With the dropout rates in the config, losses have the mean and spread of the unpatched model."""
    known = set(getattr(transformers, MODELS[name][0])().to_dict())
    model = build(name, rate=None, **{n: p for n, p in RATES.items() if n in known})
    inputs, labels = batch(model)

    def losses():
        with torch.no_grad():
            return torch.stack([model.train()(**inputs, labels=labels).loss for _ in range(24)])

    torch.manual_seed(3)
    stock = losses()
    peakgpt.patch(model, check=False)
    torch.manual_seed(3)
    ours = losses()
    assert stock.std() > 0 and ours.std() > 0.4 * stock.std() and stock.std() > 0.4 * ours.std()
    assert abs(ours.mean() - stock.mean()) < 4 * ((ours.var() + stock.var()) / 24) ** 0.5
    torch.manual_seed(3)
    one = train_step(model, labels, inputs)
    torch.manual_seed(3)
    two = train_step(model, labels, inputs)
    assert torch.equal(one[0], two[0]) and all(torch.equal(two[1][k], g) for k, g in one[1].items())


def test_activation_checkpointing_gives_same_gradients_with_dropout():
    model = build(rate=0.3)
    inputs, labels = batch(model)
    peakgpt.patch(model, check=False)
    torch.manual_seed(3)
    expected = train_step(model, labels, inputs)
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        torch.manual_seed(3)
        loss, grads = train_step(model, labels, inputs)
        assert torch.equal(loss, expected[0])
        for key, grad in grads.items():
            close(grad, expected[1][key], 1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"num_items_in_batch": 17}, {"num_items_in_batch": torch.tensor(5)}, {"ignore_index": 7},
        {"logits_to_keep": 4, "shift": slice(-4, None)}, {"shift": slice(None)}, {"return_dict": False},
    ],
    ids=str,
)  # fmt: skip
def test_loss_accepts_the_loss_arguments_of_transformers(options):
    model = build()
    inputs, labels = batch(model)
    labels[1, 3:6] = options.get("ignore_index", -100)
    labels[labels == -100] = options.get("ignore_index", -100)
    options = dict(options)
    if "shift" in options:
        options["shift_labels"] = torch.roll(labels, -1, 1)[:, options.pop("shift")].contiguous()
    expected = model.train()(**inputs, labels=labels, **options)[0]
    peakgpt.patch(model, check=False)
    out = model(**inputs, labels=labels, **options)
    close(out[0], expected)
    assert isinstance(out, tuple) or out.logits is None


def test_eval_returns_logits_and_labels_may_be_positional():
    model = build()
    inputs, labels = batch(model)
    expected = model.eval()(**inputs, labels=labels)
    arguments = [inputs["input_ids"], None, inputs["attention_mask"], None, None, None, None, None, labels]
    peakgpt.patch(model, check=False)
    out = model(*arguments)
    close(out.logits[1:], expected.logits[1:])
    close(out.loss, expected.loss)
    close(model.train()(*arguments).loss, expected.loss)


def test_different_counts_of_labels_and_logits_raise():
    model = build()
    inputs, labels = batch(model)
    peakgpt.patch(model, check=False)
    with pytest.raises(ValueError, match="got 9 positions with logits and 36 labels"):
        model.train()(**inputs, labels=labels, logits_to_keep=3)


def test_custom_loss_function_is_called():
    model = build()
    inputs, labels = batch(model)
    model.loss_function = lambda logits, labels, **_: logits.sum() * 0 + 42.0
    peakgpt.patch(model, check=False)
    assert model.train()(**inputs, labels=labels).loss == 42.0


BLOCKS = {"gpt2": "transformer.h", "opt": "model.decoder.layers", "bart": "model.encoder.layers",
          "bert": "bert.encoder.layer"}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "part"),
    [("gpt2", "attn.c_attn"), ("gpt2", "mlp.c_fc"), ("gpt2", "mlp.c_proj"), ("opt", "fc1"), ("opt", "self_attn.q_proj"),
     ("bart", "fc2"), ("bert", "intermediate.dense")],
)  # fmt: skip
def test_hooks_and_adapters_added_after_patch_take_effect(name, part):
    """A fused MLP must not read the weight of a layer that was wrapped after patching, as PEFT does."""

    class Adapter(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base_layer, self.weight, self.bias = base, base.weight, base.bias

        def forward(self, x):
            return self.base_layer(x) + 1.0

    model = build(name)
    inputs, _ = batch(model)
    adapted = copy.deepcopy(model)
    for each in (model, adapted):
        if each is model:
            peakgpt.patch(each, check=False)
        blocks, (above, _, last) = each.get_submodule(BLOCKS[name]), part.rpartition(".")
        parent = blocks[1].get_submodule(above)
        setattr(parent, last, Adapter(getattr(parent, last)))
        blocks[0].get_submodule(part).register_forward_hook(lambda m, x, y: y * 1.5)
    close(outputs_of(model, inputs), outputs_of(adapted, inputs))


def test_deepcopy_of_patched_model_can_be_unpatched():
    model = build()
    inputs, _ = batch(model)
    expected = outputs_of(model, inputs)
    peakgpt.patch(model, check=False)
    twin = copy.deepcopy(model)
    close(outputs_of(twin, inputs), expected)
    peakgpt.unpatch(twin)
    assert torch.equal(outputs_of(twin, inputs), expected)
    assert type(model.lm_head) is not torch.nn.Linear


def test_no_replacement_shadows_an_attribute_of_its_model():
    """Regression: replacements shadowed `_sample` of GenerationMixin and the child `decoder` of T5."""
    meant = {"forward", "_attn", "feed_forward_chunk", "ff_chunk", "_ff_block"}
    for path, row in KNOWN_CLASSES.items():
        if row.replacement is None or path.rpartition(".")[0] == "torch.nn.modules.activation":
            continue
        module, _, kind = path.rpartition(".")
        kind = getattr(importlib.import_module(module), kind)
        ours = {n for c in row.replacement.__mro__ if c is not object for n in vars(c) if not n.startswith("__")}
        assert {n for n in ours if hasattr(kind, n)} <= meant, path
    for name in MODELS:
        for module in build(name).modules():
            row = row_of(module)
            if row is not None and row.replacement is not None:
                assert not any(hasattr(row.replacement, child) for child, _ in module.named_children())


class Stack(torch.nn.Module):
    """A user's model of torch layers."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, activation="gelu", batch_first=True)
        self.late = torch.nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, norm_first=True)
        self.cross = torch.nn.MultiheadAttention(32, 4, batch_first=True)
        self.norm = torch.nn.LayerNorm((5, 32))

    def forward(self, x, mask, padding):
        x = self.late(self.layer(x, mask, padding).transpose(0, 1)).transpose(0, 1)
        return self.norm(x) + self.cross(x[:, :3], x, x, need_weights=False)[0].sum(1, keepdim=True)


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_torch_layers_in_any_model_give_same_outputs_and_gradients(kind, monkeypatch):
    torch.manual_seed(0)
    model = Stack()
    x = torch.randn(2, 5, 32, requires_grad=True)
    masked = torch.ones(5, 5, dtype=torch.bool).triu(1)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    mask = masked if kind == torch.bool else torch.zeros(5, 5).masked_fill(masked, float("-inf"))

    def run():
        y = model(x, mask, padding)
        return y.detach(), torch.autograd.grad(y.square().sum(), [x, *model.parameters()])

    expected = run()
    report = peakgpt.patch(model)
    assert {e.module: e.note for e in report.left} == {"norm": "normalizes 2 axes, expected the last one"}
    assert "14 layers" in report.check
    calls = []
    real = attention_function.attention
    monkeypatch.setattr(attention_function, "attention", lambda *a, **k: calls.append(1) or real(*a, **k))
    got = run()
    assert len(calls) == 3
    close(got[0], expected[0])
    for ours, stock in zip(got[1], expected[1], strict=True):
        close(ours, stock, 1e-4)
    peakgpt.unpatch(model)
    assert torch.equal(run()[0], expected[0])


class BaseMLP(torch.nn.Module):
    """A user's MLP with options."""

    def __init__(self, act=None, between=0.0, after=0.0, hidden=None, twice=False):
        super().__init__()
        self.fc, self.proj = torch.nn.Linear(16, 40), torch.nn.Linear(40, 16)
        self.act = act or torch.nn.GELU()
        self.between, self.after = torch.nn.Dropout(between), torch.nn.Dropout(after)
        self.hidden, self.twice = hidden, twice

    def forward(self, x):
        h = self.between(self.act(self.fc(x)))
        h = torch.nn.functional.dropout(h, self.hidden, self.training) if self.hidden else h
        return self.after(self.proj(h)) * (2.0 if self.twice else 1.0)


@pytest.mark.parametrize(
    ("module", "fused"),
    [
        (torch.nn.Sequential(torch.nn.Linear(16, 40), torch.nn.GELU("tanh"), torch.nn.Linear(40, 16)), "gelu_tanh"),
        (BaseMLP(after=0.2), "gelu_erf"), (BaseMLP(torch.nn.ReLU(), between=0.2), "relu"),
        (BaseMLP(hidden=0.2), None), (BaseMLP(twice=True), None), (BaseMLP(torch.nn.SiLU()), None),
        (torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)), None),
    ],
)  # fmt: skip
def test_mlp_of_unknown_class_is_detected_by_trial_input(module, fused):
    """Modules with dropout in functions or further operations are not replaced."""
    x = torch.randn(4, 16)
    state = torch.get_rng_state()
    expected = module.eval()(x)
    report = peakgpt.patch(module)
    assert torch.equal(torch.get_rng_state(), state)
    notes = [e.note for e in report.entries if e.module == "" and e.status == "replaced"]
    assert notes == (["mlp"] if fused else [])
    assert fused is None or module._peakgpt["activation"] == fused
    close(module(x), expected)
    torch.manual_seed(0)
    got = module.train()(x)
    peakgpt.unpatch(module)
    torch.manual_seed(0)
    close(got, module(x), 1e-4)


class NanoGPTAttention(torch.nn.Module):
    """Attention as in nanoGPT. `spell` chooses how the forward names scaled_dot_product_attention."""

    def __init__(self, spell):
        super().__init__()
        self.c_attn, self.c_proj, self.spell = torch.nn.Linear(32, 96), torch.nn.Linear(32, 32), spell

    def forward(self, x, mask=None, *, scale=None):
        q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in self.c_attn(x).split(32, dim=2))
        if self.spell == "F":
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
        elif self.spell == "torch":
            y = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale)
        else:
            y = scaled_dot_product_attention(q, k, v, mask, 0.0, mask is None, scale=scale)
        return self.c_proj(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("spell", ["F", "torch", "direct"])
def test_forward_that_calls_sdpa_runs_peakgpt_attention(spell, compiled, monkeypatch):
    module, x = NanoGPTAttention(spell), torch.randn(2, 7, 32)
    mask = torch.rand(7, 7) > 0.3
    expected = module(x), module(x, mask, scale=0.3)
    peakgpt.patch(module)
    calls = []
    real = attention_function.attention
    monkeypatch.setattr(attention_function, "attention", lambda *a, **k: calls.append(1) or real(*a, **k))
    run = torch.compile(module, fullgraph=True, backend="eager") if compiled else module
    close(run(x), expected[0])
    close(run(x, mask, scale=0.3), expected[1])
    assert len(calls) == 2
    peakgpt.unpatch(module)
    assert torch.equal(module(x), expected[0]) and len(calls) == 2


def test_patch_rejects_non_modules_and_patched_models():
    with pytest.raises(ValueError, match=r"patch: got a str, expected a torch\.nn\.Module"):
        peakgpt.patch("gpt2")
    model = build()
    peakgpt.patch(model, check=False)
    with pytest.raises(ValueError, match="got a model that is patched already"):
        peakgpt.patch(model)


def test_strict_error_names_left_modules_and_model_is_unchanged():
    model = build(activation_function="quick_gelu")
    with pytest.raises(ValueError, match=r"2 modules left, expected none: transformer\.h\.0\.mlp \(GPT2MLP\): act"):
        peakgpt.patch(model, strict=True)
    assert not any(vars(type(m)).get("_peakgpt_original") for m in model.modules())
    assert model.config._attn_implementation == "sdpa"
    report = peakgpt.patch(model)
    assert [e.module for e in report.left] == ["transformer.h.0.mlp", "transformer.h.1.mlp"]
    assert "quick" in str(report).lower() and LEFT in str(report)


class Scaled(torch.nn.Module):
    """A user's norm."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(16))

    def forward(self, x):
        return x * self.weight / x.norm(dim=-1, keepdim=True)


class Calls(torch.nn.Module):
    def forward(self, x):
        return F.gelu(x)


class SelfAttention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = torch.nn.Linear(16, 48), torch.nn.Linear(16, 16)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out(q @ (k.mT @ v))


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Scaled, r"0 \(Scaled\): unknown class with parameters of its own \(weight\)"),
        (Calls, r"0 \(Calls\): its forward calls gelu, expected a known class that mlp can replace"),
        (lambda: BaseMLP(twice=True), r"0 \(BaseMLP\): MLP of an unknown structure"),
        (lambda: BaseMLP(torch.nn.SiLU()), r"0 \(BaseMLP\): MLP of an unknown structure"),
        (SelfAttention, r"0 \(SelfAttention\): attention of an unknown class"),
        (lambda: torch.nn.Conv1d(16, 16, 1), r"0 \(Conv1d\): unknown class with parameters"),
        (lambda: torch.nn.GRU(16, 16), r"0 \(GRU\): unknown class with parameters"),
        (lambda: torch.nn.BatchNorm1d(16), r"0 \(BatchNorm1d\): unknown class"),
        (lambda: torch.nn.LayerNorm(16, elementwise_affine=False), r"0 \(LayerNorm\): has no weight"),
        (lambda: torch.nn.TransformerEncoderLayer(16, 2, 16, activation=F.silu), r"\(TransformerEncoderLayer\): act"),
        (lambda: transformers.BertLMHeadModel(transformers.BertConfig(**BERT)), r"\(BertLMHeadModel\): computes all"),
        (lambda: transformers.GraniteForCausalLM(transformers.GraniteConfig(**LLAMA)), r"\(GraniteRMSNorm\): unknown"),
    ],
)  # fmt: skip
def test_strict_raises_on_every_unknown_module(module, reason):
    model = torch.nn.Sequential(module(), torch.nn.Linear(16, 16), torch.nn.Dropout(), torch.nn.GELU())
    with pytest.raises(ValueError, match=reason):
        peakgpt.patch(model, strict=True, check=False)
    assert not any(vars(type(m)).get("_peakgpt_original") for m in model.modules())
    assert peakgpt.patch(model, check=False).left


def test_check_detects_a_wrong_replacement_and_restores_the_model(monkeypatch):
    monkeypatch.setitem(layers.ACTIVATIONS, "transformers.activations.NewGELUActivation", "relu")
    model = build()
    inputs, _ = batch(model)
    expected = outputs_of(model, inputs)
    with pytest.raises(ValueError, match="outputs of the model differ by"):
        peakgpt.patch(model)
    assert torch.equal(outputs_of(model, inputs), expected)


def test_report_lists_every_module():
    model = build()
    report = peakgpt.patch(model)
    assert [e.module for e in report.entries] == [n for n, _ in model.named_modules()]
    text = str(report)
    assert "transformer.h.*.mlp" in text and "linear_cross_entropy" in text and "check: outputs within" in text
