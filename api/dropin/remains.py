"""What is left: modules that nothing has replaced although they compute what peakgpt has, or may have, an op for.

What a module computes is told by its own parameters, the names that its forward calls, and its children. Containers,
embeddings, dropout and activations beside no perceptron have nothing to replace.
"""

from __future__ import annotations

import inspect

from torch import nn

from peakgpt.dropin.layers import activation_of
from peakgpt.dropin.swap import LAYOUTS, original, path

# Functions that a forward may call itself, and what peakgpt has for them.
CALLS = {
    "scaled_dot_product_attention": "attention", "softmax": "attention", "cross_entropy": "linear_cross_entropy",
    "layer_norm": "layernorm", "rms_norm": "rmsnorm", "rsqrt": "rmsnorm", "linear": "linear", "gelu": "mlp",
    "relu": "mlp", "silu": "gated_mlp",
}  # fmt: skip
ACTIVATIONS = ("torch.nn.modules.activation.", "transformers.activations.")


def reason(module: nn.Module) -> str | None:
    """Why a module that nothing has replaced counts as left, or None where there is nothing to replace."""
    kind = original(module)
    tied = {id(parameter) for child in module.children() for parameter in child.parameters()}
    own = [name for name, each in module._parameters.items() if each is not None and id(each) not in tied]
    if own and not isinstance(module, nn.Embedding):
        return f"of a class that is not known here, with parameters of its own ({', '.join(own)})"
    if kind.__module__.split(".")[0] == "torch" or path(kind).startswith(ACTIVATIONS):
        return None
    called = [name for name in _called(kind) if name in CALLS and not hasattr(module, name)]  # not self.linear
    if called:
        return f"its forward calls {called[0]} itself, expected what {CALLS[called[0]]} is known to stand for"
    children = [original(child) for child in module.children()]
    products = sum(path(child) in LAYOUTS for child in children)
    if products > 1 and any(_is_activation(child) for child in module.children()):
        return "a perceptron of a form that is not known here"
    if products > 1 and "Attention" in kind.__name__:
        return "attention of a class that is not known here"
    return "forms all logits for its loss" if _has_loss_of_logits(module, kind) else None


def _called(kind: type) -> tuple[str, ...]:
    return getattr(getattr(kind.forward, "__code__", None), "co_names", ())


def _is_activation(module: nn.Module) -> bool:
    return activation_of(module) is not None or path(original(module)).startswith(ACTIVATIONS)


def _has_loss_of_logits(module: nn.Module, kind: type) -> bool:
    """Whether it is a language model of transformers that takes labels."""
    head = getattr(module, "get_output_embeddings", None)
    return head is not None and "labels" in inspect.signature(kind.forward).parameters and head() is not None
