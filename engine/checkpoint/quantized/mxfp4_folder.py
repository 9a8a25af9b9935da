"""Reading folders with MXFP4 weights (mxfp4.py) into a model. Other weights of these folders are floats."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from peakgpt.engine.checkpoint.families.family import Family
from peakgpt.engine.checkpoint.folder import CONFIG
from peakgpt.engine.checkpoint.model_folder import OpenWeights, open_layout, read_weights
from peakgpt.engine.checkpoint.quantized.mxfp4 import BLOCKS, FORM, NOT_A_NUMBER, SCALES, Mxfp4, decode, expert_layer
from peakgpt.engine.model.transformer import Transformer


def load_mxfp4(
    folder: Path | str, family: Family, model: Transformer, dtype: torch.dtype, *, dequantize: bool
) -> Transformer:
    """Load a folder's weights into a model of the folder's config.

    Args:
        folder: a model folder.
        family: from `read_config`.
        model: on the meta device.
        dtype: of tensors that are not quantized.
        dequantize: decode the MXFP4 weights to this dtype, instead of multiplying by their elements.
    Returns:
        The model, in evaluation mode; without gradients if it has quantized layers.
    Raises:
        ValueError: there are no weights, a file is damaged, or a tensor is missing, unexpected or of another shape.
    """
    config, expected = model.config, {name: tensor.shape for name, tensor in model.state_dict().items()}
    opened, weights = open_layout(folder, family), {}
    layouts = {name: family.layout_names(config, name)[0] for name, shape in expected.items() if len(shape) == 3}
    packed = {name: layout for name, layout in layouts.items() if layout + BLOCKS in opened.tensors}
    shapes = family.shapes(config, {name: expected[name] for name in packed})
    taken = {layout: _take(opened, layout, shape) for layout, shape in shapes.items()}
    for name, layout in packed.items():
        q, scale = (family.from_layout(config, name, {layout: tensor}) for tensor in taken[layout])
        weights[name] = Mxfp4(q.flatten(2), scale)
    floats = {name: shape for name, shape in expected.items() if name not in packed}
    state = read_weights(opened, family, config, floats, dtype)
    if dequantize or not packed:
        model.load_state_dict(state | {name: decode(w, dtype) for name, w in weights.items()}, assign=True)
        return model.eval()
    for name, matrices in weights.items():
        module = name.removesuffix(".weight")
        parent, _, last = module.rpartition(".")
        setattr(model.get_submodule(parent), last, expert_layer(matrices, state.pop(f"{module}.bias", None)))
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        setattr(model.get_submodule(module), kind, nn.Parameter(tensor, requires_grad=False))
    return model.eval()


def _take(opened: OpenWeights, layout: str, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Remove the blocks and the scales of a tensor of the layout, (E, rows, C), from the opened ones; return them."""
    *rows, width = shape
    sizes = {BLOCKS: (*rows, width // FORM.group, FORM.group // 2), SCALES: (*rows, width // FORM.group)}
    taken = []
    for suffix, expected in sizes.items():
        name = layout + suffix
        file, tensor = opened.shards.get(name, opened.path), opened.tensors.pop(name, None)
        if tensor is None or tensor.dtype != torch.uint8 or tensor.shape != expected or width % FORM.group:
            got = "nothing" if tensor is None else f"{tensor.dtype} of shape {tuple(tensor.shape)}"
            raise ValueError(f"{file}: {name} is {got}, expected uint8 of shape {expected} as {CONFIG} says")
        taken.append(tensor)
    if (taken[1] == NOT_A_NUMBER).any():
        raise ValueError(f"{file}: {name} has {NOT_A_NUMBER}, which is NaN, expected up to {NOT_A_NUMBER - 1}")
    return taken[0], taken[1]
