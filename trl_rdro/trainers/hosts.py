"""What a mixin may ask of the trainer that it is mixed into, for the type checker. Nothing at runtime."""

from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    import torch

    from ..compat.trl_trainer import TrlTrainer

    class Host(TrlTrainer):
        """`DPOTrainer` or `KTOTrainer`."""

        _ours: list[str]  # our losses in use, set before TRL's constructor
        _used: tuple[str, ...]  # and the one inside a robust loss, if it is ours
        _completion_columns: tuple[str, ...]  # of tokens, in a prepared data set
        _training_set_is_prepared: bool
        _has_own_tokenizer: bool  # it was loaded with the model, by its name
        _reference_columns: tuple[str, ...]  # where a data set can bring its own reference log-probabilities

    class PairHost(Host):
        """`DPOTrainer`."""

        loss_types: list[str]
        loss_weights: list[float]

        def _logratios(
            self, log_probs: torch.Tensor, inputs: dict[str, Any], ref_logps: torch.Tensor
        ) -> torch.Tensor: ...

        def _pair_loss(
            self, name: str, logratios: torch.Tensor, inputs: dict[str, Any], columns: dict[str, torch.Tensor]
        ) -> torch.Tensor: ...

        def _complete(
            self, columns: dict[str, torch.Tensor], inputs: dict[str, Any], ref_logps: torch.Tensor
        ) -> dict[str, torch.Tensor]: ...

else:
    Host = PairHost = object
