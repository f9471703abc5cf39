"""One noise state for every forward that is compared with another.

Dropout in modules, functional dropout inside attention, NEFTune: a forward in training may draw random numbers in
ways that no list of settings covers. Whether it did shows in the state of the generators, and the same state before a
second forward of the same batch gives it the same noise.
"""

from typing import Any

import torch


class NoiseState:
    """The state of the generators that a forward on `device` draws from, as it is now."""

    def __init__(self, device: torch.device):
        self.generators: list[Any] = [torch, *([] if device.type == "cpu" else [torch.get_device_module(device)])]
        self.states = self._now()

    def _now(self) -> list[torch.Tensor]:
        return [generator.get_rng_state() for generator in self.generators]

    def was_drawn_from(self) -> bool:
        """Whether random numbers were drawn since."""
        return not all(map(torch.equal, self.states, self._now()))

    def restore(self) -> None:
        """Let what follows draw the same numbers again."""
        for generator, state in zip(self.generators, self.states, strict=True):
            generator.set_rng_state(state)
