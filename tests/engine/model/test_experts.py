"""Mixture of experts: routing and gradients equal transformers' Mixtral, the balance loss, independence of tokens."""

import pytest
import torch
import transformers
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock, load_balancing_loss_func

import peakgpt
from peakgpt.engine.model.experts import Experts
from peakgpt.kernels.core.dispatch import use_backend

C, F, E = 16, 24, 5


def pair():
    """Build transformers' Mixtral block and ours with the same weights and gated experts."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        hidden_size=C, intermediate_size=F, num_local_experts=E, num_experts_per_tok=2, experts_implementation="eager"
    )
    mixtral = MixtralSparseMoeBlock(config)
    ours = Experts(C, E, 2, lambda: peakgpt.nn.GatedMLP(C, F))
    with torch.no_grad():
        for parameter in mixtral.parameters():
            parameter.normal_(0.0, 0.4)
        ours.router.weight.copy_(mixtral.gate.weight)
        for expert, up, down in zip(ours.experts, mixtral.experts.gate_up_proj, mixtral.experts.down_proj, strict=True):
            for part, weight in zip((expert.c_gate, expert.c_fc, expert.c_proj), (*up.chunk(2), down), strict=True):
                part.weight.copy_(weight)
    return mixtral, ours


@pytest.mark.parametrize("backend", ("eager", "cpu"))
def test_outputs_and_gradients_equal_mixtral(backend):
    mixtral, ours = pair()
    x, dy = torch.randn(2, 2, 11, C).unbind()
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = mixtral(x1)
    expected.backward(dy)
    with use_backend(backend):
        y = ours(x2)
        y.backward(dy)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x2.grad, x1.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.router.weight.grad, mixtral.gate.weight.grad, rtol=1e-5, atol=1e-5)
    for i, expert in enumerate(ours.experts):
        up = torch.cat((expert.c_gate.weight.grad, expert.c_fc.weight.grad))
        torch.testing.assert_close(up, mixtral.experts.gate_up_proj.grad[i], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(expert.c_proj.weight.grad, mixtral.experts.down_proj.grad[i], rtol=1e-5, atol=1e-5)


def test_balance_loss_equals_switchs_for_first_choices():
    mixtral, ours = pair()
    x, losses = torch.randn(3, 7, C), []
    ours(x, losses)
    logits, _, _ = mixtral.gate(x)
    torch.testing.assert_close(losses[0], load_balancing_loss_func((logits,), E, top_k=1))


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
    used = [expert.c_proj.weight.grad.any().item() for expert in ours.experts]
    assert sorted(used) == [False, False, False, True, True]


def test_the_balance_loss_is_added_in_training_mode_only():
    torch.manual_seed(2)
    config = peakgpt.GPTConfig(n_layer=2, n_head=2, n_embd=C, block_size=9, vocab_size=23, experts=E, balance_loss=0.5)
    model = peakgpt.GPT(config)
    ids = torch.randint(23, (2, 9))
    balance = []
    model.hidden_states(ids, balance_losses=balance)
    (one,) = balance
    assert 0.9 < one < E
    torch.testing.assert_close(model.train()(ids, ids) - model.eval()(ids, ids), 0.5 * one)


def test_left_padding_does_not_count_in_the_balance_loss():
    _, ours = pair()
    x, start, losses = torch.randn(2, 7, C), torch.tensor([0, 4]), []
    ours(x, losses, start)
    ours(torch.cat((x[0], x[1, 4:])), losses)
    torch.testing.assert_close(*losses)
    torch.manual_seed(2)
    config = peakgpt.GPTConfig(n_layer=2, n_head=2, n_embd=C, block_size=9, vocab_size=23, experts=E)
    model, ids = peakgpt.GPT(config), torch.randint(23, (1, 9))
    alone, padded = [], []
    model.hidden_states(ids[:, 3:], balance_losses=alone)
    model.hidden_states(ids, start=torch.tensor([3]), balance_losses=padded)
    torch.testing.assert_close(padded, alone)
