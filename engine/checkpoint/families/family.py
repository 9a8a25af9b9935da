"""A model family: how its config.json and its tensors in transformers' layout correspond to ours.

The families themselves are data: one row each in classic.py, llama.py, experts.py and other.py.
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
from peakgpt.engine.model.config import RATES, TRAINING_ONLY, GPTConfig
from peakgpt.engine.model.state_dicts import transpose_conv1d

T = TypeVar("T")
# Section of config.json with the fields of GPTConfig that only training reads and that a family has no place for, such
# as z_loss. transformers keeps it and does not read it.
SECTION = "peakgpt_training"


class Field(NamedTuple):
    """One field of a config.json.

    Args:
        name: its name in GPTConfig.
        hf_name: its name in transformers' config; "section.name" if it is in a section, an object of its own.
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
            the layer's number. A second `{}` is the number of an expert, whose layers we stack. Modules of equal sizes
            with the same name are rows of one tensor, in this order.
        packed_experts: whether one tensor has the weights of all experts of a layer, [E, in, out], under the name of
            the module, and another one their biases, NAME_bias.
        names_of: (GPTConfig) -> names that depend on the config, in addition to `names`.
        row_orders: transformers' module -> its order of rows, a function of row_orders.py; others have our order.
        stacked: tensor with the weights of all experts of a layer in another release, without the layer's name -> the
            tensors of one expert, `{}`, whose rows it has one after the other; or a name alone, which replaces its own.
        conv1d: whether c_attn, c_proj and c_fc are stored [in, out].
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
    names_of: Callable[[GPTConfig], Mapping[str, str]] = lambda config: {}
    row_orders: Mapping[str, Callable[[GPTConfig], Tensor]] = field(default_factory=dict)
    packed_experts: bool = False
    conv1d: bool = False
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
        content = self._without_sections(content)
        for name, value in self.fixed.items():
            got = content.get(name, value)
            if got != value and not (got is None and value is False):
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
            trained = _training_fields(content, dropout)
            return GPTConfig(**{**converted, **self.constants, **dict(chain.from_iterable(grouped)), **trained})
        except ValueError as error:
            raise ValueError(self._with_their_names(str(error))) from None
        except (TypeError, AttributeError, KeyError, ArithmeticError) as error:  # a value of another type
            raise ValueError(f"{type(error).__name__}: {error}, expected values as transformers writes them") from None

    def _without_sections(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """Add the fields of the sections that this family has, as "section.name"."""
        content = dict(content)
        names = (*self.fixed, *(f.hf_name for f in self.fields))
        for section in {name.partition(".")[0] for name in names if "." in name}:
            values = {} if content.get(section) is None else content[section]
            if not isinstance(values, Mapping):
                raise ValueError(f"{section} is {values!r:.60}, expected an object")
            content |= {f"{section}.{name}": value for name, value in values.items()}
        return content

    def _with_defaults(self, content: Mapping[str, Any]) -> dict[str, Any]:
        content = {**{f.hf_name: f.default for f in self.fields}, **content}
        return content | {name: content[alias] for alias, name in self.aliases.items() if alias in content}

    def _with_their_names(self, message: str) -> str:
        """Add the names in config.json of the GPTConfig fields that a message names."""
        named = [f for f in self.fields if f.name != f.hf_name and re.search(rf"\b{f.name}\b", message)]
        return message + "".join(f"; {f.name} is {f.hf_name} in {CONFIG}" for f in named)

    @property
    def config_names(self) -> set[str]:
        """The names of all fields and sections of config.json that the family reads."""
        grouped = chain.from_iterable(group.names for group in self.groups)
        names = {f.hf_name for f in self.fields}.union(self.fixed, self.aliases, grouped)
        return {name.partition(".")[0] for name in names}

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
        grouped = chain.from_iterable(group.write(config).items() for group in self.groups)
        content = _with_sections(content | dict(grouped))
        lacking = [name for name in self._lost(config, content) if name in TRAINING_ONLY]
        return content | ({SECTION: {name: getattr(config, name) for name in lacking}} if lacking else {})

    def differences(self, config: GPTConfig) -> list[str]:
        """Return the GPTConfig fields that this layout cannot express: reading them back gives another value."""
        return self._lost(config, self.config_json(config))

    def _lost(self, config: GPTConfig, content: Mapping[str, Any]) -> list[str]:
        names = [f.name for f in fields(config)]
        try:
            back = self.config(content)
        except ValueError:  # the config is so different that it cannot be read back
            return names
        return [name for name in names if getattr(config, name) != getattr(back, name)]

    # ---- tensors ----

    def layout_names(self, config: GPTConfig, name: str) -> tuple[str, ...]:
        """Return the layout's names for one of our tensors.

        There is one name, or three if the layout separates queries, keys and values, or one for each expert.
        """
        modules, layer, kind = self._modules(config, name)
        if self.packed_experts and _is_stacked(name):
            return (modules[0].format(layer) + {"weight": "", "bias": "_bias"}[kind],)
        experts = range(config.experts) if _is_stacked(name) else (0,)
        return tuple(f"{module.format(layer, expert)}.{kind}" for module in modules for expert in experts)

    def merged(self, name: str) -> tuple[str, ...]:
        """Return the names of our tensors that are rows of the same tensor of the layout as `name`, in its order."""
        template, layer, kind = _template(name)
        theirs = self.names.get(template)
        modules = [module for module, other in self.names.items() if other == theirs] if theirs else [template]
        return tuple(f"{module.format(layer)}.{kind}" for module in modules)

    def _modules(self, config: GPTConfig, name: str) -> tuple[tuple[str, ...], str, str]:
        """Return the layout's modules for one of our tensors, with `{}` for the layer, the layer, weight or bias."""
        template, layer, kind = _template(name)
        modules = self.names_of(config).get(template) or self.names[template]
        return (modules,) if isinstance(modules, str) else modules, layer, kind

    def _row_order(self, config: GPTConfig, name: str) -> Tensor | None:
        order = self.row_orders.get(self._modules(config, name)[0][0])
        return None if order is None else order(config)

    def _rows_axis(self, name: str) -> int | None:
        """Return the axis of our tensor that the layout's rows are along; None: it has one tensor for each expert."""
        return 0 if not _is_stacked(name) else 1 if self.packed_experts else None

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
        expected: dict[str, torch.Size] = {}
        for name, shape in our_shapes.items():
            names, axis = self.layout_names(config, name), self._rows_axis(name)
            if axis is None:
                expected |= dict.fromkeys(names, shape[1:])
                continue
            parts = (shape[axis],) if len(names) == 1 else qkv_rows(config)
            for layout_name, rows in zip(names, parts, strict=True):
                above = expected[layout_name][axis] if layout_name in expected else 0
                expected[layout_name] = torch.Size((*shape[:axis], above + rows, *shape[axis + 1 :]))
        return expected

    def transposed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Convert the matrices that the family stores as [in, out] to [out, in], or back."""
        if self.packed_experts:
            return {name: tensor.mT if tensor.dim() == 3 else tensor for name, tensor in tensors.items()}
        return transpose_conv1d(tensors) if self.conv1d else dict(tensors)

    def from_layout(self, config: GPTConfig, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return one of our tensors, by its name, from the layout's tensors with matrices as [out, in]."""
        parts = [tensors[layout_name] for layout_name in self.layout_names(config, name)]
        axis = self._rows_axis(name)
        if axis is None:
            return torch.stack(parts)
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        if (order := self._row_order(config, name)) is not None:
            whole = whole.index_select(axis, order.argsort())
        merged = self.merged(name)
        return whole if len(merged) == 1 else whole.chunk(len(merged), axis)[merged.index(name)]

    def to_layout(self, config: GPTConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Convert our state dict, or a part of it that has all tensors that are `merged`, to the layout's tensors."""
        return self.transposed(self.join(config, state))

    def join(self, config: GPTConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Do the same, but leave all matrices as [out, in]. Tensors may have any axes after those of the rows."""
        tensors = {}
        for name, tensor in state.items():
            names, merged, axis = self.layout_names(config, name), self.merged(name), self._rows_axis(name)
            if axis is None:
                tensors |= dict(zip(names, tensor.unbind(), strict=True))
                continue
            if name != merged[0]:
                continue
            whole = tensor if len(merged) == 1 else torch.cat([state[other] for other in merged], axis)
            if (order := self._row_order(config, name)) is not None:
                whole = whole.index_select(axis, order.to(whole.device))
            parts = (whole,) if len(names) == 1 else whole.split(qkv_rows(config))
            tensors |= dict(zip(names, parts, strict=True))
        return tensors


def _template(name: str) -> tuple[str, str, str]:
    """Split the name of a tensor into its module, with `{}` for the layer, the layer's number, and weight or bias."""
    module, _, kind = name.rpartition(".")
    layer = re.search(r"\.h\.(\d+)\.", module)
    return (module, "", kind) if layer is None else (module.replace(layer[0], ".h.{}.", 1), layer[1], kind)


def _training_fields(content: Mapping[str, Any], dropout: float | None) -> dict[str, Any]:
    """Return the training fields of our section of a config.json, with `dropout` instead of its rates."""
    section = content.get(SECTION) or {}
    if not isinstance(section, Mapping) or not section.keys() <= set(TRAINING_ONLY):
        raise ValueError(f"{SECTION} is {section!r:.60}, expected an object with {', '.join(TRAINING_ONLY)}")
    return {name: dropout if dropout is not None and name in RATES else value for name, value in section.items()}


def _with_sections(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a config.json with the fields named "section.name" in their sections."""
    result: dict[str, Any] = {}
    for name, value in content.items():
        section, _, inner = name.rpartition(".")
        (result.setdefault(section, {}) if section else result)[inner] = value
    return result


def _is_stacked(name: str) -> bool:
    """Return whether a tensor of ours, by its name, has the parameters of all experts of a layer."""
    return ".mlp.experts." in name


def qkv_rows(config: GPTConfig) -> tuple[int, int, int]:
    """Return the number of rows of queries, keys and values in the packed projection."""
    return tuple(heads * config.head_dim for heads in (config.n_head, config.n_kv_head, config.n_kv_head))
