"""Mixture of experts: routing and gradients equal transformers' Mixtral, the balance losses, independence of tokens."""

import dataclasses

import pytest
import torch
import transformers
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock, load_balancing_loss_func

import peakgpt
from peakgpt.engine.model.experts import ExpertMLPs, Experts, balance_loss
from peakgpt.engine.model.fp8 import set_fp8
from peakgpt.engine.training.optimizer import decay_groups
from peakgpt.kernels.core.dispatch import use_backend

C, F, E = 16, 24, 5
SIZES = {"n_layer": 2, "n_head": 2, "n_embd": C, "block_size": 9, "vocab_size": 23}
CONFIG = peakgpt.GPTConfig(
    **SIZES, experts=E, expert_inner=F, gated_experts=True, gated_mlp=True, activation="silu", bias=False
)  # fmt: skip


def pair(**changes):
    """Build transformers' Mixtral block and ours with the same weights."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        hidden_size=C, intermediate_size=F, num_local_experts=E, num_experts_per_tok=2, experts_implementation="eager"
    )
    mixtral, ours = MixtralSparseMoeBlock(config), Experts(dataclasses.replace(CONFIG, **changes))
    with torch.no_grad():
        for parameter in mixtral.parameters():
            parameter.normal_(0.0, 0.4)
        ours.router.weight.copy_(mixtral.gate.weight)
        gate, up = mixtral.experts.gate_up_proj.chunk(2, 1)
        for layer, weight in (("c_gate", gate), ("c_fc", up), ("c_proj", mixtral.experts.down_proj)):
            ours.experts.get_submodule(layer).weight.copy_(weight)
    return mixtral, ours


@pytest.mark.parametrize("backend", ("eager", "cpu", "by layers"))
def test_outputs_and_gradients_equal_mixtral(backend):
    mixtral, ours = pair()
    x, dy = torch.randn(2, 2, 11, C).unbind()
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = mixtral(x1)
    expected.backward(dy)
    if backend == "by layers":  # a hook, which the op would not call
        ours.experts.c_fc.register_forward_hook(lambda *args: None)
    with use_backend("cpu" if backend == "by layers" else backend):
        y = ours(x2)
        y.backward(dy)
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(y, expected, **close)
    torch.testing.assert_close(x2.grad, x1.grad, **close)
    torch.testing.assert_close(ours.router.weight.grad, mixtral.gate.weight.grad, **close)
    up = torch.cat((ours.experts.c_gate.weight.grad, ours.experts.c_fc.weight.grad), 1)
    torch.testing.assert_close(up, mixtral.experts.gate_up_proj.grad, **close)
    torch.testing.assert_close(ours.experts.c_proj.weight.grad, mixtral.experts.down_proj.grad, **close)


@pytest.mark.parametrize("over", ("layer", "model"))
def test_balance_losses_equal_transformers(over):
    """Its loss counts all choices and pools the layers; with one choice and one layer it is Switch's."""
    mixtral, ours = pair(balance_over=over)
    inputs, usage = torch.randn(2, 3, 7, C), []
    for x in inputs:
        ours(x, usage)
    logits = tuple(mixtral.gate(x)[0] for x in inputs)
    calls = (logits,) if over == "model" else tuple((layer,) for layer in logits)
    expected = sum(load_balancing_loss_func(call, E, top_k=2 if over == "model" else 1) for call in calls)
    torch.testing.assert_close(balance_loss(usage, over), expected)


def test_results_repeat_bitwise_and_tokens_are_independent():
    _, ours = pair()
    x = torch.randn(40, C)
    results = []
    for _ in range(2):
        leaf = x.clone().requires_grad_()
        y = ours(leaf)
        results.append((y, *torch.autograd.grad((y**2).sum(), (leaf, *ours.parameters()))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert torch.equal(results[0][0][[7, 31]], ours(x[[7, 31]])), "no token is dropped or changes another"
    assert ours(x[:0]).shape == (0, C)


def test_an_unused_expert_has_a_gradient_of_zero():
    _, ours = pair()
    ours(torch.randn(1, C)).sum().backward()
    assert ours.experts.c_proj.weight.grad.flatten(1).any(1).sum() == 2


def test_weights_that_are_not_normalized_are_the_routers_probabilities():
    _, ours = pair(normalize_experts=False)
    x = torch.randn(6, C)
    p = (x @ ours.router.weight.t()).softmax(-1)
    weights, ids = p.topk(2)
    torch.testing.assert_close(ours(x), ours.experts(x, ids, weights))
    assert not torch.allclose(ours(x), pair()[1](x))


def test_the_balance_loss_is_added_in_training_mode_only():
    torch.manual_seed(2)
    model = peakgpt.GPT(dataclasses.replace(CONFIG, balance_loss=0.5))
    ids = torch.randint(23, (2, 9))
    usage = []
    model.hidden_states(ids, balance=usage)
    one = balance_loss(usage, "layer")
    assert len(usage) == 1 and 0.9 < one < E
    torch.testing.assert_close(model.train()(ids, ids) - model.eval()(ids, ids), 0.5 * one)


def test_left_padding_does_not_count_in_the_balance_loss():
    _, ours = pair()
    x, start, usage = torch.randn(2, 7, C), torch.tensor([0, 4]), []
    ours(x, usage, start)
    ours(torch.cat((x[0], x[1, 4:])), usage)
    torch.testing.assert_close(*usage)
    torch.manual_seed(2)
    model, ids = peakgpt.GPT(CONFIG), torch.randint(23, (1, 9))
    alone, padded = [], []
    model.hidden_states(ids[:, 3:], balance=alone)
    model.hidden_states(ids, start=torch.tensor([3]), balance=padded)
    torch.testing.assert_close(padded, alone)


def test_layers_with_experts():
    config = peakgpt.GPTConfig(**{**SIZES, "n_layer": 8}, experts=2, mlp_only_layers=(5, 1, 5))
    assert [layer for layer in range(8) if config.has_experts(layer)] == [3, 7] and config.mlp_only_layers == (1, 5)
    assert config.expert_inner == config.n_inner == 4 * C
    for changes, message in (
        ({"mlp_only_layers": (8,)}, r"mlp_only_layers is \(8,\), expected layers below n_layer 8"),
        ({"experts_per_token": 3}, "experts_per_token is 3, expected at most experts 2"),
        ({"experts": 0, "gated_experts": True}, "gated_experts is True, expected false without experts"),
        ({"activation": "silu", "gated_mlp": True}, "activation is 'silu', expected one of gelu_tanh"),
        ({"experts": 1 << 17}, "experts is 131072, expected at most 8192"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(config, **changes)


def test_parameters_of_separate_experts_load():
    """State dicts of models from before the experts were stacked."""
    torch.manual_seed(3)
    model = ExpertMLPs(C, F, E, bias=True)
    state = model.state_dict()
    separate = {f"{e}.{name}": tensor[e] for name, tensor in state.items() for e in range(E)}
    again = ExpertMLPs(C, F, E, bias=True)
    again.load_state_dict(separate)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in state.items())
    del separate["3.c_fc.bias"]
    with pytest.raises(RuntimeError, match=r"c_fc\.bias"):
        ExpertMLPs(C, F, E, bias=True).load_state_dict(separate)


def test_biases_of_experts_start_at_zero_and_do_not_decay():
    model = peakgpt.GPT(peakgpt.GPTConfig(**SIZES, experts=E))
    decayed = {id(p) for group in decay_groups(model, 0.1) if group["weight_decay"] for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in decayed) == (parameter.dim() > 1 and not name.endswith("bias")), name
        assert not name.endswith("bias") or not parameter.any(), name


def test_fp8_refuses_experts():
    with pytest.raises(ValueError, match="fp8: got a model with experts, expected one without"):
        set_fp8(peakgpt.GPT(CONFIG), True)
