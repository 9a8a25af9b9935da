"""Check that a patched model computes the same outputs as before, on its own weights.

A model of transformers runs one small batch with padding before and after patching. In any other model, each replaced
layer runs random inputs through its old and its new forward.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from peakgpt.dropin.class_swap import Replacement, is_fsdp2_class, original_class

BATCH, TOKENS, PADDED = 2, 16, 3  # padding on the left of the first sequence
# Relative to the largest output. float32 rounding through 48 layers stays under a tenth of this; bf16 rounds at 2^-9.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}
LOWER = 5e-2


def reference_outputs(model: nn.Module) -> Tensor | None:
    """Return the outputs of a model of transformers for a fixed random batch; None for any other model."""
    if "transformers.modeling_utils" not in sys.modules:
        return None
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel) or model.main_input_name != "input_ids" or _device(model) is None:
        return None
    config = model.config.get_text_config()
    device, pad = _device(model), config.pad_token_id
    ids = torch.randint(5, config.vocab_size, (BATCH, TOKENS), generator=torch.Generator().manual_seed(0))
    live = torch.ones_like(ids)
    live[0, :PADDED] = 0
    ids[0, :PADDED] = pad if pad is not None and 0 <= pad < config.vocab_size else 0
    inputs = {"input_ids": ids.to(device), "attention_mask": live.to(device)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    with _eval_mode(model), torch.no_grad():
        out = model(**inputs, return_dict=True)
    found = out.logits if "logits" in out else out[0]
    if model.config.is_encoder_decoder or found.shape[:2] != live.shape:
        return found
    return found[live.bool().to(device)]


def compare_outputs(before: Tensor | None, model: nn.Module) -> str:
    """Compare outputs after patching with those before; return a sentence with the largest difference.

    Raises:
        ValueError: the difference is larger than rounding explains.
    """
    if _device(model) is None:
        return "not done: the parameters are on the meta device"
    if before is not None:
        error = _relative_error("the model", reference_outputs(model), before)
        return f"outputs within {error:.1e} of the largest output"
    worst, count = 0.0, 0
    with _eval_mode(model), torch.no_grad():
        for name, module in model.named_modules():
            x = module._peakgpt_sample() if isinstance(module, Replacement) else None
            if x is None:
                continue
            kind = original_class(module)
            worst, count = max(worst, _relative_error(name, module(*x), kind.forward(module, *x))), count + 1
    return f"{count} layers, outputs within {worst:.1e} of the largest output"


def _relative_error(name: str, got: Tensor, expected: Tensor) -> float:
    got, expected = (t[0] if isinstance(t, tuple) else t for t in (got, expected))
    scale = expected.double().abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    error = float((got.double() - expected.double()).abs().max() / scale)
    limit = TOLERANCE.get(expected.dtype, LOWER)
    if not error <= limit:
        raise ValueError(f"patch: outputs of {name} differ by {error:.1e} of the largest one, expected under {limit:g}")
    return error


def _device(model: nn.Module) -> torch.device | None:
    parameter = next(model.parameters(), None)
    return None if parameter is None or parameter.device.type == "meta" else parameter.device


@contextlib.contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Set eval() and restore the mode of each module at the end.

    FSDP2 keeps the parameters of the root module unsharded after a forward. Reshard them, or an optimizer made after
    this check would hold the wrong tensors.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
            if is_fsdp2_class(type(module)):
                module.reshard()
