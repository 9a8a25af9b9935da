"""Gradients of one dtype share a block and stay separate tensors: format, versions, sums, frozen parameters."""

import torch
from torch import nn

from peakgpt.engine.training.gradient_memory import GradientMemory
from peakgpt.kernels.core.autograd import accumulate_into

SHAPES = ((3, 5), (1,), (7,), (2, 4))


def optimizer_of_every_format():
    """Odd sizes, a transposed matrix, an expanded one with gaps, and a second dtype."""
    tensors = [torch.randn(shape) for shape in SHAPES]
    tensors += [torch.randn(6, 3).t(), torch.randn(4, 8)[:, ::2], torch.randn(5, dtype=torch.bfloat16)]
    parameters = [nn.Parameter(tensor) for tensor in tensors]
    return torch.optim.SGD(parameters, lr=1.0), parameters


def test_gradients_have_the_format_of_their_parameters_and_share_no_element():
    optimizer, parameters = optimizer_of_every_format()
    memory = GradientMemory(optimizer)
    gradients = list(memory.zero().values())
    for i, gradient in enumerate(gradients):
        gradient.fill_(i + 1)
    for i, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True)):
        expected = torch.full_like(parameter, i + 1)
        assert parameter.grad is gradient and torch.equal(gradient, expected)
        assert (gradient.stride(), gradient.dtype) == (expected.stride(), expected.dtype)
        assert gradient.data_ptr() % 64 == gradients[0].data_ptr() % 64
    assert all(map(torch.equal, memory.zero().values(), map(torch.zeros_like, parameters)))
    assert [gradient.data_ptr() for gradient in memory.zero().values()] == [g.data_ptr() for g in gradients]


def test_a_gradient_that_nothing_was_added_to_is_dropped_although_its_neighbours_were_written():
    optimizer, parameters = optimizer_of_every_format()
    memory, other = GradientMemory(optimizer), GradientMemory(optimizer)
    for _ in range(2):
        with accumulate_into(memory.zero()):
            parameters[0].grad.add_(1.0)
        other.zero()[parameters[2]].add_(2.0)
        memory.add([other])
        memory.drop_unwritten()
        expected = [1.0, None, 2.0, *[None] * 4]
        assert [None if p.grad is None else p.grad.unique().item() for p in parameters] == expected


def test_a_frozen_parameter_loses_its_gradient_and_others_keep_theirs():
    optimizer, parameters = optimizer_of_every_format()
    memory = GradientMemory(optimizer)
    memory.zero()
    parameters[1].requires_grad_(False)
    buffers = memory.zero()
    assert parameters[1].grad is None and parameters[1] not in buffers
    assert all(p.grad is buffers[p] for p in parameters if p.requires_grad)
