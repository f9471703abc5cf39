"""What the package reads of TRL's preference trainers, for the type checker: TRL does not declare it."""

from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, Trainer


class TrlTrainer(Trainer):
    """What both of TRL's preference trainers have. No object is one of these."""

    args: Any  # our DPOConfig or KTOConfig, or TRL's
    model: PreTrainedModel
    ref_model: PreTrainedModel | None
    eval_dataset: Any
    precompute_ref_logps: bool
    _is_vision_dataset: bool
    aux_loss_enabled: bool
    router_aux_loss_coef: float
    beta: float
    _signature_columns: Any  # None, then a list of names
    _total_train_tokens: int
    _metrics: Any  # of train and eval: lists by name
    _name: str
    _paper: dict[str, str]
    _tag_names: list[str]
    _precompute_model_hash: str | None

    def stand_in(self, model: Any) -> Any:
        """Ours: what is called in place of a model with padded batches."""
        raise NotImplementedError

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        raise NotImplementedError

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        raise NotImplementedError

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        raise NotImplementedError

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> tuple[Any, ...]:
        raise NotImplementedError
