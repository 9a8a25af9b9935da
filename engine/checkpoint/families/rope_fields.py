"""Rotary positions in config.json: rope_theta and rope_scaling of transformers 4, rope_parameters of transformers 5.

    4:  "rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", "factor": 8.0, ...} or null
    5:  "rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, ...}, or one of these for each
        of "full_attention" and "sliding_attention"

A rope_scaling wins over rope_parameters, and rope_theta in either of them over the one beside them, as in transformers
5. Both forms are written.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from peakgpt.engine.checkpoint.families.family import FieldGroup
from peakgpt.engine.model.config import GPTConfig
from peakgpt.engine.model.rope_scaling import DEFAULT, KINDS, ORIGINAL

NAMES = ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor", ORIGINAL)
FULL, SLIDING = "full_attention", "sliding_attention"
EVERY_PARAMETER = set().union(*(kind.names for kind in KINDS.values()))
OUTSIDE = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}  # parameters that are no part of rope_scaling


def rope_fields(
    theta: float = 10000.0, share: float | None = None, default: Mapping[str, Any] = MappingProxyType({})
) -> FieldGroup:
    """Return the rotary fields of a family whose layers all rotate by the same angles.

    Args:
        theta: transformers' rope_theta if config.json has none.
        share: transformers' partial_rotary_factor if config.json has none; None: the family rotates whole heads.
        default: transformers' rope_parameters if config.json has none.
    """

    def read(content: Mapping[str, Any]) -> dict[str, Any]:
        parameters = given_parameters(content) or default
        part = parameters.get("partial_rotary_factor", content.get("partial_rotary_factor", share))
        if share is None:
            require_whole_heads(part)
        base = parameters.get("rope_theta", content.get("rope_theta", theta))
        scaling = scaling_of(parameters, content)
        rotated = {} if share is None else {"rotary_dim": int((content.get("head_dim") or head_width(content)) * part)}
        return {"position": "rotary", "rotary_base": base, "rope_scaling": scaling, **rotated}

    def write(config: GPTConfig) -> dict[str, Any]:
        scaling, base = config.rope_scaling, config.rotary_base
        part = {} if share is None else {"partial_rotary_factor": (config.rotary_dim or 0) / config.head_dim}
        parameters = {**(scaling or {"rope_type": DEFAULT}), "rope_theta": base, **part}
        return {"rope_scaling": scaling, "rope_theta": base, "rope_parameters": parameters, **part}

    return FieldGroup(NAMES, read, write)


def rope_fields_by_layer_type(
    windows: FieldGroup, theta: float, local_theta: float | None = None, local_name: str | None = None
) -> FieldGroup:
    """Return the rotary fields of a family whose layers with a window rotate by other angles, which are not scaled.

    Args:
        windows: the fields that say which layers have a window.
        theta: transformers' base of the layers without a window, if config.json has none.
        local_theta: of the layers with a window; None: theta.
        local_name: the field that has it in files of transformers 4; None: rope_theta.
    """

    def read(content: Mapping[str, Any]) -> dict[str, Any]:
        both = _table(content, "rope_parameters")
        if unknown := sorted(map(str, set(both) - {FULL, SLIDING})):
            raise ValueError(f"rope_parameters has {unknown[0]}, expected {FULL} and {SLIDING}")
        full = {**_table(both, FULL), **_table(content, "rope_scaling")}
        sliding = _table(both, SLIDING)
        for parameters in (full, sliding):
            require_whole_heads(parameters.get("partial_rotary_factor", content.get("partial_rotary_factor")))
        if scaling_of(sliding, content) is not None:
            raise ValueError(f"rope_type of {SLIDING} is {kind_of(sliding)!r}, expected {DEFAULT!r}")
        base = full.get("rope_theta", content.get("rope_theta", theta))
        beside = content.get(local_name or "rope_theta", theta if local_theta is None else local_theta)
        scaling, local = scaling_of(full, content), sliding.get("rope_theta", beside)
        is_same = local == base and scaling is None
        is_local = any(windows.read(content)["windows"]) and not is_same
        fields = {"position": "rotary", "rotary_base": base, "rope_scaling": scaling}
        return {**fields, "local_rotary_base": local if is_local else None}

    def write(config: GPTConfig) -> dict[str, Any]:
        scaling, base, local = config.rope_scaling, config.rotary_base, config.local_rotary_base
        parameters = {
            FULL: {**(scaling or {"rope_type": DEFAULT}), "rope_theta": base},
            SLIDING: {"rope_type": DEFAULT, "rope_theta": base if local is None else local},
        }
        beside = {"rope_theta": base, **({} if local_name is None else {local_name: parameters[SLIDING]["rope_theta"]})}
        return {**beside, "rope_scaling": scaling, "rope_parameters": parameters}

    return FieldGroup((*NAMES, *filter(None, [local_name])), read, write)


def given_parameters(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return rope_scaling, or else rope_parameters, of a config.json; {} if it has neither."""
    return _table(content, "rope_scaling") or _table(content, "rope_parameters")


def _table(content: Mapping[str, Any], name: str) -> dict[str, Any]:
    table = content.get(name)
    if table is not None and not isinstance(table, Mapping):
        raise ValueError(f"{name} is {table!r:.60}, expected a JSON object")
    return dict(table or {})


def kind_of(parameters: Mapping[str, Any]) -> Any:
    """Return the rope_type of a config.json's parameters; older files call it "type"."""
    return parameters.get("rope_type", parameters.get("type", DEFAULT))


def scaling_of(parameters: Mapping[str, Any], content: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a config.json's parameters as `rope_scaling` of GPTConfig; None if they scale nothing.

    Parameters of another rope_type are left out, as transformers ignores them.

    Raises:
        ValueError: an unknown parameter.
    """
    if unknown := sorted(map(str, set(parameters) - EVERY_PARAMETER - OUTSIDE)):
        raise ValueError(f"rope_parameters has {unknown[0]}, expected parameters of {', '.join(KINDS)}")
    rope_type = kind_of(parameters)
    if rope_type == DEFAULT:
        return None
    kind = KINDS.get(rope_type) if isinstance(rope_type, str) else None
    names = kind.names if kind else set()  # GPTConfig refuses an unknown type
    scaling = {name: value for name, value in parameters.items() if name in names}
    if ORIGINAL in names and content.get(ORIGINAL) is not None:  # beside the parameters, in files of Phi-3
        scaling[ORIGINAL] = content[ORIGINAL]
    return {"rope_type": rope_type, **scaling}


def head_width(content: Mapping[str, Any]) -> int:
    """Return hidden_size / num_attention_heads."""
    return content["hidden_size"] // max(1, content["num_attention_heads"])


def require_head_width(content: Mapping[str, Any]) -> None:
    """Raise ValueError if config.json gives another head_dim: transformers computes its frequencies with that."""
    width = head_width(content)
    if content.get("head_dim") not in (None, width):
        raise ValueError(f"head_dim is {content['head_dim']!r}, expected {width}, hidden_size / num_attention_heads")


def require_whole_heads(share: Any) -> None:
    """Raise ValueError if a family that rotates the whole head is to rotate a share of it."""
    if share not in (None, 1):
        raise ValueError(f"partial_rotary_factor is {share!r:.60}, expected 1")
