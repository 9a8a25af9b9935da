"""The state of torch's random generators, as tensors. Dropout takes its seeds from them (kernels/core/seeds.py)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class RandomState:
    """The generators of the CPU and of the device that trains."""

    def __init__(self, device: torch.device):
        self.device = device

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state of each generator: uint8 tensors on the CPU."""
        states = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        return states

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Set the generators. A state from another kind of device sets the CPU's only: its bits differ anyway."""
        torch.set_rng_state(state["cpu"])
        if self.device.type == "cuda" and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], self.device)
