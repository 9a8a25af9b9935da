"""An architecture of llama.cpp: how metadata and tensors of a .gguf file correspond to GPTConfig and our state dict.

The architectures themselves are data: one row each in architectures.py. Matrices are [out, in] on both sides, and
packed projections have queries, keys and values one after the other on both sides.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peakgpt.engine.checkpoint.families.family import qkv_rows
from peakgpt.engine.data.gguf_header import GGUFHeader
from peakgpt.engine.model.config import BIASED, TRAINING_ONLY, GPTConfig

REQUIRED = object()
LAYER = re.compile(r"^blk\.(\d+)\.")
QKV = ("attn_q", "attn_k", "attn_v")
MODULES: Mapping[str, str | tuple[str, ...]] = {  # our modules -> those of llama.cpp, gguf.constants.TENSOR_NAMES
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_emb": "token_embd_norm",
    "transformer.ln_f": "output_norm",
    "lm_head": "output",
    "transformer.h.{}.ln_1": "blk.{}.attn_norm",
    "transformer.h.{}.ln_2": "blk.{}.ffn_norm",
    "transformer.h.{}.attn.c_attn": tuple(f"blk.{{}}.{part}" for part in QKV),
    "transformer.h.{}.attn.c_proj": "blk.{}.attn_output",
    "transformer.h.{}.mlp.c_gate": "blk.{}.ffn_gate",
    "transformer.h.{}.mlp.c_fc": "blk.{}.ffn_up",
    "transformer.h.{}.mlp.c_proj": "blk.{}.ffn_down",
    "transformer.h.{}.ln_1_out": "blk.{}.post_attention_norm",
    "transformer.h.{}.ln_2_out": "blk.{}.post_ffw_norm",
    "transformer.h.{}.attn.q_norm": "blk.{}.attn_q_norm",
    "transformer.h.{}.attn.k_norm": "blk.{}.attn_k_norm",
    "transformer.h.{}.attn": "blk.{}.attn_sinks",
    "transformer.h.{}.mlp.router": "blk.{}.ffn_gate_inp",
    "transformer.h.{}.mlp.experts.c_gate": "blk.{}.ffn_gate_exps",
    "transformer.h.{}.mlp.experts.c_fc": "blk.{}.ffn_up_exps",
    "transformer.h.{}.mlp.experts.c_proj": "blk.{}.ffn_down_exps",
}
_BIAS_OF = {"qkv": ("blk.0.attn_qkv", "blk.0.attn_q"), "out": ("blk.0.attn_output",), "mlp": ("blk.0.ffn_down",),
            "norm": ("output_norm",)}  # fmt: skip
# Keys of metadata that say nothing about the mathematics, and those that we support with one value only.
IGNORED = {"vocab_size", "tensor_data_layout", "rope.scaling.finetuned"}
FIXED = {"attention.causal": True, "expert_count": 0, "expert_used_count": 0, "rope.scaling.type": "none"}


class Key(NamedTuple):
    """One key of the metadata.

    Args:
        name: the field of GPTConfig.
        key: without the name of the architecture.
        kind: int, float or bool.
        default: the field's value if the file has no such key, where llama.cpp has one.
        values: value in the file -> value in GPTConfig; None if both are the same.
    """

    name: str
    key: str
    kind: type
    default: Any = REQUIRED
    values: Mapping[Any, Any] | None = None


class Part(NamedTuple):
    """Rows [start, stop) of a tensor in the file."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One architecture of llama.cpp.

    Args:
        name: general.architecture.
        keys: the keys with one corresponding field of GPTConfig.
        constants: GPTConfig fields with the same value in every model of the architecture.
        fixed: keys that we support with one value only -> that value.
        read: (header) -> further GPTConfig fields.
        write: (GPTConfig) -> further metadata by key.
        extra_keys: the keys that `read` uses.
        modules: entries of MODULES that differ.
        modules_of: for a residual, entries that differ with it.
        packed_gate: whether ffn_up has the rows of the gate and then those of ffn_up.
        interleaved: whether rows of queries and keys are reordered, so that neighboring features rotate as a pair.
        norm_shift: number that the file adds to the weights of norms.
        always_biased: parts that have biases in every file; zeros are written for a model without them.
        extra_tensors: (GPTConfig) -> tensors of the file that are computed from the config.
        extra_names: names of such tensors, which `read` uses.
    """

    name: str
    keys: tuple[Key, ...]
    constants: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    read: Callable[[GGUFHeader], dict[str, Any]] = lambda header: {}
    write: Callable[[GPTConfig], dict[str, Any]] = lambda config: {}
    extra_keys: Collection[str] = ()
    modules: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    modules_of: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    packed_gate: bool = False
    interleaved: bool = False
    norm_shift: float = 0.0
    always_biased: tuple[str, ...] = ()
    extra_tensors: Callable[[GPTConfig], dict[str, Tensor]] = lambda config: {}
    extra_names: Collection[str] = ()

    # ---- metadata ----

    def config(self, header: GGUFHeader, *, dropout: float | None = None) -> GPTConfig:
        """Convert the metadata and the shapes of a file.

        Args:
            header: of a file of this architecture.
            dropout: replaces the dropout rates, which a file does not have: 0.
        Raises:
            ValueError: the file describes a model that we do not support, or its parts contradict each other.
        """
        self._expect_supported(header)
        values = {key.name: self._value(header, key) for key in self.keys}
        present = {name: value for name, value in values.items() if value is not None}
        _expect_layers(header, present["n_layer"])
        own = {**present, **_from_tensors(header), **self.constants, **self.read(header), "dropout": dropout or 0.0}
        try:
            return GPTConfig(**own)
        except ValueError as error:
            raise ValueError(self._with_their_names(str(error))) from None
        except TypeError as error:
            raise ValueError(f"{error}, expected metadata as llama.cpp writes it") from None

    def _value(self, header: GGUFHeader, key: Key) -> Any:
        name = f"{self.name}.{key.key}"
        if name not in header.metadata and key.default is not REQUIRED:
            return key.default
        value = header.get(name, (int, float) if key.kind is float else key.kind)
        if value is None:
            raise ValueError(f"got no {name}, expected one: {self.name} needs it")
        if key.values is not None and value not in key.values:
            raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(str, key.values))}")
        return value if key.values is None else key.values[value]

    def _expect_supported(self, header: GGUFHeader) -> None:
        fixed = {**FIXED, **self.fixed}
        known = {*IGNORED, *self.extra_keys, *(key.key for key in self.keys), "attention.value_length"}
        for name, value in header.metadata.items():
            key = name.removeprefix(f"{self.name}.")
            if key == name or key in known:
                continue
            if key not in fixed:
                raise ValueError(f"got {name} {str(value)!r:.80}, expected none: peakgpt does not support it")
            if value != fixed[key]:
                raise ValueError(f"{name} is {str(value)!r:.80}, expected {fixed[key]!r}")
        lengths = {header.get(f"{self.name}.attention.{part}_length", int) for part in ("key", "value")}
        if len(lengths) > 1:
            raise ValueError(f"got {self.name}.attention.key_length and value_length {lengths}, expected the same")

    def _with_their_names(self, message: str) -> str:
        """Add the keys of the GPTConfig fields that a message names."""
        named = [key for key in self.keys if re.search(rf"\b{key.name}\b", message)]
        return message + "".join(f"; {key.name} is {self.name}.{key.key} in the file" for key in named)

    def metadata(self, config: GPTConfig) -> dict[str, Any]:
        """Convert a config to metadata; see `differences` for fields that it cannot express."""
        content = dict(self.fixed)
        for key in self.keys:
            value = getattr(config, key.name)
            if key.values is not None:
                value = next((theirs for theirs, ours in key.values.items() if ours == value), value)
            if value is not None:
                content[key.key] = key.kind(value)
        if "attention.key_length" in content:
            content["attention.value_length"] = content["attention.key_length"]
        content |= self.write(config)
        return {"general.architecture": self.name, **{f"{self.name}.{key}": value for key, value in content.items()}}

    def differences(self, config: GPTConfig, header: GGUFHeader) -> list[str]:
        """Return the GPTConfig fields that a file cannot express: reading its header back gives another value.

        A file does not say which GELU a model has, so this is no difference: llama.cpp computes its own.
        """
        names = [f.name for f in fields(config) if f.name not in TRAINING_ONLY]
        try:
            back = self.config(header)
        except ValueError:
            return names
        return [name for name in names if not _same(*(_stated(one, name) for one in (config, back)))]

    # ---- tensors ----

    def parts(self, config: GPTConfig, name: str, rows: int, present: Collection[str] = ()) -> list[Part]:
        """Return where the rows of one of our tensors are in the file.

        Args:
            name, rows: of our tensor.
            present: names of the file's tensors; a packed projection among them wins.
        """
        module, _, kind = name.rpartition(".")
        kind = "weight" if kind == "sinks" else kind
        layer = re.search(r"\.h\.(\d+)\.", module)
        number = "" if layer is None else layer[1]
        template = module if layer is None else module.replace(layer[0], ".h.{}.", 1)
        modules = {**MODULES, **self.modules, **self.modules_of.get(config.residual, {})}.get(template)
        if modules is None:
            raise ValueError(f"got a model with {name}, expected none: {self.name} of llama.cpp has no such tensor")
        if not isinstance(modules, str) and f"blk.{number}.attn_qkv.{kind}" in present:
            modules = "blk.{}.attn_qkv"
        names = [f"{m.format(number)}.{kind}" for m in ((modules,) if isinstance(modules, str) else modules)]
        if self.packed_gate and template.endswith(("mlp.c_gate", "mlp.c_fc")):
            start = 0 if template.endswith("c_gate") else rows
            return [Part(f"blk.{number}.ffn_up.{kind}", start, start + rows)]
        counts = [rows] if len(names) == 1 else qkv_rows(config)
        return [Part(one, 0, count) for one, count in zip(names, counts, strict=True)]

    def shapes(
        self, config: GPTConfig, our_shapes: Mapping[str, torch.Size], present: Collection[str] = ()
    ) -> dict[str, tuple[int, ...]]:
        """Return names and shapes of the file's tensors from those of our state dict."""
        shapes: dict[str, tuple[int, ...]] = {}
        for name, shape in our_shapes.items():
            for part in self.parts(config, name, shape[0], present):
                rows = max(part.stop, shapes.get(part.name, (0,))[0])
                shapes[part.name] = (rows, *shape[1:])
        return shapes

    def from_file(self, config: GPTConfig, name: str, tensor: Tensor) -> Tensor:
        """Convert rows that `parts` has put together to one of our tensors, in place where a number is subtracted."""
        if self.norm_shift and _is_norm(name):
            tensor -= self.norm_shift
        order = self._row_order(config, name)
        return tensor if order is None else tensor[order]

    def to_file(self, config: GPTConfig, name: str, tensor: Tensor) -> Tensor:
        """Invert `from_file`."""
        if self.norm_shift and _is_norm(name):
            tensor = tensor.float() + self.norm_shift
        order = self._row_order(config, name)
        return tensor if order is None else tensor[order.argsort()]

    def _row_order(self, config: GPTConfig, name: str) -> Tensor | None:
        """Return the row in the file of each row of ours; None for the same order.

        Of a head with D features the file has 0, D / 2, 1, D / 2 + 1, ...: LlamaModel.permute of llama.cpp's converter.
        """
        if not self.interleaved or not re.search(r"\.attn\.c_attn\.\w+$", name):
            return None
        queries, keys, values = qkv_rows(config)
        rows = torch.arange(queries + keys).view(-1, config.head_dim // 2, 2).transpose(1, 2).flatten()
        return torch.cat((rows, torch.arange(queries + keys, queries + keys + values)))


def _is_norm(name: str) -> bool:
    return re.search(r"(^|[._])(ln_\w+|q_norm|k_norm|norm_\w+)\.weight$", name) is not None


def _stated(config: GPTConfig, name: str) -> Any:
    """Return a field; the default of attention_scale as a number, and longrope without what attention_factor says."""
    value = getattr(config, name)
    if name == "rope_scaling" and value is not None and value["rope_type"] == "longrope":
        return {key: number for key, number in value.items() if key != "factor"}
    return config.head_dim**-0.5 if name == "attention_scale" and value is None else value


def _same(first: Any, second: Any) -> bool:
    """Return whether two values are the same up to float32, which a file has; all GELUs are the same."""
    if isinstance(first, float) and isinstance(second, float):
        return torch.tensor(first).item() == torch.tensor(second).item()
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(_same(first[key], second[key]) for key in first)
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(_same, first, second))
    return first == second or (str(first).startswith("gelu") and str(second).startswith("gelu"))


def _expect_layers(header: GGUFHeader, count: int) -> None:
    """Compare the number of layers with the tensors, before a damaged number builds modules until memory is full."""
    found = {int(match[1]) for name in header.tensors if (match := LAYER.match(name))}
    if count != len(found) or count != max(found, default=-1) + 1:
        raise ValueError(f"got tensors of {len(found)} layers, expected {count} as block_count says")


def _from_tensors(header: GGUFHeader) -> dict[str, Any]:
    """Return the GPTConfig fields that only the tensors say."""
    tensors = header.tensors
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ValueError("got no matrix token_embd.weight, expected one")
    bias = tuple(part for part in BIASED if any(f"{module}.bias" in tensors for module in _BIAS_OF[part]))
    return {
        "vocab_size": embedding.shape[0],
        "bias": bias,
        "tied_head": "output.weight" not in tensors,
        "head_bias": "output.bias" in tensors,
    }
