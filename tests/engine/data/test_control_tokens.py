"""Control tokens: they do not count in the loss, and the generated text depends on them."""

import pytest
import torch
import torch.nn.functional as F

import peakgpt
from peakgpt.engine.data.control_tokens import prepend_control_tokens


def tiny():
    torch.manual_seed(0)
    return peakgpt.GPT(peakgpt.GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=12, vocab_size=19))


def test_the_loss_is_that_of_the_sequence_given_the_control_tokens():
    """Mutations that make it fail: a control token has a loss, or the first token has none."""
    model, sequences = tiny(), torch.randint(15, (3, 9))
    control = torch.randint(15, 19, (3, 2), dtype=torch.int32)
    ids, targets = prepend_control_tokens(control, sequences[:, :-1], sequences[:, 1:])
    assert ids.dtype == targets.dtype == torch.int64 and ids.shape == targets.shape == (3, 10)
    logits = model(torch.cat((control, sequences[:, :-1]), 1))[:, 1:]  # from the last control token on
    expected = F.cross_entropy(logits.flatten(0, 1), sequences.flatten())
    torch.testing.assert_close(model(ids, targets), expected)


def test_a_trained_model_continues_control_tokens_with_their_sequence():
    model = tiny()
    optimizer = model.configure_optimizer(lr=1e-2)
    control = torch.tensor([[15, 17], [16, 17]])
    sequences = torch.tensor([[1, 2, 3, 4, 5, 6], [1, 9, 8, 7, 6, 5]])
    ids, targets = prepend_control_tokens(control, sequences[:, :-1], sequences[:, 1:])
    for _ in range(40):
        optimizer.zero_grad()
        model(ids, targets).backward()
        optimizer.step()
    assert torch.equal(model.eval().generate(control, max_new_tokens=6)[:, 2:], sequences)


@pytest.mark.parametrize(
    ("control", "message"),
    [
        (torch.ones(2, 0, dtype=torch.int64), r"got control tokens \(2, 0\), ids \(2, 5\), .* with G at least 1"),
        (torch.ones(3, 1, dtype=torch.int64), r"got control tokens \(3, 1\), ids \(2, 5\)"),
        (torch.ones(2, 1), "control tokens have dtype torch.float32, expected integers"),
    ],
)
def test_bad_control_tokens_raise_with_got_and_expected(control, message):
    ids = torch.ones(2, 5, dtype=torch.int64)
    with pytest.raises(ValueError, match=f"prepend_control_tokens: {message}"):
        prepend_control_tokens(control, ids, ids)
