"""The model families of transformers, one row each: their config's fields and their tensors' names, and ours.

A row is data that both directions read: a config.json becomes a GPTConfig and back, a checkpoint's tensors become the
model's and back. A config is written in the layout of the first family that reads it back as it was.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peakgpt.engine.config import RATES, GPTConfig
from peakgpt.engine.layers import CONV1D

GELU_NEW = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu_erf", "relu": "relu"}


class Field(NamedTuple):
    """One field of a config.json.

    Args:
        ours: of GPTConfig.
        theirs: of transformers' config.
        default: what transformers has where config.json says nothing.
        values: ours for each of theirs; None where they are the same.
    """

    ours: str
    theirs: str
    default: Any
    values: Mapping[Any, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family.

    Args:
        model_type, architecture: as config.json says.
        fields: what config.json says in one field each.
        constants: what every model of the family has.
        fixed: their fields that ask for what this model does not do, with the one value that it takes.
        read: (their config, with defaults) -> more of ours. write: (our config) -> more of theirs.
        base: prefix of all tensors but the head's; files of the bare model leave it out.
        names: their name, or those of queries, keys and values, for each module of ours, `{}` the layer.
        conv1d: whether c_attn, c_proj and c_fc are stored [in, out].
        packed_by_head: whether queries, keys and values alternate head by head in their packed projection.
        always_biased: whether the layout has a bias for every layer and norm; zeros say the same as none.
        renamed: prefixes that other releases use, and those of `names`.
    """

    model_type: str
    architecture: str
    fields: tuple[Field, ...]
    constants: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    read: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda found: {}
    write: Callable[[GPTConfig], dict[str, Any]] = lambda config: {}
    base: str = "transformer."
    names: Mapping[str, str | tuple[str, ...]]
    conv1d: bool = False
    packed_by_head: bool = False
    always_biased: bool = False
    renamed: Mapping[str, str] = field(default_factory=dict)

    # ---- configs ----

    def config(self, found: Mapping[str, Any], *, dropout: float | None = None) -> GPTConfig:
        """Read a config.json's content.

        Args:
            found: the content.
            dropout: replaces the rates that it has.
        Raises:
            ValueError: it asks for what this model does not do, or is not one of this family.
        """
        for name, value in self.fixed.items():
            if found.get(name, value) != value:
                raise ValueError(f"{name} is {found[name]!r}, expected {value}")
        found = {**{f.theirs: f.default for f in self.fields}, **found}
        if dropout is not None:
            found |= {f.theirs: dropout for f in self.fields if f.ours in RATES}
        values = {}
        for ours, theirs, _, choices in self.fields:
            value = found[theirs]
            if choices is not None and value not in choices:
                raise ValueError(f"{theirs} is {value!r}, expected one of {', '.join(map(str, choices))}")
            values[ours] = value if choices is None else choices[value]
        return GPTConfig(**{**values, **self.constants, **self.read(found)})

    def config_json(self, config: GPTConfig) -> dict[str, Any]:
        """Write what this family's config.json can say of a config; `differences` tells what it can not."""
        found = {"model_type": self.model_type, "architectures": [self.architecture], **self.fixed}
        for ours, theirs, default, choices in self.fields:
            value = getattr(config, ours)
            if choices is not None:
                value = next((their for their, our in choices.items() if our == value), default)
            found[theirs] = value
        return {**found, **self.write(config)}

    def differences(self, config: GPTConfig) -> dict[str, tuple[Any, Any]]:
        """(value, the one that this layout would give back) of each field that the layout can not say."""
        try:
            back = self.config(self.config_json(config))
        except (ValueError, TypeError, ZeroDivisionError):  # so far from this family that nothing comes of it
            return {f.name: (getattr(config, f.name), None) for f in fields(config)}
        pairs = {f.name: (getattr(config, f.name), getattr(back, f.name)) for f in fields(config)}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}

    # ---- tensors ----

    def theirs(self, name: str) -> tuple[str, ...]:
        """Their name for a tensor of ours; several where they keep queries, keys and values apart."""
        module, _, kind = name.rpartition(".")
        layer = re.search(r"\.h\.(\d+)\.", module)
        template = module if layer is None else module.replace(layer[0], ".h.{}.", 1)
        found = self.names[template]
        number = "" if layer is None else layer[1]
        return tuple(f"{each.format(number)}.{kind}" for each in ((found,) if isinstance(found, str) else found))

    def standard_names(self, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Their tensors under the names of `names`, whatever release or class they were saved by."""
        for old, new in self.renamed.items():
            found = {new + n.removeprefix(old) if n.startswith(old) else n: t for n, t in found.items()}
        if not any(name.startswith(self.base) for name in found):
            found = {name if name.startswith("lm_head.") else self.base + name: t for name, t in found.items()}
        return {name.replace(f"{self.base}lm_head.", "lm_head."): t for name, t in found.items()}

    def shapes(self, config: GPTConfig, ours: Mapping[str, torch.Size]) -> dict[str, torch.Size]:
        """Names and shapes of their tensors, as [out, in], from those of ours."""
        expected = {}
        for name, shape in ours.items():
            names = self.theirs(name)
            rows = shape[:1] if len(names) == 1 else qkv_rows(config)
            expected |= {n: torch.Size((r, *shape[1:])) for n, r in zip(names, rows, strict=True)}
        return expected

    def swapped(self, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Their tensors as [out, in], or back."""
        return {name: t.t() if self.conv1d and name.endswith(CONV1D) else t for name, t in found.items()}

    def to_ours(self, config: GPTConfig, name: str, found: Mapping[str, Tensor]) -> Tensor:
        """One tensor of ours, by name, from theirs as [out, in]."""
        parts = [found[their] for their in self.theirs(name)]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        if self.packed_by_head and ".c_attn." in name:
            return whole.unflatten(0, (config.n_head, 3, config.head_dim)).transpose(0, 1).flatten(0, 2)
        return whole

    def to_theirs(self, config: GPTConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Their tensors, as they store them, from ours."""
        found = {}
        for name, tensor in state.items():
            names = self.theirs(name)
            if self.packed_by_head and ".c_attn." in name:
                tensor = tensor.unflatten(0, (3, config.n_head, config.head_dim)).transpose(0, 1).flatten(0, 2)
            parts = (tensor,) if len(names) == 1 else tensor.split(qkv_rows(config))
            found |= dict(zip(names, parts, strict=True))
        return self.swapped(found)


def qkv_rows(config: GPTConfig) -> tuple[int, int, int]:
    """Rows of queries, keys and values in the packed projection."""
    return tuple(heads * config.head_dim for heads in (config.n_head, config.n_kv_head, config.n_kv_head))


def family_of(config: GPTConfig) -> Family:
    """The first family whose layout has all that a config says.

    Raises:
        ValueError: there is none; the message names what the nearest lacks.
    """
    found = {family.model_type: family.differences(config) for family in FAMILIES.values()}
    nearest = min(found, key=lambda name: len(found[name]))
    if found[nearest]:
        got = " and ".join(f"{name} {value}" for name, (value, _) in found[nearest].items())
        expected = " and ".join(str(back) for _, back in found[nearest].values())
        raise ValueError(f"checkpoint: got {got}, expected {expected}: the nearest layout, {nearest}, has no other")
    return FAMILIES[nearest]


GPT2_SIZES = (
    Field("n_layer", "n_layer", 12),
    Field("n_head", "n_head", 12),
    Field("n_embd", "n_embd", 768),
    Field("block_size", "n_positions", 1024),
    Field("vocab_size", "vocab_size", 50257),
    Field("layer_norm_epsilon", "layer_norm_epsilon", 1e-5),
    Field("tied_head", "tie_word_embeddings", True),
)
GPT2_RATES = (
    Field("dropout", "resid_pdrop", 0.1),
    Field("embedding_dropout", "embd_pdrop", 0.1),
    Field("attention_dropout", "attn_pdrop", 0.1),
)
GPT2_NAMES = {
    name: name
    for name in (
        "transformer.wte", "transformer.wpe", "transformer.h.{}.ln_1", "transformer.h.{}.attn.c_attn",
        "transformer.h.{}.attn.c_proj", "transformer.h.{}.ln_2", "transformer.h.{}.mlp.c_fc",
        "transformer.h.{}.mlp.c_proj", "transformer.ln_f", "lm_head",
    )
}  # fmt: skip

ROWS = (
    Family(
        model_type="gpt2",
        architecture="GPT2LMHeadModel",
        fields=(
            *GPT2_SIZES,
            Field("n_inner", "n_inner", None),
            Field("activation", "activation_function", "gelu_new", GELU_NEW),
            Field("attention_scale", "scale_attn_weights", True, {True: None, False: 1.0}),
            Field("scale_by_layer", "scale_attn_by_inverse_layer_idx", False),
            *GPT2_RATES,
        ),
        fixed={"add_cross_attention": False},
        read=lambda found: {"bias": found.get("bias", True)},
        write=lambda config: {} if config.bias else {"bias": False},
        names=GPT2_NAMES,
        conv1d=True,
        always_biased=True,
    ),
)
FAMILIES = {family.model_type: family for family in ROWS}
