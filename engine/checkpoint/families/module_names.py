"""Names of our modules in a family's tensors: `Family.names` from short names of the modules of a block."""

from __future__ import annotations

INSIDE = {  # short name -> our module in a block
    "ln_1": "ln_1",
    "ln_1_out": "ln_1_out",
    "qkv": "attn.c_attn",
    "out": "attn.c_proj",
    "ln_2": "ln_2",
    "ln_2_out": "ln_2_out",
    "gate": "mlp.c_gate",
    "up": "mlp.c_fc",
    "down": "mlp.c_proj",
}


def module_names(
    base: str, layer: str, *, head: str = "lm_head", ln_f: str = "ln_f", **modules: str | tuple[str, ...]
) -> dict[str, str | tuple[str, ...]]:
    """Return `Family.names` for a family whose blocks are named base + layer.

    Args:
        base: prefix of all modules except the head.
        layer: name of the list of blocks.
        head, ln_f: names of the head and of the norm before it.
        modules: a key of INSIDE, or the name of one of our modules outside of the blocks -> the family's name, or three
            names for queries, keys and values.
    """
    names: dict[str, str | tuple[str, ...]] = {"lm_head": head, "transformer.ln_f": base + ln_f}
    for name, theirs in modules.items():
        inside = INSIDE.get(name)
        prefix = base if inside is None else f"{base}{layer}.{{}}."
        ours = f"transformer.{name}" if inside is None else f"transformer.h.{{}}.{inside}"
        names[ours] = prefix + theirs if isinstance(theirs, str) else tuple(prefix + part for part in theirs)
    return names


def qkv_names(module: str) -> tuple[str, ...]:
    """Return the names of separate projections to queries, keys and values."""
    return tuple(f"{module}.{part}_proj" for part in "qkv")


class SameNames(dict[str, str]):
    """Maps every module name to itself: our own layout has our names, but a tensor for each expert."""

    def __missing__(self, name: str) -> str:
        return name.replace(".mlp.experts.", ".mlp.experts.{}.")
