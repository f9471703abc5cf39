"""Packed rows in the trainers: what stands in for the models, when, and in which order the samples come."""

from functools import cached_property, partial
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from ..compat import engines
from ..compat import trl as trl_compat
from ..configs.packing_config import PackingConfig
from ..log import get_logger
from ..packing import checks
from ..packing.attention import backend, base_implementation
from ..packing.dealing import DealtSampler, forwarded_tokens
from ..packing.forward import Layouts, PackedModel
from .hosts import Host


logger = get_logger(__name__)

BY_LENGTH = ("group_by_length", "batch_rebalance")
BACKENDS = {
    "flash": "the model's FlashAttention",
    "varlen": "PyTorch's variable-length attention",
    "loop": "scaled_dot_product_attention, one sequence after the other",
}


def is_asked_for(args: Any) -> bool:
    """Whether a run is to be packed. In a plain config of TRL's, `padding_free` means what it means there."""
    return isinstance(args, PackingConfig) and args.padding_free


def refuse_before_loading(config: Any, args: Any, example: dict[str, Any], peft_config: Any) -> None:
    """Refuse, before the model is loaded, what can be known of it then, from its config.

    Raises:
        `ValueError`: if `padding_free` is set for something that cannot be packed.
    """
    if not is_asked_for(args):
        return
    if example.keys() & {"image", "images"}:
        raise ValueError("`padding_free=True` cannot be used with image data. Set `padding_free=False`.")
    if getattr(peft_config, "is_prompt_learning", False):
        raise ValueError(
            f"`padding_free=True` cannot be used with {peft_config.peft_type} adapters: they put virtual tokens "
            "before each row of the padded batch. Set `padding_free=False`."
        )
    checks.refuse_config(config)


class PackedRows(Host):
    """Mixin of the trainers, before TRL's class. Does nothing unless `padding_free` is set, but for the column of
    lengths that sampling by length needs."""

    _self_checked = False

    @cached_property
    def _layouts(self) -> Layouts | None:
        """The packed rows of the batches; `None`: forwards are padded, or packed by TRL. Made when it is first asked
        for, which may be while TRL's constructor precomputes the reference."""
        if not is_asked_for(self.args) or self._packed_by_trl:
            return None
        self._prepare_models()
        return Layouts(share=self._reason_not_to_share() is None)

    def _prepare_models(self) -> None:
        for model in self._packed_models():
            dtype = self._compute_dtype(model)
            self._attention = backend(base_implementation(model), self.accelerator.device, dtype)
            checks.refuse_config(model.config)
            checks.refuse_model(model, self._attention, self.args.torch_compile)
            checks.use_or_refuse(model)

    @property
    def _packed_by_trl(self) -> bool:
        # TRL 1.16 sets it back to False
        return getattr(self, "padding_free", False)

    def _set_up_packed_rows(self) -> None:
        if self._layouts is not None:
            self._prepare_models()  # those that have come since
            unshared, undealt = self._reason_not_to_share(), self._reason_not_to_deal()
            logger.info(
                "Packed rows: no padding is forwarded; "
                + (f"prompts are not shared: {unshared}; " if unshared else "the prompt of a pair is forwarded once; ")
                + (f"samples are not dealt by tokens: {undealt}; " if undealt else "steps are dealt by tokens; ")
                + f"attention by {BACKENDS[self._attention]}."
            )
        elif is_asked_for(self.args):
            logger.info("Packed rows: TRL packs the batches itself, and trl_rdro stands aside.")

    def _reason_not_to_share(self) -> str | None:
        """Why the prompts of pairs are not shared; `None`: they are."""
        return "completions do not come in pairs"

    def _reason_not_to_deal(self) -> str | None:
        """Why the samples of a step are not dealt over its micro-batches by tokens; `None`: they are."""
        if not self.args.balance_tokens:
            return "`balance_tokens=False`"
        if self.aux_loss_enabled:
            return "the auxiliary loss of a mixture of experts belongs to a micro-batch as a whole"
        if self.accelerator.num_processes * self.args.gradient_accumulation_steps == 1:
            return "a step is one micro-batch"
        if not isinstance(self.train_dataset, Dataset):
            return "the data set is streamed"
        if self.args.train_sampling_strategy == "batch_rebalance":
            return "`train_sampling_strategy='batch_rebalance'` does it"
        return None

    def _packed_models(self) -> list[PreTrainedModel]:
        """Policy and references without their wrappers, with adapters."""
        models = [self.model, self.ref_model, getattr(self, "_second_reference", None)]
        return [self.accelerator.unwrap_model(model) for model in models if isinstance(model, torch.nn.Module)]

    def _compute_dtype(self, model: PreTrainedModel) -> torch.dtype:
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}
        return half.get(self.accelerator.mixed_precision, model.dtype)

    # Forwards

    def stand_in(self, model: Any) -> Any:
        """What is called in place of a model with padded batches."""
        return model if self._layouts is None else PackedModel(model, self._layouts)

    def compute_ref_log_probs(self, model, inputs):
        return super().compute_ref_log_probs(self.stand_in(model), inputs)

    def _compute_loss(self, model, inputs, return_outputs):
        # Only TRL's own losses come here
        if self._layouts is None or self.precompute_ref_logps:
            return super()._compute_loss(self.stand_in(model), inputs, return_outputs)
        # Otherwise TRL would call the reference itself
        inputs = trl_compat.with_reference(self, inputs)
        with trl_compat.reference_in_batch(self):
            return super()._compute_loss(self.stand_in(model), inputs, return_outputs)

    def training_step(self, model, *args, **kwargs):
        if self._layouts is not None and not self._self_checked:
            self._self_checked = True
            model.train()  # as in the step that follows, and with the models where their engine wants them
            with engines.without_checkpointing(self), self.compute_loss_context_manager():
                for packed in self._packed_models():
                    checks.self_check(packed, self._layouts.share, self._compute_dtype(packed) != torch.float32)
        return super().training_step(model, *args, **kwargs)

    # Order of the samples

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        is_training = not self._training_set_is_prepared
        dataset = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        needed = is_asked_for(args) or args.train_sampling_strategy in BY_LENGTH
        if needed and is_training and isinstance(dataset, Dataset):
            measure = partial(_with_length, completions=self._completion_columns, args=args)
            dataset = dataset.map(measure, num_proc=args.dataset_num_proc, desc="Measuring train dataset")
        return dataset

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        column = self.args.length_column_name
        # TRL leaves out the column that these samplers look for
        if self.args.train_sampling_strategy in BY_LENGTH and column not in self._signature_columns:
            self._signature_columns += [column]

    def get_train_dataloader(self):
        loader: Any = super().get_train_dataloader()  # of accelerate
        if self._layouts is None or self._reason_not_to_deal():
            return loader
        ranks = self.accelerator.num_processes
        dataset: Any = self.train_dataset
        lengths = dataset[self.args.length_column_name]
        batches = ranks * self.args.gradient_accumulation_steps
        loader.set_sampler(DealtSampler(loader.get_sampler(), lengths, loader.total_batch_size // ranks, batches))
        return loader


def _with_length(row: dict[str, Any], completions: tuple[str, ...], args: Any) -> dict[str, int]:
    """What a sample costs: its tokens in a packed row, or those of its longest padded one."""
    prompt, lengths = len(row["prompt_ids"]), [len(row[name]) for name in completions]
    if not is_asked_for(args):
        return {args.length_column_name: forwarded_tokens(prompt, [max(lengths)], args.max_length, share=False)}
    share = getattr(args, "share_prompt", False) and "wdpo" not in args.loss_type
    keep_end = getattr(args, "truncation_mode", "keep_start") == "keep_end"
    return {args.length_column_name: forwarded_tokens(prompt, lengths, args.max_length, share, keep_end)}
