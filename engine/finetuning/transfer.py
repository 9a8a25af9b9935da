"""Transfer: copy the weights of a pre-trained model into one with more tokens, and perhaps with new last layers.

Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training", section 5 and figure 2, transfers
the embeddings and the first layers, and initializes the rest at random.
"""

from __future__ import annotations

import re
from dataclasses import replace

import torch

from peakgpt.engine.gpt import GPT

BLOCK = re.compile(r"transformer\.h\.(\d+)\.")
EMBEDDINGS = ("transformer.wte.", "transformer.wpe.", "transformer.ln_emb.", "transformer.project_in.")
NOTHING = -1  # layers to transfer: not even the embeddings


def transferred(source: GPT, vocab_size: int, first_new: int, layers: int | None = None) -> GPT:
    """Return a model with the weights of another one; all others are random, from torch's generator.

    Args:
        source: the pre-trained model.
        vocab_size: number of tokens that the model needs; its vocabulary grows to it, and does not shrink.
        first_new: embeddings from this id on are random.
        layers: number of blocks to copy, from the first one, besides the embeddings. What follows the last block (norm,
            untied head) is copied with the last block. NOTHING copies no weight. None copies all.
    Raises:
        ValueError: the source has fewer layers.
    """
    config = source.config
    layers = config.n_layer if layers is None else layers
    if layers > config.n_layer:
        raise ValueError(f"transfer_layers is {layers}, expected at most the {config.n_layer} layers of the model")
    model = GPT(replace(config, vocab_size=max(config.vocab_size, vocab_size)))
    model.source_files = source.source_files
    weights = source.state_dict()
    with torch.no_grad():
        for name, target in model.state_dict().items():
            if _is_transferred(name, layers, config.n_layer):
                rows = min(first_new, len(weights[name])) if _has_tokens(name) else len(target)
                target[:rows] = weights[name][:rows]
    return model.train(source.training)


def _is_transferred(name: str, layers: int, all_layers: int) -> bool:
    if match := BLOCK.match(name):
        return int(match[1]) < layers
    return layers > NOTHING if name.startswith(EMBEDDINGS) else layers == all_layers


def _has_tokens(name: str) -> bool:
    """Return whether the rows of a tensor belong to tokens."""
    return name.startswith(("transformer.wte.", "lm_head."))
