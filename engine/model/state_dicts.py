"""State dicts of other libraries: the parameter names of torch and transformers, and GPT-2's Conv1D layout.

Our weights are in Linear layout, [out, in]. transformers' GPT-2 stores some of them as Conv1D, [in, out]: pass
`conv1d=True` to `load_state_dict` for those. The layout is never guessed, since a square weight fits both.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

SEPARATE = re.compile(r"(|.*\.experts\.)(\d+)\.(c_(?:gate|fc|proj)\.\w+)")
CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


def transpose_conv1d(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Transpose the weights that GPT-2 stores as Conv1D, from [in, out] to [out, in] or back; keep the others."""
    return {name: tensor.mT if name.endswith(CONV1D) else tensor for name, tensor in state.items()}


def stack_experts(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Stack the parameters of separate experts, 3.c_fc.weight, as older models of peakgpt had them; keep the others."""
    stacked: dict[str, Tensor | dict[int, Tensor]] = {}
    for name, tensor in state.items():
        match = SEPARATE.fullmatch(name)
        if match is None:
            stacked[name] = tensor
        else:
            stacked.setdefault(match[1] + match[3], {})[int(match[2])] = tensor
    return {
        name: torch.stack([value[expert] for expert in sorted(value)]) if isinstance(value, dict) else value
        for name, value in stacked.items()
    }


class ModuleWithAliases(nn.Module):
    """A module that also loads state dicts with the parameter names of equivalent modules in torch and transformers.

    Each row of ALIASES describes one equivalent module: our submodule name -> prefixes of its parameters. If there are
    several prefixes, their tensors are concatenated along the first axis.
    """

    ALIASES: tuple[Mapping[str, tuple[str, ...]], ...] = ()

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for row in self.ALIASES:
            for kind in ("weight", "bias"):
                _rename(state_dict, prefix, row, kind)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _rename(state: dict[str, Tensor], prefix: str, row: Mapping[str, tuple[str, ...]], kind: str) -> None:
    """Rename the tensors of one equivalent module, in place, if all of them are in the state dict."""
    for name, aliases in row.items():
        keys = [f"{prefix}{alias}{kind}" for alias in aliases]
        if all(key in state for key in keys):
            parts = [state.pop(key) for key in keys]
            state[f"{prefix}{name}.{kind}"] = parts[0] if len(parts) == 1 else torch.cat(parts)


class ModuleWithConv1D(ModuleWithAliases):
    """A module that loads state dicts in Linear or in Conv1D layout."""

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False, *, conv1d: bool = False):
        """Load as torch does; conv1d=True means that c_attn, c_proj and c_fc have Conv1D layout, [in, out]."""
        return super().load_state_dict(transpose_conv1d(state_dict) if conv1d else state_dict, strict, assign)
