"""peakgpt.nn: outputs, gradients and state dicts of each layer versus layers of torch and transformers."""

import copy

import pytest
import torch
import transformers
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Attention
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXMLP
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5DenseActDense, T5DenseGatedActDense

import peakgpt

CONFIG = transformers.GPT2Config(n_embd=24, n_head=3, n_layer=1, n_positions=16, resid_pdrop=0, attn_pdrop=0)
CONFIG._attn_implementation = "eager"


def randomized(layer):
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0.0, 0.3)
    return layer


def gpt2_attention(layer, x):
    masked = torch.full((x.shape[1], x.shape[1]), torch.finfo(x.dtype).min).triu(1)
    return layer(x, attention_mask=masked[None, None])[0]


@pytest.mark.parametrize(
    ("ours", "reference", "call"),
    [
        (lambda: peakgpt.nn.GELUMLP(24), lambda: GPT2MLP(96, CONFIG), lambda layer, x: layer(x)),
        (lambda: peakgpt.nn.CausalSelfAttention(24, 3), lambda: GPT2Attention(CONFIG, layer_idx=0), gpt2_attention),
        (lambda: peakgpt.nn.LayerNorm(24), lambda: torch.nn.LayerNorm(24), lambda layer, x: layer(x)),
        (lambda: peakgpt.nn.RMSNorm(24), lambda: torch.nn.RMSNorm(24), lambda layer, x: layer(x)),
    ],
    ids=["GELUMLP", "CausalSelfAttention", "LayerNorm", "RMSNorm"],
)
def test_layers_equal_those_of_torch_and_transformers(ours, reference, call):
    torch.manual_seed(0)
    layer, stock = ours(), randomized(reference()).eval()
    layout = {} if isinstance(layer, torch.nn.LayerNorm | torch.nn.RMSNorm) else {"conv1d": True}
    layer.load_state_dict(stock.state_dict(), **layout)
    x = torch.randn(2, 11, 24, requires_grad=True)
    y = torch.randn(2, 11, 24)
    layer(x).backward(y)
    dx, x.grad = x.grad, None
    expected = call(stock, x)
    expected.backward(y)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dx, x.grad, rtol=1e-5, atol=1e-5)
    grads = {name: p.grad for name, p in stock.named_parameters()}
    for name, parameter in layer.named_parameters():
        grad = grads[name].t() if layout and parameter.dim() == 2 else grads[name]
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def causal(layer, x):
    masked = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    return layer(x, x, x, attn_mask=masked, need_weights=False)[0]


def llama_attention_without_rotation(layer, x):
    """Run the attention of Llama with all rotary angles 0."""
    tables = torch.ones(1, x.shape[1], 8), torch.zeros(1, x.shape[1], 8)
    masked = torch.full((x.shape[1], x.shape[1]), torch.finfo(x.dtype).min).triu(1)
    return layer(x, position_embeddings=tables, attention_mask=masked[None, None])[0]


LLAMA = transformers.LlamaConfig(hidden_size=24, num_attention_heads=3, num_key_value_heads=1, intermediate_size=40)
LLAMA._attn_implementation = "eager"
T5 = transformers.T5Config(d_model=24, d_ff=40, dropout_rate=0.0, dense_act_fn="relu")
NEOX = transformers.GPTNeoXConfig(hidden_size=24, num_attention_heads=3, intermediate_size=40, hidden_act="gelu")


@pytest.mark.parametrize(
    ("ours", "reference", "call"),
    [
        (lambda: peakgpt.nn.GELUMLP(24, 40, activation="gelu_erf"),
         lambda: torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.GELU(), torch.nn.Linear(40, 24)), None),
        (lambda: peakgpt.nn.GELUMLP(24, 40, activation="gelu_erf"), lambda: GPTNeoXMLP(NEOX), None),
        (lambda: peakgpt.nn.GELUMLP(24, 40, activation="relu", bias=False), lambda: T5DenseActDense(T5), None),
        (lambda: peakgpt.nn.GatedMLP(24, 40), lambda: LlamaMLP(LLAMA), None),
        (lambda: peakgpt.nn.GatedMLP(24, 40, activation="relu"), lambda: T5DenseGatedActDense(T5), None),
        (lambda: peakgpt.nn.CausalSelfAttention(24, 3),
         lambda: torch.nn.MultiheadAttention(24, 3, batch_first=True), causal),
        (lambda: peakgpt.nn.CausalSelfAttention(24, 3, n_kv_head=1, bias=False),
         lambda: LlamaAttention(LLAMA, layer_idx=0), llama_attention_without_rotation),
        (lambda: peakgpt.nn.RMSNorm(24, eps=1e-6), lambda: LlamaRMSNorm(24), None),
    ],
    ids=("Sequential", "GPTNeoXMLP", "T5DenseActDense", "LlamaMLP", "T5DenseGatedActDense", "MultiheadAttention",
         "LlamaAttention", "LlamaRMSNorm"),
)  # fmt: skip
def test_layers_load_state_dicts_of_torch_and_transformers(ours, reference, call):
    """Also as a part of another module. A missing key raises."""
    torch.manual_seed(0)
    stock, outer = randomized(reference()).eval(), torch.nn.ModuleDict({"part": ours()})
    state = stock.state_dict()
    outer.load_state_dict({f"part.{name}": tensor for name, tensor in state.items()})
    assert state.keys() == stock.state_dict().keys()
    x = torch.randn(2, 11, 24)
    torch.testing.assert_close(outer.part(x), (call or torch.nn.Module.__call__)(stock, x), rtol=1e-5, atol=1e-5)
    first = next(iter(state))
    with pytest.raises(RuntimeError, match="Missing key"):
        ours().load_state_dict({name: tensor for name, tensor in state.items() if name != first})


def test_conv1d_layout_must_be_requested():
    """c_proj of attention is square, so its shape does not tell the layout."""
    stock = randomized(GPT2Attention(CONFIG, layer_idx=0))
    layer = peakgpt.nn.CausalSelfAttention(24, 3)
    with pytest.raises(RuntimeError, match=r"size mismatch for c_attn\.weight"):
        layer.load_state_dict(stock.state_dict())
    layer.load_state_dict(stock.state_dict(), conv1d=True)
    assert torch.equal(layer.c_proj.weight, stock.c_proj.weight.t())
    copied = peakgpt.nn.CausalSelfAttention(24, 3)
    copied.load_state_dict(copy.deepcopy(layer.state_dict()))
    assert torch.equal(copied.c_proj.weight, layer.c_proj.weight)


def test_gpt_uses_the_layers_of_peakgpt_nn():
    model = peakgpt.GPT.from_preset("gpt2-tiny", n_layer=1)
    block = model.transformer.h[0]
    assert type(block.attn) is peakgpt.nn.CausalSelfAttention and type(block.mlp) is peakgpt.nn.GELUMLP
    assert {type(norm) for norm in (block.ln_1, block.ln_2, model.transformer.ln_f)} == {peakgpt.nn.LayerNorm}


def test_invalid_sizes_and_activations_raise():
    with pytest.raises(ValueError, match="activation is 'swish', expected one of gelu_tanh, gelu_erf, relu"):
        peakgpt.nn.GELUMLP(8, activation="swish")
    for sizes in ({"n_head": 3}, {"n_head": 4, "n_kv_head": 3}):
        with pytest.raises(ValueError, match="expected n_head to divide n_embd and n_kv_head to divide n_head"):
            peakgpt.nn.CausalSelfAttention(16, **sizes)


@pytest.mark.parametrize(
    "options", [{}, {"reduction": "none"}, {"label_smoothing": 0.1, "reduction": "sum"}, {"z_loss": 0.1}], ids=str
)
def test_linear_cross_entropy_loss_equals_torch_with_a_tied_head(options):
    torch.manual_seed(0)
    embedding = torch.nn.Embedding(37, 24)
    loss = peakgpt.nn.LinearCrossEntropyLoss(37, 24, ignore_index=5, **options)
    assert loss.weight.shape == (37, 24) and abs(loss.weight.std().item() - 0.02) < 0.002
    loss.weight = embedding.weight
    assert [name for name, _ in loss.named_parameters()] == ["weight"]
    hidden, targets = torch.randn(2, 11, 24, requires_grad=True), torch.randint(37, (2, 11))
    targets[0, :3] = 5
    grads = []
    z_loss = options.get("z_loss", 0.0)
    stock = {name: value for name, value in options.items() if name != "z_loss"}
    logits = (hidden @ embedding.weight.T).flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, targets.flatten(), ignore_index=5, **stock)
    if z_loss:
        expected = expected + z_loss * logits[targets.flatten() != 5].logsumexp(-1).square().mean()
    got = loss(hidden, targets)
    torch.testing.assert_close(got.flatten(), expected.flatten(), rtol=1e-5, atol=1e-5)
    for value in (got, expected):
        grads.append(torch.autograd.grad(value.sum(), (hidden, embedding.weight)))
    for ours, expected in zip(*grads, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_linear_cross_entropy_loss_weights_each_target():
    loss = peakgpt.nn.LinearCrossEntropyLoss(37, 24, reduction="sum")
    each = peakgpt.nn.LinearCrossEntropyLoss(37, 24, reduction="none")
    each.load_state_dict(loss.state_dict())
    hidden, targets, weight = torch.randn(2, 5, 24), torch.randint(37, (2, 5)), torch.rand(2, 5)
    torch.testing.assert_close(loss(hidden, targets, weight), (each(hidden, targets) * weight).sum())
    with pytest.raises(ValueError, match="reduction is 'average', expected mean, sum or none"):
        peakgpt.nn.LinearCrossEntropyLoss(37, 24, reduction="average")
