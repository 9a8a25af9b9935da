"""A model family: how its config.json and its tensors in transformers' layout correspond to ours.

The families themselves are data: one row each in families_*.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, fields
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from peakgpt.engine.checkpoint.folder import CONFIG
from peakgpt.engine.model.config import RATES, GPTConfig
from peakgpt.engine.model.state_dicts import transpose_conv1d

T = TypeVar("T")


class Field(NamedTuple):
    """One field of a config.json.

    Args:
        name: its name in GPTConfig.
        hf_name: its name in transformers' config.
        default: transformers' value if config.json has no such field.
        values: value in config.json -> value in GPTConfig; None if both are the same.
    """

    name: str
    hf_name: str
    default: Any
    values: Mapping[Any, Any] | None = None


class FieldGroup(NamedTuple):
    """Fields of a config.json that give fields of GPTConfig together.

    Args:
        names: of the fields in config.json.
        read: (config.json with defaults) -> GPTConfig fields.
        write: (GPTConfig) -> fields of config.json.
    """

    names: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], dict[str, Any]]
    write: Callable[[GPTConfig], dict[str, Any]]


def with_defaults(fields: tuple[Field, ...], **defaults: Any) -> tuple[Field, ...]:
    """Return the fields with other defaults, which are given by transformers' names."""
    return tuple(f._replace(default=defaults.get(f.hf_name, f.default)) for f in fields)


@dataclass(frozen=True, kw_only=True)
class Family:
    """One model family of transformers.

    Args:
        model_type, architecture: as in config.json.
        fields: the fields of config.json with one corresponding field of GPTConfig.
        constants: GPTConfig fields with the same value in every model of the family.
        fixed: fields of config.json that we support with one value only -> that value.
        groups: further fields of config.json, and of GPTConfig; they win over `fields` and `constants`.
        base: prefix of all tensors except the head's; files of the bare model omit it.
        names: transformers' name of each of our modules, or three names for queries, keys and values. `{}` stands for
            the layer's number. A second `{}` is the number of an expert, whose layers we stack.
        stacked: tensor with the weights of all experts of a layer in another release, without the layer's name -> the
            tensors of one expert, `{}`, whose rows it has one after the other; or a name alone, which replaces its own.
        conv1d: whether c_attn, c_proj and c_fc are stored [in, out].
        packed_by_head: whether the packed projection has queries, keys and values head by head.
        always_biased: whether the layout has a bias for every layer and norm, zero if the model has none.
        renamed: tensor prefixes of other releases -> those of `names`.
        aliases: other names of config.json fields, which win in transformers -> those of `fields`.
    """

    model_type: str
    architecture: str
    fields: tuple[Field, ...]
    constants: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    groups: tuple[FieldGroup, ...] = ()
    base: str = "transformer."
    names: Mapping[str, str | tuple[str, ...]]
    conv1d: bool = False
    packed_by_head: bool = False
    always_biased: bool = False
    renamed: Mapping[str, str] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    stacked: Mapping[str, tuple[str, ...] | str] = field(default_factory=dict)

    # ---- configs ----

    def config(self, content: Mapping[str, Any], *, dropout: float | None = None) -> GPTConfig:
        """Convert the content of a config.json.

        Args:
            content: the config.json of a model of this family.
            dropout: replaces its dropout rates.
        Raises:
            ValueError: the content describes a model that we do not support.
        """
        for name, value in self.fixed.items():
            if content.get(name, value) != value:
                raise ValueError(f"{name} is {content[name]!r}, expected {value}")
        content = self._with_defaults(content)
        if dropout is not None:
            content |= {f.hf_name: dropout for f in self.fields if f.name in RATES}
        converted = {}
        for name, hf_name, _, values in self.fields:
            value = content[hf_name]
            if values is not None and not (isinstance(value, Hashable) and value in values):
                raise ValueError(f"{hf_name} is {value!r}, expected one of {', '.join(map(str, values))}")
            converted[name] = value if values is None else values[value]
        try:
            grouped = [group.read(content).items() for group in self.groups]
            return GPTConfig(**{**converted, **self.constants, **dict(chain.from_iterable(grouped))})
        except ValueError as error:
            raise ValueError(self._with_their_names(str(error))) from None
        except (TypeError, AttributeError, KeyError, ArithmeticError) as error:  # a value of another type
            raise ValueError(f"{type(error).__name__}: {error}, expected values as transformers writes them") from None

    def _with_defaults(self, content: Mapping[str, Any]) -> dict[str, Any]:
        content = {**{f.hf_name: f.default for f in self.fields}, **content}
        return content | {name: content[alias] for alias, name in self.aliases.items() if alias in content}

    def _with_their_names(self, message: str) -> str:
        """Add the names in config.json of the GPTConfig fields that a message names."""
        named = [f for f in self.fields if f.name != f.hf_name and re.search(rf"\b{f.name}\b", message)]
        return message + "".join(f"; {f.name} is {f.hf_name} in {CONFIG}" for f in named)

    @property
    def config_names(self) -> set[str]:
        """The names of all fields of config.json that the family reads."""
        grouped = chain.from_iterable(group.names for group in self.groups)
        return {f.hf_name for f in self.fields}.union(self.fixed, self.aliases, grouped)

    def module_counts(self, content: Mapping[str, Any]) -> dict[str, str]:
        """Return "layers" and "experts" -> the field of a config.json that has their number."""
        by_name = {f.name: f.hf_name for f in self.fields}
        present = {name: alias for alias, name in self.aliases.items() if alias in content}
        names = {"layers": by_name["n_layer"], "experts": by_name.get("experts")}
        return {what: present.get(name, name) for what, name in names.items() if name is not None}

    def config_json(self, config: GPTConfig) -> dict[str, Any]:
        """Convert a config to the content of config.json; see `differences` for fields that it cannot express."""
        content = {"model_type": self.model_type, "architectures": [self.architecture], **self.fixed}
        for name, hf_name, default, values in self.fields:
            value = getattr(config, name)
            if values is not None:
                value = next((hf_value for hf_value, our_value in values.items() if our_value == value), default)
            content[hf_name] = value
        return content | dict(chain.from_iterable(group.write(config).items() for group in self.groups))

    def differences(self, config: GPTConfig) -> list[str]:
        """Return the GPTConfig fields that this layout cannot express: reading them back gives another value."""
        names = [f.name for f in fields(config)]
        try:
            back = self.config(self.config_json(config))
        except ValueError:  # the config is so different that it cannot be read back
            return names
        return [name for name in names if getattr(config, name) != getattr(back, name)]

    # ---- tensors ----

    def layout_names(self, name: str, experts: int = 0) -> tuple[str, ...]:
        """Return the layout's name for one of our tensors; three names if it separates queries, keys and values.

        Args:
            name: of our tensor.
            experts: number of experts, for the names of the parts of a stacked tensor.
        """
        module, _, kind = name.rpartition(".")
        layer = re.search(r"\.h\.(\d+)\.", module)
        template = module if layer is None else module.replace(layer[0], ".h.{}.", 1)
        modules = self.names[template]
        number = "" if layer is None else layer[1]
        if _is_stacked(name):
            return tuple(f"{modules.format(number, expert)}.{kind}" for expert in range(experts))
        return tuple(f"{m.format(number)}.{kind}" for m in ((modules,) if isinstance(modules, str) else modules))

    def standard_names(self, items: Mapping[str, T]) -> dict[str, T]:
        """Rename the keys, tensor names of any release or class of transformers, to those of `names`."""
        for old, new in self.renamed.items():
            items = {new + n.removeprefix(old) if n.startswith(old) else n: item for n, item in items.items()}
        head = f"{self.names['lm_head']}."
        if not any(name.startswith(self.base) for name in items):
            items = {name if name.startswith(head) else self.base + name: item for name, item in items.items()}
        return {name.replace(self.base + head, head): item for name, item in items.items()}

    def separate_experts(self, tensors: Mapping[str, Tensor], files: Mapping[str, T]) -> tuple[dict, dict]:
        """Replace the tensors of `stacked` by views of those of `names`; the same for the file of each tensor."""
        separate, file_of = {}, dict(files)
        for name, tensor in tensors.items():
            parts = self._parts_of(name, tensor)
            separate |= parts
            file_of |= dict.fromkeys(parts, files[name]) if name in files else {}
        return separate, file_of

    def _parts_of(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        for suffix, theirs in self.stacked.items():
            if not name.endswith(f".{suffix}"):
                continue
            layer = name.removesuffix(suffix)
            if isinstance(theirs, str):
                return {layer + theirs: tensor}
            parts = tensor.chunk(len(theirs), 1) if tensor.dim() == 3 else ()
            return {
                layer + part_name.format(expert): matrix
                for part_name, part in zip(theirs, parts, strict=False)
                for expert, matrix in enumerate(part)
            }
        return {name: tensor}

    def shapes(self, config: GPTConfig, our_shapes: Mapping[str, torch.Size]) -> dict[str, torch.Size]:
        """Return the layout's tensor names and shapes, matrices as [out, in], from those of our state dict."""
        expected = {}
        for name, shape in our_shapes.items():
            names = self.layout_names(name, config.experts)
            if _is_stacked(name):
                expected |= dict.fromkeys(names, shape[1:])
                continue
            rows = shape[:1] if len(names) == 1 else qkv_rows(config)
            expected |= {n: torch.Size((r, *shape[1:])) for n, r in zip(names, rows, strict=True)}
        return expected

    def transpose_conv1d(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Convert the layout's matrices from [in, out] to [out, in] or back, if the family stores them as [in, out]."""
        return transpose_conv1d(tensors) if self.conv1d else dict(tensors)

    def from_layout(self, config: GPTConfig, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return one of our tensors, by its name, from the layout's tensors with matrices as [out, in]."""
        parts = [tensors[layout_name] for layout_name in self.layout_names(name, config.experts)]
        if _is_stacked(name):
            return torch.stack(parts)
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        if self.packed_by_head and ".c_attn." in name:
            return whole.unflatten(0, (config.n_head, 3, config.head_dim)).transpose(0, 1).flatten(0, 2)
        return whole

    def to_layout(self, config: GPTConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Convert our state dict to the layout's tensors."""
        tensors = {}
        for name, tensor in state.items():
            names = self.layout_names(name, config.experts)
            if _is_stacked(name):
                tensors |= dict(zip(names, tensor.unbind(), strict=True))
                continue
            if self.packed_by_head and ".c_attn." in name:
                tensor = tensor.unflatten(0, (3, config.n_head, config.head_dim)).transpose(0, 1).flatten(0, 2)
            parts = (tensor,) if len(names) == 1 else tensor.split(qkv_rows(config))
            tensors |= dict(zip(names, parts, strict=True))
        return self.transpose_conv1d(tensors)


def _is_stacked(name: str) -> bool:
    """Return whether a tensor of ours, by its name, has the parameters of all experts of a layer."""
    return ".mlp.experts." in name


def qkv_rows(config: GPTConfig) -> tuple[int, int, int]:
    """Return the number of rows of queries, keys and values in the packed projection."""
    return tuple(heads * config.head_dim for heads in (config.n_head, config.n_kv_head, config.n_kv_head))
