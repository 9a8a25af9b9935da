"""Which layers an adapter is for: modules of transformers, by PEFT's rules, and the layers of ours that they are.

A module of transformers may be some rows of a layer of ours (q_proj of c_attn), or several layers (gate_up_proj), or
have its rows in another order (query_key_value). The family's names and orders decide (families/family.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from torch import nn

from peakgpt.engine.checkpoint.families.family import Family, qkv_rows
from peakgpt.engine.model.experts import Experts
from peakgpt.engine.model.lora import ALL_LINEAR, LoraConfig, LoraLinear, Rows
from peakgpt.engine.model.quantized_linear import HEAD, QuantizedLinear
from peakgpt.engine.model.transformer import Transformer

QKV = "attn.c_attn"
LAYER_NUMBER = re.compile(r".*?\.[^.]*\.(\d+)\.")  # PEFT's: the first number in a module's name


@dataclass(frozen=True)
class Target:
    """A layer of ours that an adapter is for.

    Args:
        name: of the layer, such as transformer.h.0.attn.c_attn.
        inputs: C.
        modules: transformers' names of all modules that the layer is.
        rows: of each of them in the layer.
        chosen: numbers of the modules that the adapter is for.
        first: the first of the layers that are parts of the same module, with which this one shares its A.
    """

    name: str
    inputs: int
    modules: tuple[str, ...]
    rows: Rows
    chosen: tuple[int, ...]
    first: str

    @property
    def chosen_rows(self) -> Rows:
        """The rows of the chosen modules."""
        return tuple(self.rows[i] for i in self.chosen)

    @property
    def chosen_modules(self) -> tuple[str, ...]:
        """transformers' names of the chosen modules."""
        return tuple(self.modules[i] for i in self.chosen)


def find_targets(model: Transformer, family: Family, config: LoraConfig, *, every_name: bool) -> list[Target]:
    """Return the layers that an adapter is for.

    Args:
        model: with or without adapters.
        family: whose names the config has.
        config: of the adapter.
        every_name: whether each name in target_modules must match a layer.
    Raises:
        ValueError: no layer matches, or a name matches none, or one that cannot have an adapter.
    """
    layers = list(_layers(model, family))
    known = list(dict.fromkeys(module for layer in layers for module in layer.modules))
    names = _resolved(config, layers, known)
    chosen = {module for module in known if _is_chosen(module, names, config)}
    if isinstance(names, tuple) and every_name and (unmatched := [n for n in names if not _any_matches(known, n)]):
        raise ValueError(f"target_modules: got {unmatched[0]!r}, expected the end of a name of a linear layer: "
                         f"{', '.join(_last_names(known))}{_reason(model, unmatched[0])}")  # fmt: skip
    if not chosen:
        raise ValueError(f"target_modules is {names!r:.80}, expected some of {', '.join(_last_names(known))}, as this "
                         f"{family.model_type} model has them")  # fmt: skip
    numbers = (tuple(i for i, module in enumerate(layer.modules) if module in chosen) for layer in layers)
    return [replace(layer, chosen=some) for layer, some in zip(layers, numbers, strict=True) if some]


def file_names(model: Transformer, family: Family, config: LoraConfig) -> Sequence[str] | str:
    """Return target_modules for a file: names that say the same to PEFT as the config says to us."""
    if isinstance(config.target_modules, tuple) or config.target_modules not in (None, ALL_LINEAR):
        return config.target_modules
    layers = list(_layers(model, family))
    known = list(dict.fromkeys(module for layer in layers for module in layer.modules))
    chosen = _resolved(config, layers, known)
    last = tuple(_last_names(chosen))
    return last if {m for m in known if _matches(m, last)} == set(chosen) else chosen


def _layers(model: Transformer, family: Family) -> Iterator[Target]:
    """Yield all linear layers of a model that can have an adapter, as targets of which nothing is chosen."""
    experts = [name for name, module in model.named_modules() if isinstance(module, Experts)]
    inside = [f"{name}." for name, module in model.named_modules() if isinstance(module, LoraLinear)]
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | QuantizedLinear | LoraLinear):
            continue
        if name.startswith((*inside, *(f"{part}." for part in experts))):
            continue
        modules = tuple(n.removesuffix(".weight") for n in family.layout_names(model.config, f"{name}.weight"))
        rows = (module.out_features,) if len(modules) == 1 else qkv_rows(model.config)
        first = family.merged(f"{name}.weight")[0].removesuffix(".weight")
        yield Target(name, module.in_features, modules, tuple(pairwise(accumulate(rows, initial=0))), (), first)


def _resolved(config: LoraConfig, layers: Sequence[Target], known: Sequence[str]) -> tuple[str, ...] | str:
    """Return the names or the regular expression that choose modules; whole names for None and "all-linear"."""
    names = config.target_modules
    if names is None:
        # Of three modules queries and values, as PEFT's table has them for most families.
        return tuple(dict.fromkeys(m for layer in layers if layer.name.endswith(QKV) for m in layer.modules[::2]))
    if names == ALL_LINEAR:
        heads = {module for layer in layers if layer.name == HEAD for module in layer.modules}
        return tuple(module for module in known if module not in heads)
    return names


def _is_chosen(module: str, names: tuple[str, ...] | str, config: LoraConfig) -> bool:
    if config.exclude_modules is not None and _matches(module, config.exclude_modules):
        return False
    if not _matches(module, names):
        return False
    layers = config.layers_to_transform
    if layers is None or isinstance(names, str):
        return True
    number = LAYER_NUMBER.match(module)
    return number is not None and int(number[1]) in (layers if isinstance(layers, tuple) else (layers,))


def _matches(module: str, names: Sequence[str] | str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _any_matches(modules: Sequence[str], name: str) -> bool:
    return any(_matches(module, (name,)) for module in modules)


def _last_names(modules: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(module.rpartition(".")[2] for module in modules))


def _reason(model: Transformer, name: str) -> str:
    """Say why a module that the user may mean has no adapters."""
    if model.config.tied_head and name == HEAD:
        return f"; {name} is tied to the token embedding here, which takes no adapter"
    return "; experts, routers and embeddings take no adapters" if model.config.experts else ""
