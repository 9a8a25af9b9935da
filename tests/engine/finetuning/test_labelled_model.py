"""The losses and gradients of GPT-1's tasks are those of the paper, computed in float64 by a second implementation."""

import gpt1_paper
import pytest
import torch

from peakgpt.engine.finetuning.labelled_model import ChoiceModel, SequenceModel, TokenModel
from peakgpt.engine.gpt import GPT
from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.model.recompute import set_recompute
from peakgpt.kernels.ops.linear_cross_entropy import IGNORE_INDEX

START, DELIMITER, EXTRACT = 40, 41, 42
GPT1 = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 24, "vocab_size": 43, "residual": "post_norm"}
A, B, C = [3, 17, 9, 22], [31, 5], [8, 8, 30, 1, 12, 27]


def text(ids):
    return [START, *ids, EXTRACT]


def pair(first, second):
    return [START, *first, DELIMITER, *second, EXTRACT]


# name: model, outputs, is_regression, the paper's loss, examples (lists of sequences), labels
TASKS = {
    "classification": (SequenceModel, 3, False, gpt1_paper.class_loss, [[text(A)], [text(B)], [text(C)]], [2, 0, 1]),
    "entailment": (SequenceModel, 2, False, gpt1_paper.class_loss, [[pair(A, B)], [pair(C, A)]], [1, 0]),
    "similarity, classes": (
        SequenceModel, 2, False, gpt1_paper.class_loss, [[pair(A, B), pair(B, A)], [pair(C, A), pair(A, C)]], [0, 1],
    ),
    "similarity, numbers": (
        SequenceModel, 1, True, gpt1_paper.score_loss, [[pair(A, B), pair(B, A)], [pair(C, A), pair(A, C)]], [2.5, 0.3],
    ),
    "multiple choice": (
        ChoiceModel, 1, False, gpt1_paper.choice_loss,
        [[pair(A, B), pair(A, C), pair(A, A)], [pair(C, A), pair(C, B)]], [1, 0],
    ),
}  # fmt: skip


def make_model(kind, outputs, **options):
    torch.manual_seed(3)
    model = kind(GPT(GPTConfig(**GPT1)), outputs, **options)
    with torch.no_grad():
        for parameter in model.parameters():  # a zero bias would hide an error
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def batch_of(examples, labels, fill=0):
    """Pad sequences with zeros, and examples with sequences of length 0."""
    width, count = max(len(s) for e in examples for s in e), max(map(len, examples))
    ids = torch.full((len(examples), count, width), fill)
    lengths = torch.zeros(len(examples), count, dtype=torch.long)
    for row, sequences in enumerate(examples):
        for column, sequence in enumerate(sequences):
            ids[row, column, : len(sequence)] = torch.tensor(sequence)
            lengths[row, column] = len(sequence)
    return ids, lengths, torch.tensor(labels)


def paper_of(model):
    head = model.head.weight.detach().double().requires_grad_()
    return gpt1_paper.Gpt1(model.gpt.state_dict(), GPT1["n_layer"], GPT1["n_head"]), head


@pytest.mark.parametrize("weight", [0.0, 0.5])
@pytest.mark.parametrize("name", TASKS)
def test_loss_and_gradients_are_the_papers(name, weight):
    kind, outputs, is_regression, loss, examples, labels = TASKS[name]
    model = make_model(kind, outputs, lm_loss_weight=weight, is_regression=is_regression)
    paper, head = paper_of(model)
    expected = gpt1_paper.objective(paper, head, examples, labels, loss, weight)
    got = model(*batch_of(examples, labels))
    expected.backward()
    got.backward()
    torch.testing.assert_close(got.double(), expected, rtol=2e-6, atol=0)
    for parameter_name, parameter in model.gpt.named_parameters():
        torch.testing.assert_close(
            parameter.grad.double(), paper.w[parameter_name].grad, rtol=2e-5, atol=2e-6, msg=parameter_name
        )
    torch.testing.assert_close(model.head.weight.grad.double(), head.grad, rtol=2e-5, atol=2e-6)


def test_token_loss_is_the_mean_over_all_labels():
    """Words have different numbers of tokens; a token inside a word has no label."""
    model = make_model(TokenModel, 3, lm_loss_weight=0.5)
    examples, labels = [[[START, *A]], [[START, *C]]], [[-100, 2, -100, 0, 1], [-100, -100, -100, 1, -100, -100, 2]]
    paper, head = paper_of(model)
    bias = model.head.bias.detach().double()
    losses = [
        -(paper.hidden_states(ids)[i] @ head.T + bias).log_softmax(-1)[label]
        for ([ids], row) in zip(examples, labels, strict=True)
        for i, label in enumerate(row)
        if label != IGNORE_INDEX
    ]
    counts = torch.tensor([3, 2], dtype=torch.float64)
    lm = gpt1_paper.lm_losses(paper, examples) @ (counts / counts.sum())
    ids, lengths, _ = batch_of(examples, [0, 0])
    padded = torch.tensor([row + [IGNORE_INDEX] * (7 - len(row)) for row in labels])
    got = model(ids, lengths, padded)
    torch.testing.assert_close(got.double(), torch.stack(losses).mean() + 0.5 * lm, rtol=2e-6, atol=0)


@pytest.mark.parametrize("name", TASKS)
def test_micro_batches_sum_to_the_loss_of_the_batch(name):
    kind, outputs, is_regression, _, examples, labels = TASKS[name]
    model = make_model(kind, outputs, lm_loss_weight=0.5, is_regression=is_regression)
    batch = batch_of(examples, labels)
    weights = model.loss_weights(*batch)["loss_weight"]
    parts = [model(*(t[i : i + 1] for t in batch), loss_weight=weights[i : i + 1]) for i in range(len(labels))]
    torch.testing.assert_close(sum(parts), model(*batch), rtol=2e-6, atol=0)


@pytest.mark.parametrize("name", TASKS)
def test_padding_has_no_influence(name):
    """Neither its tokens, which may be any, nor its length."""
    kind, outputs, is_regression, _, examples, labels = TASKS[name]
    model = make_model(kind, outputs, lm_loss_weight=0.5, is_regression=is_regression)
    ids, lengths, labels = batch_of(examples, labels, fill=EXTRACT)
    longer = torch.nn.functional.pad(batch_of(examples, [0] * len(labels))[0], (0, 5))
    torch.testing.assert_close(model(ids, lengths, labels), model(longer, lengths, labels), rtol=2e-6, atol=0)


def test_dropout_before_the_head_is_the_same_for_all_sequences_of_an_example():
    model = make_model(ChoiceModel, 1, classifier_dropout=0.5).train()
    examples = [[pair(A, B), pair(A, B), pair(A, B)], [pair(C, B), pair(C, B), pair(C, B)]]
    ids, lengths, _ = batch_of(examples, [0, 0])
    logits = model.predict(ids, lengths)
    torch.testing.assert_close(logits, logits[:, :1].expand_as(logits))
    assert not torch.allclose(logits, model.predict(ids, lengths)), "two passes have the same mask"
    model.eval()
    torch.testing.assert_close(model.predict(ids, lengths), model.predict(ids, lengths), rtol=0, atol=0)


def test_experts_are_balanced_in_training():
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(**{**GPT1, "residual": "pre_norm"}, experts=2, balance_loss=0.3))
    model, batch = SequenceModel(gpt, 2), batch_of([[text(A)], [text(B)]], [0, 1])
    plain = model.eval()(*batch)
    assert model.train()(*batch) > plain + 0.25  # a balanced layer has a balance loss of 1


@pytest.mark.parametrize("plan", ["mlp", "block"])
def test_recomputed_activations_give_the_same_gradients(plan):
    model = make_model(SequenceModel, 3, lm_loss_weight=0.5).train()

    def gradients():
        model.zero_grad()
        model(*batch_of([[text(A)], [text(B)]], [2, 0])).backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    expected = gradients()
    set_recompute(model, plan)
    block = model.gpt.transformer.h[0]
    assert (block.recompute, block.mlp.recompute) == (plan == "block", plan == "mlp")
    torch.testing.assert_close(gradients(), expected)
