"""The model: logits, loss and gradients against transformers' GPT-2, on every backend; its errors and its FLOPs."""

import pytest
import torch
import transformers

import peakgpt
from peakgpt.kernels.dispatch import use_backend

SIZES = {"n_layer": 2, "n_head": 3, "n_embd": 48, "block_size": 24, "vocab_size": 97}
BACKENDS = ["eager", "cpu", "gpu"]


def skip_unless(backend):
    """Skip where a backend is not there for an op of the model, with its own reason."""
    model = ("embedding", "layernorm", "add_layernorm", "attention_qkv", "mlp", "linear_cross_entropy")
    from peakgpt.kernels.dispatch import load

    missing = [reason for name in model if backend != "eager" and isinstance(reason := load(backend, name), str)]
    if missing:
        pytest.skip("; ".join(missing))


def reference(**changes):
    """transformers' GPT-2 at tiny random size; weights far from 0.02, or attention would be uniform."""
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


def twin(theirs, **changes):
    ours = peakgpt.GPT(peakgpt.GPTConfig(**{**SIZES, **changes}))
    state = {name: tensor for name, tensor in theirs.state_dict().items() if name != "lm_head.weight"}
    ours.load_state_dict(state, conv1d=True)
    return ours


def batch(rows=2, tokens=17):
    """Ids and shifted targets, some of which do not count."""
    ids = torch.randint(SIZES["vocab_size"], (rows, tokens + 1))
    targets = ids[:, 1:].clone()
    targets[0, -3:] = -100
    return ids[:, :-1].contiguous(), targets


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_loss_and_gradients_equal_transformers(backend):
    skip_unless(backend)
    torch.manual_seed(0)
    theirs = reference()
    ours = twin(theirs)
    ids, targets = batch()
    logits = theirs(ids).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    with use_backend(backend):
        torch.testing.assert_close(ours(ids), logits, rtol=1e-5, atol=1e-5)
        ours_loss = ours(ids, targets)
        ours_loss.backward()
    torch.testing.assert_close(ours_loss, loss, rtol=1e-5, atol=1e-5)
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        grad = expected[name].grad
        grad = grad.t() if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else grad
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
