"""The model families of transformers, one row each: their config's fields and their tensors' names, and ours.

A row is data that both directions read: a config.json becomes a GPTConfig and back, a checkpoint's tensors become the
model's and back. A config is written in the layout of the first family that reads it back as it was; the last one is
our own, which says everything.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peakgpt.engine.model.config import RATES, GPTConfig
from peakgpt.engine.model.state_dicts import CONV1D

OWN = "peakgpt"  # model_type of what no family of transformers has
GELU_NEW = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu_erf", "relu": "relu"}
GELU_FAST = {"gelu_fast": "gelu_tanh", **GELU_NEW}  # how transformers writes NeoX-20B's; to the bit they differ


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
        renamed: prefixes of tensors that other releases use, and those of `names`.
        aliases: fields of config.json that other releases use, and those of `fields`.
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
    aliases: Mapping[str, str] = field(default_factory=dict)

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
        found |= {name: found[alias] for alias, name in self.aliases.items() if alias in found}
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

    def differences(self, config: GPTConfig) -> list[str]:
        """The fields that this layout can not say: it would give back another value."""
        names = [f.name for f in fields(config)]
        try:
            back = self.config(self.config_json(config))
        except ValueError:  # so far from this family that nothing comes of it
            return names
        return [name for name in names if getattr(config, name) != getattr(back, name)]

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
        head = f"{self.names['lm_head']}."
        if not any(name.startswith(self.base) for name in found):
            found = {name if name.startswith(head) else self.base + name: t for name, t in found.items()}
        return {name.replace(self.base + head, head): t for name, t in found.items()}

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
    """The first family whose layout has all that a config says."""
    return next(family for family in FAMILIES.values() if not family.differences(config))


def nearest(config: GPTConfig) -> tuple[str, list[str]]:
    """transformers' model type whose layout lacks least of a config, and the fields that it lacks."""
    lacking = {name: family.differences(config) for name, family in FAMILIES.items() if name != OWN}
    return min(lacking.items(), key=lambda pair: len(pair[1]))


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


def _with_defaults(fields: tuple[Field, ...], **defaults: Any) -> tuple[Field, ...]:
    """The fields with other defaults, by their names."""
    return tuple(f._replace(default=defaults.get(f.theirs, f.default)) for f in fields)


def _names(
    base: str, layer: str, *, wte: str, ln_1: str, qkv: str | tuple[str, ...], out: str, up: str, down: str,
    ln_f: str = "ln_f", head: str = "lm_head", ln_2: str = "", **more: str,
) -> dict[str, str | tuple[str, ...]]:  # fmt: skip
    """Names of a family whose blocks are called base + layer; `more` are modules beside the blocks."""
    beside = {"wte": wte, "ln_f": ln_f, **more}
    within = {"ln_1": ln_1, "ln_2": ln_2, "attn.c_attn": qkv, "attn.c_proj": out, "mlp.c_fc": up, "mlp.c_proj": down}
    prefix = f"{base}{layer}.{{}}."
    return {
        "lm_head": head,
        **{f"transformer.{ours}": base + theirs for ours, theirs in beside.items()},
        **{
            f"transformer.h.{{}}.{ours}": prefix + theirs
            if isinstance(theirs, str)
            else tuple(prefix + each for each in theirs)
            for ours, theirs in within.items()
        },
    }


class _AsTheyAre(dict[str, str]):
    """Names of a layout that has ours."""

    def __missing__(self, name: str) -> str:
        return name


def _qkv(module: str) -> tuple[str, ...]:
    return tuple(f"{module}.{part}_proj" for part in "qkv")


GPT2_NAMES = _names(
    "transformer.", "h", wte="wte", wpe="wpe", ln_1="ln_1", qkv="attn.c_attn", out="attn.c_proj", ln_2="ln_2",
    up="mlp.c_fc", down="mlp.c_proj",
)  # fmt: skip


def _neo_windows(found: Mapping[str, Any]) -> dict[str, Any]:
    """A window of None or window_size keys for each layer, from [[["global", "local"], times], ...]."""
    reach = {"global": None, "local": found.get("window_size", 256)}
    types = found.get("attention_types") or [[["global", "local"], 12]]
    kinds = [kind for pattern, times in types for kind in list(pattern) * times]
    if len(kinds) != found["num_layers"] or not set(kinds) <= set(reach):
        raise ValueError(f"attention_types is {types}, expected {found['num_layers']} layers of global or local")
    return {"windows": tuple(reach[kind] for kind in kinds)}


def _neo_types(config: GPTConfig) -> dict[str, Any]:
    kinds = ["global" if window is None else "local" for window in config.windows]
    count = len(kinds)
    period = next(n for n in range(1, count + 1) if count % n == 0 and kinds == kinds[:n] * (count // n))
    return {
        "attention_types": [[kinds[:period], count // period]],
        "attention_layers": kinds,
        "window_size": max((window for window in config.windows if window), default=256),
    }


def _neox_rotary(found: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary dimensions from a share of the head; transformers moved both fields into rope_parameters."""
    rope = found.get("rope_parameters") or found.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"rope_type is {kind!r}, expected 'default'")
    share = rope.get("partial_rotary_factor", found.get("rotary_pct", 0.25))
    width = found["hidden_size"] // max(1, found["num_attention_heads"])
    base = rope.get("rope_theta", found.get("rotary_emb_base", 10000))
    return {"rotary_dim": int(width * share), "rotary_base": base}


def _neox_rope(config: GPTConfig) -> dict[str, Any]:
    share, base = (config.rotary_dim or 0) / config.head_dim, config.rotary_base
    rope = {"rope_type": "default", "rope_theta": base, "partial_rotary_factor": share}
    return {"rope_parameters": rope, "rotary_pct": share, "rotary_emb_base": base}


# fmt: off
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
    Family(
        model_type="openai-gpt",
        architecture="OpenAIGPTLMHeadModel",
        fields=(
            *_with_defaults(GPT2_SIZES, n_positions=512, vocab_size=40478),
            Field("activation", "afn", "gelu", {"gelu": "gelu_tanh", "relu": "relu"}),
            *GPT2_RATES,
        ),
        constants={"residual": "post_norm"},
        names={
            **GPT2_NAMES,
            "transformer.wte": "transformer.tokens_embed",
            "transformer.wpe": "transformer.positions_embed",
        },
        conv1d=True,
    ),
    Family(
        model_type="gpt_neo",
        architecture="GPTNeoForCausalLM",
        fields=(
            Field("n_layer", "num_layers", 24),
            Field("n_head", "num_heads", 16),
            Field("n_embd", "hidden_size", 2048),
            Field("n_inner", "intermediate_size", None),
            Field("block_size", "max_position_embeddings", 2048),
            Field("vocab_size", "vocab_size", 50257),
            Field("layer_norm_epsilon", "layer_norm_epsilon", 1e-5),
            Field("activation", "activation_function", "gelu_new", GELU_NEW),
            Field("tied_head", "tie_word_embeddings", True),
            Field("dropout", "resid_dropout", 0.0),
            Field("embedding_dropout", "embed_dropout", 0.0),
            Field("attention_dropout", "attention_dropout", 0.0),
        ),
        constants={"attention_scale": 1.0, "bias": ("out", "mlp", "norm")},
        read=_neo_windows,
        write=_neo_types,
        names=_names(
            "transformer.", "h", wte="wte", wpe="wpe", ln_1="ln_1", qkv=_qkv("attn.attention"),
            out="attn.attention.out_proj", ln_2="ln_2", up="mlp.c_fc", down="mlp.c_proj",
        ),
    ),
    Family(
        model_type="gptj",
        architecture="GPTJForCausalLM",
        fields=(
            *_with_defaults(
                GPT2_SIZES, n_layer=28, n_head=16, n_embd=4096, n_positions=2048, vocab_size=50400,
                tie_word_embeddings=False,
            ),
            Field("n_inner", "n_inner", None),
            Field("rotary_dim", "rotary_dim", 64),
            Field("activation", "activation_function", "gelu_new", GELU_NEW),
            *_with_defaults(GPT2_RATES, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
        ),
        constants={
            "position": "rotary",
            "rotary_interleaved": True,
            "residual": "parallel",
            "bias": ("mlp", "norm"),
            "head_bias": True,
        },
        names=_names(
            "transformer.", "h", wte="wte", ln_1="ln_1", qkv=_qkv("attn"), out="attn.out_proj", up="mlp.fc_in",
            down="mlp.fc_out",
        ),
    ),
    Family(
        model_type="gpt_neox",
        architecture="GPTNeoXForCausalLM",
        fields=(
            Field("n_layer", "num_hidden_layers", 44),
            Field("n_head", "num_attention_heads", 64),
            Field("n_embd", "hidden_size", 6144),
            Field("n_inner", "intermediate_size", 24576),
            Field("block_size", "max_position_embeddings", 2048),
            Field("vocab_size", "vocab_size", 50432),
            Field("layer_norm_epsilon", "layer_norm_eps", 1e-5),
            Field("activation", "hidden_act", "gelu", GELU_FAST),
            Field("residual", "use_parallel_residual", True, {True: "parallel_two_norms", False: "pre_norm"}),
            Field("bias", "attention_bias", True, {True: True, False: ("mlp", "norm")}),
            Field("tied_head", "tie_word_embeddings", False),
            Field("dropout", "hidden_dropout", 0.0),
            Field("embedding_dropout", "hidden_dropout", 0.0),
            Field("attention_dropout", "attention_dropout", 0.0),
        ),
        constants={"position": "rotary"},
        read=_neox_rotary,
        write=_neox_rope,
        base="gpt_neox.",
        names=_names(
            "gpt_neox.", "layers", wte="embed_in", ln_1="input_layernorm", qkv="attention.query_key_value",
            out="attention.dense", ln_2="post_attention_layernorm", up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h",
            ln_f="final_layer_norm", head="embed_out",
        ),
        packed_by_head=True,
        renamed={"lm_head.": "embed_out."},
    ),
    Family(
        model_type="opt",
        architecture="OPTForCausalLM",
        fields=(
            Field("n_layer", "num_hidden_layers", 12),
            Field("n_head", "num_attention_heads", 12),
            Field("n_embd", "hidden_size", 768),
            Field("n_inner", "ffn_dim", 3072),
            Field("block_size", "max_position_embeddings", 2048),
            Field("vocab_size", "vocab_size", 50272),
            Field("word_dim", "word_embed_proj_dim", None),
            Field("activation", "activation_function", "relu", GELU_NEW),
            Field("residual", "do_layer_norm_before", True, {True: "pre_norm", False: "post_norm"}),
            Field("bias", "enable_bias", True, {True: True, False: ("norm",)}),
            Field("tied_head", "tie_word_embeddings", True),
            Field("dropout", "dropout", 0.1),
            Field("attention_dropout", "attention_dropout", 0.0),
        ),
        constants={"position_offset": 2, "embedding_dropout": 0.0},
        fixed={"_remove_final_layer_norm": False, "layer_norm_elementwise_affine": True, "layerdrop": 0.0},
        base="model.",
        names=_names(
            "model.decoder.", "layers", wte="embed_tokens", wpe="embed_positions", ln_1="self_attn_layer_norm",
            qkv=_qkv("self_attn"), out="self_attn.out_proj", ln_2="final_layer_norm", up="fc1", down="fc2",
            ln_f="final_layer_norm", project_in="project_in", project_out="project_out",
        ),
    ),
    Family(
        model_type="bloom",
        architecture="BloomForCausalLM",
        fields=(
            Field("n_layer", "n_layer", 2),
            Field("n_head", "n_head", 8),
            Field("n_embd", "hidden_size", 64),
            Field("block_size", "seq_length", 2048),
            Field("vocab_size", "vocab_size", 250880),
            Field("layer_norm_epsilon", "layer_norm_epsilon", 1e-5),
            Field("tied_head", "tie_word_embeddings", True),
            Field("dropout", "hidden_dropout", 0.0),
            Field("attention_dropout", "attention_dropout", 0.0),
        ),
        constants={"position": "alibi", "embedding_norm": True, "embedding_dropout": 0.0},
        fixed={"apply_residual_connection_post_layernorm": False},
        names=_names(
            "transformer.", "h", wte="word_embeddings", ln_emb="word_embeddings_layernorm", ln_1="input_layernorm",
            qkv="self_attention.query_key_value", out="self_attention.dense", ln_2="post_attention_layernorm",
            up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h",
        ),
        packed_by_head=True,
        aliases={"n_embed": "hidden_size", "num_attention_heads": "n_head", "num_hidden_layers": "n_layer"},
    ),
    Family(
        model_type=OWN,
        architecture="GPT",
        fields=tuple(Field(f.name, f.name, f.default) for f in fields(GPTConfig)),
        names=_AsTheyAre(),
    ),
)
# fmt: on
FAMILIES = {family.model_type: family for family in ROWS}
