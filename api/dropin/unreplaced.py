"""Find modules that were not replaced although peakgpt has, or may have, an op for them.

Decided from the parameters of the module, the functions that its forward calls, and its children. Containers,
embeddings, dropout and single activations need no replacement.
"""

from __future__ import annotations

import inspect

from torch import nn

from peakgpt.dropin.class_swap import LAYOUTS, class_path, original_class
from peakgpt.dropin.replacements.layers import activation_of

# Functions that a forward may call directly, and the op of peakgpt for each.
OPS_BY_FUNCTION = {
    "scaled_dot_product_attention": "attention", "softmax": "attention", "cross_entropy": "linear_cross_entropy",
    "layer_norm": "layernorm", "rms_norm": "rmsnorm", "rsqrt": "rmsnorm", "linear": "linear", "gelu": "mlp",
    "relu": "mlp", "silu": "gated_mlp",
}  # fmt: skip
ACTIVATIONS = ("torch.nn.modules.activation.", "transformers.activations.")


def reason_left(module: nn.Module) -> str | None:
    """Return why an unreplaced module is reported as left, or None if it needs no replacement."""
    kind = original_class(module)
    tied = {id(parameter) for child in module.children() for parameter in child.parameters()}
    own = [name for name, each in module._parameters.items() if each is not None and id(each) not in tied]
    if own and not isinstance(module, nn.Embedding):
        return f"unknown class with parameters of its own ({', '.join(own)})"
    if kind.__module__.split(".")[0] == "torch" or class_path(kind).startswith(ACTIVATIONS):
        return None
    # A name that is an attribute of the module, such as self.linear, is not a function.
    called = [name for name in _called(kind) if name in OPS_BY_FUNCTION and not hasattr(module, name)]
    if called:
        return f"its forward calls {called[0]}, expected a known class that {OPS_BY_FUNCTION[called[0]]} can replace"
    children = [original_class(child) for child in module.children()]
    products = sum(class_path(child) in LAYOUTS for child in children)
    if products > 1 and any(_is_activation(child) for child in module.children()):
        return "MLP of an unknown form"
    if products > 1 and "Attention" in kind.__name__:
        return "attention of an unknown class"
    return "computes all logits for its loss" if _has_loss_of_logits(module, kind) else None


def _called(kind: type) -> tuple[str, ...]:
    return getattr(getattr(kind.forward, "__code__", None), "co_names", ())


def _is_activation(module: nn.Module) -> bool:
    return activation_of(module) is not None or class_path(original_class(module)).startswith(ACTIVATIONS)


def _has_loss_of_logits(module: nn.Module, kind: type) -> bool:
    """Return whether this is a language model of transformers that takes labels."""
    head = getattr(module, "get_output_embeddings", None)
    return head is not None and "labels" in inspect.signature(kind.forward).parameters and head() is not None
