"""The estimate: the persistent tensors and the largest moment of a step, and the cards that they fit on."""

from dataclasses import dataclass

from .model import Shape
from .persistent import buffers, constant_bytes, model_bytes, optimizer, reference, weights
from .run import Run
from .step import moments


GIB = 2**30
# Cards by the size they are sold with, and the GiB of it that a process can use
CARDS = {24: 23, 40: 39, 80: 78, 141: 139}
# CUDA context, cuBLAS and NCCL workspaces. Not measured here: a usual size, the same for every run
CUDA_OVERHEAD = 1 * GIB
# The share of a card to leave free for the allocator's fragmentation
RESERVE = 0.1


@dataclass(frozen=True)
class Estimate:
    """The bytes on each GPU at the peak, by what they are for."""

    parts: dict[str, float]
    peak: str  # the moment
    loading: float  # the peak while the model is loaded

    @property
    def total(self) -> float:
        return max(sum(self.parts.values()), self.loading)

    def cards(self) -> list[int]:
        """The cards of `CARDS` that it fits on with the reserve left free."""
        return [card for card, usable in CARDS.items() if self.total <= (1 - RESERVE) * usable * GIB]


def estimate(shape: Shape, run: Run) -> Estimate:
    """What each GPU holds at the peak of a training step."""
    persistent = {
        "weights": weights(shape, run),
        "reference": reference(shape, run),
        "optimiser": optimizer(shape, run),
        "communication": buffers(shape, run),
    }
    name, live = max(moments(shape, run), key=lambda item: sum(item[1].values()))
    overhead = CUDA_OVERHEAD if run.device == "cuda" else 0
    # ZeRO shards unquantised models while they load, quantised ones afterwards; ZeRO-1 and 2 never do
    loading = model_bytes(shape, run) + constant_bytes(shape, run) + overhead if run.bits < 16 else 0
    return Estimate({**persistent, **live, "overhead": overhead}, name, loading)
