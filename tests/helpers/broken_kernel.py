"""A plugin of pytest with which the forward of layernorm on the CPU is wrong."""

from peakgpt.kernels.cpu import layernorm


def pytest_configure():
    forward = layernorm.forward
    layernorm.forward = lambda outputs, *args, **params: (forward(outputs, *args, **params), outputs[0].mul_(1.01))
