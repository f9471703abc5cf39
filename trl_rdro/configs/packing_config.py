"""Fields of packed rows, shared by `DPOConfig` and `KTOConfig`."""

from dataclasses import dataclass, field

from ..packing.checks import refuse_arguments


@dataclass
class PackingConfig:
    """
    Fields of packed rows.

    Parameters:
        padding_free (`bool`, *optional*, defaults to `False`):
            Forward each batch as one row without padding, with every loss and every attention implementation. Without
            it a run is the same to the last bit.
        balance_tokens (`bool`, *optional*, defaults to `True`):
            With `padding_free`, deal the samples of an optimiser step over its micro-batches and ranks so that all
            have about as many tokens. The gradient of the step is the same.
    """

    padding_free: bool = field(
        default=False,
        metadata={
            "help": "Forward each batch as one row without padding, with every loss and every attention "
            "implementation."
        },
    )
    balance_tokens: bool = field(
        default=True,
        metadata={
            "help": "With `padding_free`, deal the samples of an optimiser step over its micro-batches and ranks so "
            "that all have about as many tokens."
        },
    )

    def _validate_packing(self) -> None:
        if self.padding_free:
            refuse_arguments(self)
