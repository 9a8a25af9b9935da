"""How rotary frequencies are scaled for texts longer than those of the pretraining: `rope_scaling` of GPTConfig.

    f_i = base^(-i / n) radians a token for pair i of n. cos and sin are multiplied by a, which is 1 where not stated.
    linear    f / factor
    dynamic   f. The base would grow with a text of more than block_size tokens, which this engine refuses.
    llama3    f / factor where the wavelength 2 pi / f is above L / low_freq_factor, f where it is below
              L / high_freq_factor, a blend between
    yarn      f for pairs that turn at least beta_fast times in L tokens, f / factor for those that turn at most
              beta_slow times, a blend between      a = 0.1 ln(factor) + 1
    longrope  f / short_factor_i in a text of at most L tokens, f / long_factor_i in a longer one
              a = sqrt(1 + ln(s) / ln(L)), s = factor, or block_size / L

L is original_max_position_embeddings, the length of the texts in pretraining; all names are those of transformers. Only
longrope has two sets of frequencies. Keys in a cache are rotated already, so a text that becomes longer than L tokens
is computed again from its first token, as transformers does for Phi-3.

Linear: Chen et al. 2023, arXiv:2306.15595. YaRN: Peng et al. 2023, arXiv:2309.00071, eq. 17 to 22. LongRoPE: Ding et
al. 2024, arXiv:2402.13753. Llama 3: Grattafiori et al. 2024, arXiv:2407.21783, and its published code. Operations and
their order are those of transformers (modeling_rope_utils.py), so that the float32 frequencies have the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

ORIGINAL = "original_max_position_embeddings"  # L
DEFAULT = "default"  # the rope_type without scaling
MAX_VALUE = 1e12  # of any parameter
Parameters = Mapping[str, Any]


def base_powers(width: int, base: float, device: torch.device | str) -> Tensor:
    """Return base^(i / n) for the n = width / 2 pairs, (n,) float32: the inverse of the frequencies."""
    return base ** (torch.arange(0, width, 2, dtype=torch.float32, device=device) / width)


def _linear(powers: Tensor, base: float, p: Parameters, length: int) -> Tensor:
    return 1.0 / powers / p["factor"]


def _dynamic(powers: Tensor, base: float, p: Parameters, length: int) -> Tensor:
    return 1.0 / powers


def _llama3(powers: Tensor, base: float, p: Parameters, length: int) -> Tensor:
    f, factor, low, high, original = 1.0 / powers, p["factor"], p["low_freq_factor"], p["high_freq_factor"], p[ORIGINAL]
    wavelength = 2 * math.pi / f
    scaled = torch.where(wavelength > original / low, f / factor, f)
    share = (original / wavelength - low) / (high - low)
    blend = (1 - share) * scaled / factor + share * scaled
    return torch.where((wavelength < original / high) | (wavelength > original / low), scaled, blend)


def _yarn(powers: Tensor, base: float, p: Parameters, length: int) -> Tensor:
    width = 2 * len(powers)

    def pair_of(turns: float) -> float:
        """Return the pair that turns so often in L tokens, as a real number."""
        return width * math.log(p[ORIGINAL] / (turns * 2 * math.pi)) / (2 * math.log(base))

    first, last = pair_of(p["beta_fast"]), pair_of(p["beta_slow"])
    if p["truncate"]:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    last += 0.001 if first == last else 0.0
    pair = torch.arange(len(powers), dtype=torch.float32, device=powers.device)
    kept = 1 - ((pair - first) / (last - first)).clamp(0, 1)
    return 1.0 / (p["factor"] * powers) * (1 - kept) + 1.0 / powers * kept


def _yarn_attention(p: Parameters, block_size: int) -> float:
    def scale(by: float) -> float:
        return 0.1 * by * math.log(p["factor"]) + 1.0 if p["factor"] > 1 else 1.0

    if p["mscale"] and p["mscale_all_dim"]:
        return scale(p["mscale"]) / scale(p["mscale_all_dim"])
    return scale(1.0)


def _longrope(powers: Tensor, base: float, p: Parameters, length: int) -> Tensor:
    factors = p["long_factor" if length > p[ORIGINAL] else "short_factor"]
    # One by one: a copy of a list from the host would wait for the GPU, and cannot be part of a CUDA graph.
    ones = [torch.full((1,), factor, dtype=torch.float32, device=powers.device) for factor in factors]
    return 1.0 / (torch.cat(ones) * powers)


def _longrope_attention(p: Parameters, block_size: int) -> float:
    factor = block_size / p[ORIGINAL] if p["factor"] is None else p["factor"]
    return math.sqrt(1 + math.log(factor) / math.log(p[ORIGINAL])) if factor > 1 else 1.0


class RopeKind(NamedTuple):
    """One rope_type.

    Args:
        frequencies: (base_powers, base, parameters, tokens of the text) -> the scaled frequencies, (n,) float32.
        required, optional: names of its parameters; defaults of the optional ones.
        attention_factor: (parameters, block_size) -> a, if the parameters do not give it; None: a is 1.
        has_two_sets: whether texts of more than L tokens have other frequencies.
    """

    frequencies: Callable[[Tensor, float, Parameters, int], Tensor]
    required: tuple[str, ...]
    optional: Parameters = MappingProxyType({})
    attention_factor: Callable[[Parameters, int], float] | None = None
    has_two_sets: bool = False

    @property
    def names(self) -> set[str]:
        """The names of all its parameters."""
        return {*self.required, *self.optional}


YARN = {ORIGINAL: None, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": True, "attention_factor": None,
        "mscale": None, "mscale_all_dim": None}  # fmt: skip
LONGROPE = {ORIGINAL: None, "factor": None, "attention_factor": None}
KINDS = {
    "linear": RopeKind(_linear, ("factor",)),
    "dynamic": RopeKind(_dynamic, ("factor",)),
    "llama3": RopeKind(_llama3, ("factor", "low_freq_factor", "high_freq_factor"), {ORIGINAL: None}),
    "yarn": RopeKind(_yarn, ("factor",), YARN, _yarn_attention),
    "longrope": RopeKind(_longrope, ("short_factor", "long_factor"), LONGROPE, _longrope_attention, True),
}


def complete(scaling: Parameters, *, pairs: int, base: float, block_size: int) -> dict[str, Any] | None:
    """Check the parameters of a scaling and fill in what they leave out.

    Args:
        scaling: rope_type and the parameters of this type; None stands for a parameter that is left out.
        pairs: n, rotated pairs of a head.
        base: rotary_base.
        block_size: the model's maximum number of tokens, which is also the default of L.
    Returns:
        All parameters, with attention_factor; None for the type "default".
    Raises:
        ValueError: an unknown type, or a parameter that is unknown, missing or out of range.
    """
    rope_type, kind = scaling.get("rope_type"), _kind(scaling.get("rope_type"))
    given = {name: value for name, value in scaling.items() if name != "rope_type" and value is not None}
    for name in [*(n for n in given if n not in kind.names), *(n for n in kind.required if n not in given)]:
        names = ", ".join(sorted(kind.names)) or "none"
        raise ValueError(f"{name} is {given.get(name)!r:.60}, expected the parameters of {rope_type!r}: {names}")
    p = {**kind.optional, **{name: _parameter(name, value, pairs) for name, value in given.items()}}
    if ORIGINAL in kind.names and p[ORIGINAL] is None:
        p[ORIGINAL] = _parameter(ORIGINAL, block_size, pairs)
    if rope_type == "llama3" and p["high_freq_factor"] <= p["low_freq_factor"]:
        low = p["low_freq_factor"]
        raise ValueError(f"high_freq_factor is {p['high_freq_factor']}, expected more than low_freq_factor {low}")
    if rope_type == "yarn" and base == 1:
        raise ValueError(f"rotary_base is {base}, expected another one with rope_type 'yarn'")
    if kind.attention_factor is not None and p["attention_factor"] is None:
        p["attention_factor"] = kind.attention_factor(p, block_size)
    filled = {"rope_type": rope_type, **{name: value for name, value in p.items() if value is not None}}
    return None if rope_type == DEFAULT else filled


def _kind(rope_type: Any) -> RopeKind:
    if rope_type == DEFAULT:
        return RopeKind(_dynamic, ())
    if not isinstance(rope_type, str) or rope_type not in KINDS:
        raise ValueError(f"rope_type is {rope_type!r:.60}, expected one of {DEFAULT}, {', '.join(KINDS)}")
    return KINDS[rope_type]


def _parameter(name: str, value: Any, pairs: int) -> Any:
    """Return one parameter as its type; raise ValueError if it is of another one or out of range."""
    factors = (lambda v: _is_list(v, pairs), _floats, f"a list of {pairs} numbers above 0")
    forms = {
        "truncate": (lambda v: isinstance(v, bool), bool, "true or false"),
        "short_factor": factors,
        "long_factor": factors,
        ORIGINAL: (lambda v: _is_number(v) and v == int(v) and v >= 2, int, "an integer of at least 2"),
        **dict.fromkeys(("mscale", "mscale_all_dim"), (lambda v: v == 0 or _is_number(v), float, "at least 0")),
    }
    is_valid, convert, expected = forms.get(name, (_is_number, float, "a number above 0"))
    if not is_valid(value):
        raise ValueError(f"{name} is {value!r:.60}, expected {expected}")
    return convert(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= MAX_VALUE


def _is_list(value: Any, length: int) -> bool:
    return isinstance(value, list | tuple) and len(value) == length and all(map(_is_number, value))


def _floats(values: list[Any]) -> list[float]:
    return [float(value) for value in values]


def frequencies(
    scaling: Parameters | None, width: int, base: float, length: int, device: torch.device | str
) -> tuple[Tensor, float]:
    """Return the angle of each pair a token, (width / 2,) float32 radians, and the factor a on cos and sin.

    Args:
        scaling: from `complete`; None without scaling.
        width: number R of rotated features.
        base: rotary_base.
        length: tokens of the text, which only longrope depends on.
        device: of the result.
    """
    powers = base_powers(width, base, device)
    if scaling is None:
        return 1.0 / powers, 1.0
    angles = KINDS[scaling["rope_type"]].frequencies(powers, base, scaling, length)
    return angles, scaling.get("attention_factor", 1.0)


def switch_length(scaling: Parameters | None, block_size: int) -> int | None:
    """Return the largest number of tokens of a text with the first set of frequencies; None if there is one set only.

    Args:
        scaling: from `complete`; None without scaling.
        block_size: of the model.
    """
    if scaling is None or not KINDS[scaling["rope_type"]].has_two_sets or block_size <= scaling[ORIGINAL]:
        return None
    return scaling[ORIGINAL]
