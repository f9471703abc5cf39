"""What the trainers are given is checked: data and model before anything is loaded, tokens before a step is made."""

from typing import Any

from ..checks.adapters import check_adapter_config
from ..checks.datasets import check_dataset, check_evaluation, require_weight
from ..checks.models import check_model, check_model_object, check_pad_token, check_tokenizer
from ..checks.optimisation import check_optimisation
from ..checks.prepared import check_prepared, require_end, warn_of_date
from ..compat import trl as trl_compat
from ..errors import UserError
from .hosts import Host


TEST = "test_dataset"  # of `predict`, for messages


class CheckedInputs(Host):
    """Mixin of the trainers, before TRL's class."""

    _method: str  # "dpo" or "kto", as `checks.datasets` knows them
    _needed_columns: tuple[str, ...] = ()  # further ones, that the losses cannot do without
    _column_names: tuple[str, ...]  # and all that they read
    _training_set_is_prepared = False

    def _check_model(self, model: Any, args: Any, processing_class: Any, **others: Any) -> tuple[Any, Any]:
        """Refuse what is not a causal language model with its tokenizer, an adapter that does not fit it, and an
        optimiser that cannot be built. Returns the model's config and its tokenizer or processor, which need not be
        loaded again. Raises `ValueError` or `TypeError` with one sentence.

        Args:
            others: further arguments of the trainer.
        """
        if not any(others.get("optimizers", ())):
            check_optimisation(args)
        self._has_own_tokenizer = processing_class is None
        if isinstance(model, str):
            options = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
            files = check_model(model, options.get("revision"), options["trust_remote_code"], processing_class)
            self._embeddings, config, processing_class = files.embeddings, files.config, files.processing_class
        else:
            self._embeddings = check_model_object(model, processing_class)
            config = getattr(model, "config", None)
        check_pad_token(getattr(args, "pad_token", None), processing_class)
        if others.get("peft_config") is not None:
            check_adapter_config(others["peft_config"], config, args)
        return config, processing_class

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        # TRL prepares the training set first, and calls an evaluation set of the name "train" the same
        is_training, self._training_set_is_prepared = not self._training_set_is_prepared, True
        name = "train_dataset" if is_training else "eval_dataset"
        if is_training:
            check_tokenizer(processing_class, self._embeddings, self._has_own_tokenizer)
            warn_of_date(dataset, processing_class)
        elif dataset_name == TEST:
            name = TEST
        elif dataset_name != "eval":
            name = f"eval_dataset[{dataset_name!r}]"
        if trl_compat.is_tokenised(dataset):
            dataset = trl_compat.drop_without_completion(dataset, args)
        else:
            require_end(dataset, processing_class)
            dataset = super()._prepare_dataset(dataset, processing_class, args, self._name_for_trl(name, dataset_name))
        check_prepared(dataset, name, args.max_length, self._embeddings)
        if is_training:
            require_weight(dataset)  # `max_length` may have taken those with a weight
        return dataset

    def _name_for_trl(self, name: str, dataset_name: str) -> str:
        """What TRL is told that a data set is called. "train" makes `trl.KTOTrainer` advise on class weights."""
        return name if dataset_name == "train" and name != "train_dataset" else dataset_name

    def predict(self, test_dataset, *args, **kwargs):
        """As the Trainer's, of rows as well, which are checked and prepared as those of `evaluate` are."""
        test_dataset = check_dataset(test_dataset, TEST, self._method, self._needed_columns, self._column_names)
        if not self._is_vision_dataset:
            test_dataset = self._prepare_dataset(test_dataset, self.processing_class, self.args, TEST)
            if self.precompute_ref_logps:
                size = self.args.precompute_ref_batch_size or self.args.per_device_eval_batch_size
                test_dataset = self._precompute_ref_logps(test_dataset, TEST, size)
        return super().predict(test_dataset, *args, **kwargs)

    def _determine_best_metric(self, metrics, trial):
        try:
            return super()._determine_best_metric(metrics, trial)
        except KeyError as error:
            if "metric_for_best_model" not in str(error):
                raise
            raise UserError(
                f"`metric_for_best_model={self.args.metric_for_best_model!r}` is no metric of an evaluation. "
                f"There are {', '.join(sorted(metrics))}. Use one of them."
            ) from error

    def evaluate(self, eval_dataset=None, *args, **kwargs):
        if not isinstance(eval_dataset, str):
            eval_dataset = check_evaluation(self._method, eval_dataset, self._needed_columns, self._column_names)
        return super().evaluate(eval_dataset, *args, **kwargs)
