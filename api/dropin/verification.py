"""Check that a patched model computes the same outputs as before, on its own weights.

A model of transformers runs one small batch with padding before and after patching. In any other model, each replaced
layer runs random inputs through its old and its new forward. A model with parameters of several dtypes runs under
autocast, as in training: without it, torch multiplies no two dtypes.
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


def reference_outputs(model: nn.Module) -> Tensor | str | None:
    """Return the outputs of a model of transformers for a fixed random batch; None for any other model.

    A string says why the model has no outputs before it is patched.
    """
    try:
        return _outputs(model)
    except Exception as error:
        return f"not done: the unpatched model raises {type(error).__name__}: {str(error).splitlines()[0]}"


def _outputs(model: nn.Module) -> Tensor | None:
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
    with _eval_mode(model), torch.no_grad(), _autocast(model):
        out = model(**inputs, return_dict=True)
    outputs = out.logits if "logits" in out else out[0]
    if model.config.is_encoder_decoder or outputs.shape[:2] != live.shape:
        return outputs
    return outputs[live.bool().to(device)]


def compare_outputs(before: Tensor | str | None, model: nn.Module) -> str:
    """Compare outputs after patching with those before; return a sentence with the largest difference.

    Raises:
        ValueError: the difference is larger than rounding errors.
    """
    if _device(model) is None:
        return "not done: the parameters are on the meta device"
    if isinstance(before, str):
        return before
    limit = max((TOLERANCE.get(dtype, LOWER) for dtype in _dtypes(model)), default=LOWER)
    if before is not None:
        error = _relative_error("the model", _outputs(model), before, limit)
        return f"outputs within {error:.1e} of the largest output"
    worst, count = 0.0, 0
    with _eval_mode(model), torch.no_grad(), _autocast(model):
        for name, module in model.named_modules():
            x = module._peakgpt_sample() if isinstance(module, Replacement) else None
            if x is None:
                continue
            expected = original_class(module).forward(module, *x)
            worst, count = max(worst, _relative_error(name, module(*x), expected, limit)), count + 1
    return f"{count} layers, outputs within {worst:.1e} of the largest output"


def _relative_error(name: str, got: Tensor, expected: Tensor, limit: float) -> float:
    got, expected = (t[0] if isinstance(t, tuple) else t for t in (got, expected))
    scale = expected.double().abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    error = float((got.double() - expected.double()).abs().max() / scale)
    if not error <= limit:
        raise ValueError(f"patch: outputs of {name} differ by {error:.1e} of the largest one, expected under {limit:g}")
    return error


def _dtypes(model: nn.Module) -> set[torch.dtype]:
    return {p.dtype for p in model.parameters() if p.is_floating_point()}


def _autocast(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Return autocast to the lowest dtype of the parameters if they have several."""
    dtypes = _dtypes(model)
    lower = [dtype for dtype in (torch.float16, torch.bfloat16) if dtype in dtypes]
    mixed = len(dtypes) > 1 and lower
    return torch.autocast(_device(model).type, lower[0]) if mixed else contextlib.nullcontext()


def _device(model: nn.Module) -> torch.device | None:
    parameter = next(model.parameters(), None)
    return None if parameter is None or parameter.device.type == "meta" else parameter.device


@contextlib.contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Set eval() and restore the mode of each module at the end.

    FSDP2 keeps the parameters of the root module unsharded after a forward. This function reshards them, because an
    optimizer that is created after the check would otherwise hold the unsharded tensors.
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
