"""What the trainers are given is checked: data and model before anything is loaded, tokens before a step is made."""

from typing import Any

from ..checks.datasets import check_evaluation
from ..checks.models import check_model, check_model_object, check_tokenizer
from ..checks.prepared import check_prepared, warn_of_date
from ..compat import trl as trl_compat
from .hosts import Host


class CheckedInputs(Host):
    """Mixin of the trainers, before TRL's class."""

    _method: str  # "dpo" or "kto", as `checks.datasets` knows them
    _needed_columns: tuple[str, ...] = ()  # further ones, that the losses cannot do without
    _column_names: tuple[str, ...]  # and all that they read
    _training_set_is_prepared = False

    def _check_model(self, model: Any, args: Any, processing_class: Any) -> Any:
        """Refuse what is not a causal language model with its tokenizer, and return its config. Raises `ValueError`
        with one sentence."""
        self._has_own_tokenizer = processing_class is None
        if isinstance(model, str):
            options = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
            files = check_model(model, options.get("revision"), options["trust_remote_code"], processing_class)
            self._embeddings = files.embeddings
            return files.config
        self._embeddings = check_model_object(model, processing_class)
        return getattr(model, "config", None)

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        # TRL prepares the training set first, and calls an evaluation set of the name "train" the same
        is_training, self._training_set_is_prepared = not self._training_set_is_prepared, True
        name = "train_dataset" if is_training else "eval_dataset"
        if is_training:
            check_tokenizer(processing_class, self._embeddings, self._has_own_tokenizer)
            warn_of_date(dataset, processing_class)
        elif dataset_name != "eval":
            name = f"eval_dataset[{dataset_name!r}]"
        if trl_compat.is_tokenised(dataset):
            dataset = trl_compat.drop_without_completion(dataset, args)
        else:
            dataset = super()._prepare_dataset(dataset, processing_class, args, self._name_for_trl(name, dataset_name))
        check_prepared(dataset, name, args.max_length, self._embeddings)
        return dataset

    def _name_for_trl(self, name: str, dataset_name: str) -> str:
        """What TRL is told that a data set is called. "train" makes `trl.KTOTrainer` advise on class weights."""
        return name if dataset_name == "train" and name != "train_dataset" else dataset_name

    def evaluate(self, eval_dataset=None, *args, **kwargs):
        if not isinstance(eval_dataset, str):
            eval_dataset = check_evaluation(self._method, eval_dataset, self._needed_columns, self._column_names)
        return super().evaluate(eval_dataset, *args, **kwargs)
