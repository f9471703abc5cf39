"""Everything of TRL that is used here without being documented there. Last checked against TRL 1.16.

Longer than other files, because whoever moves to another TRL looks through all of it at once.
"""

import logging
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from copy import copy
from types import SimpleNamespace
from typing import Any

import torch
import trl
from accelerate.utils import is_peft_model
from datasets.fingerprint import Hasher
from torch.distributed.tensor import DTensor
from trl.trainer import utils as trl_utils
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference
from trl.trainer.utils import add_fused_lm_head as add_fused_lm_head
from trl.trainer.utils import get_config_model_id

from ..checks.prepared import require_end
from .checkpointing import quiet_checkpointing
from .engines import settle_fsdp2
from .trl_trainer import TrlTrainer


# What a batch of TRL's preference collators holds beside the model's own inputs
NON_MODEL_KEYS = {"completion_mask", "ref_chosen_logps", "ref_rejected_logps", "label", "ref_logps", "weight"}


def model_name(model: Any) -> str:
    """The last part of a model's id, by which TRL names the output directory when no config is given."""
    return (model if isinstance(model, str) else get_config_model_id(model.config)).split("/")[-1]


def policy_forward(trainer: TrlTrainer, model: Callable, inputs: dict[str, Any]) -> Any:
    """One forward of `model` with TRL's fused LM head. The output has `log_probs` of shape `(rows, length - 1)`:
    the log-probability of each next token, 0 outside the completions."""
    model_kwargs = {key: value for key, value in inputs.items() if key not in NON_MODEL_KEYS}
    if trainer.aux_loss_enabled:  # mixture of experts
        model_kwargs["output_router_logits"] = True
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    with _explain_cut_images(trainer):
        return trainer.stand_in(model)(**model_kwargs, use_cache=False, labels=labels, fused_lm_head=True)


@contextmanager
def compact_head():
    """Let TRL's fused LM head score the positions that have a label, and no others, on a CPU too."""
    decide = trl_utils._use_triton
    trl_utils._use_triton = lambda device: device.type == "cpu" or decide(device)
    try:
        yield
    finally:
        trl_utils._use_triton = decide


@contextmanager
def _explain_cut_images(trainer: TrlTrainer):
    """What TRL's `compute_loss`, which ours does not go through, makes of a model's complaint about missing tokens."""
    try:
        yield
    except ValueError as error:
        if "Image features and image tokens do not match" not in str(error) or trainer.args.max_length is None:
            raise
        raise ValueError(
            f"`max_length={trainer.args.max_length}` is too short: it cuts off image tokens whose image stays. Raise "
            "it, or set it to None."
        ) from error


def completion_logps(trainer: TrlTrainer, log_probs: torch.Tensor, completion_mask: torch.Tensor) -> torch.Tensor:
    """Log-probability of each completion, `(rows,)`, as TRL's `_compute_loss` sums it: with LD-DPO, tokens beyond the
    length that both completions of a pair share count `ld_alpha`."""
    mask = completion_mask[:, 1:]
    log_probs = log_probs[:, -mask.size(1) :]  # prompt-learning PEFT prepends virtual tokens
    ld_alpha = getattr(trainer, "ld_alpha", None)
    if ld_alpha is None:
        return log_probs.sum(dim=1)
    shared_length = torch.minimum(*mask.sum(dim=1).chunk(2)).repeat(2)
    verbose = mask.cumsum(dim=1) > shared_length.unsqueeze(1)
    return torch.where(verbose, ld_alpha * log_probs, log_probs).sum(dim=1)


def _replay(model: Callable, outputs: Any) -> Callable:
    """A stand-in for the model in TRL's `_compute_loss` that answers with the forward pass made already."""

    def forward(*args, **kwargs):
        # `return_outputs` makes one more forward, for the logits
        return outputs if kwargs.get("fused_lm_head") else model(*args, **kwargs)

    return forward


def overrides_compute_loss(trainer: TrlTrainer) -> bool:
    """Whether a subclass replaces TRL's `_compute_loss`, which is not called with our losses."""
    owner = next(of for of in type(trainer).__mro__ if "_compute_loss" in vars(of))
    return owner.__module__.split(".")[0] not in ("trl", "trl_rdro")


@contextmanager
def reference_pass(model: torch.nn.Module):
    """For TRL's own: PEFT lets frozen adapter weights require gradients when it switches adapters, and TRL switches
    checkpointing off by names that warn."""
    before = [(p, p.requires_grad) for p in model.parameters()] if is_peft_model(model) else []
    try:
        with quiet_checkpointing():
            yield
    finally:
        for parameter, required in before:
            if parameter.requires_grad != required:
                parameter.requires_grad_(required)


@contextmanager
def precise_precompute_key(trainer: TrlTrainer):
    """Let TRL's cache of precomputed reference log-probabilities know what they depend on beside data and model."""
    args = trainer.args
    settings = (args.max_length, getattr(args, "truncation_mode", None), getattr(trainer, "ld_alpha", None), args.bf16)
    key = Hasher.hash((trainer._precompute_model_hash, *settings, args.fp16, str(trainer.model.dtype)))
    with _attributes(trainer, _precompute_model_hash=key):
        yield


def local_part(parameter: torch.Tensor) -> torch.Tensor:
    """What this process holds of a parameter that ZeRO-3 or FSDP2 may have sharded."""
    if hasattr(parameter, "ds_tensor"):
        return parameter.ds_tensor
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def reference_model(trainer: TrlTrainer) -> torch.nn.Module:
    """The model that answers for the reference: the policy, its adapter off, where there is no other."""
    return trainer.model if trainer.ref_model is None else trainer.ref_model


@contextmanager
def _attributes(trainer: Any, **values: Any):
    """Give the trainer these attributes for a while."""
    saved = {name: getattr(trainer, name) for name in values}
    vars(trainer).update(values)
    try:
        yield
    finally:
        vars(trainer).update(saved)


# Without a trainer: what `trl-rdro inspect` and `trl-rdro score` need

# In place of the trainer, for `policy_forward` and `completion_logps`
NO_TRAINER: Any = SimpleNamespace(aux_loss_enabled=False, stand_in=lambda model: model)


def prepare_dataset(method: str, dataset: Any, processing_class: Any, args: Any) -> tuple[Any, Callable]:
    """What TRL's trainer makes of a data set before training, without a trainer or a model.

    Args:
        method: "dpo" or "kto".
        args: a config, or any object with its `max_length`, `truncation_mode` (dpo), `dataset_num_proc` and
            `pad_to_multiple_of`.

    Returns:
        The data set with `prompt_ids` and `chosen_ids`, `rejected_ids` or `completion_ids` added and the rows without
        room for a completion dropped; and the collator that truncates and pads its rows.

    Raises:
        `UserError`: for text, if the tokenizer has no end token.
    """
    require_end(dataset, processing_class)
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    trainer_class: Any = {"dpo": trl.DPOTrainer, "kto": trl.KTOTrainer}[method]
    trainer = SimpleNamespace(_tokenizer=tokenizer, calculate_KL=False)
    # Under the name "train" TRL would advise on KTO's class weights
    prepared = trainer_class._prepare_dataset(trainer, dataset, processing_class, args, "given")
    settings = {
        "pad_token_id": tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        "max_length": args.max_length,
        "pad_to_multiple_of": args.pad_to_multiple_of,
    }
    if method == "dpo":
        return prepared, DataCollatorForPreference(**settings, truncation_mode=args.truncation_mode)
    return prepared, DataCollatorForUnpairedPreference(**settings)


def is_tokenised(dataset: Any) -> bool:
    """Whether a data set has token ids and no text, which TRL's preparation would ask for."""
    columns = set(next(iter(dataset), {}))
    return "prompt_ids" in columns and columns.isdisjoint({"chosen", "completion"})


def drop_without_completion(dataset: Any, args: Any) -> Any:
    """Drop tokenised rows whose prompt leaves no room for a completion, as TRL's preparation does."""
    if args.max_length is None or getattr(args, "truncation_mode", "keep_start") != "keep_start":
        return dataset
    return dataset.filter(lambda row: len(row["prompt_ids"]) < args.max_length)


# Pairs (DPOTrainer)


def pair_reference_logps(trainer: TrlTrainer, inputs: dict[str, Any]) -> torch.Tensor:
    """The reference model's log-probabilities of the completions, `(2n,)`: chosen, then rejected."""
    if trainer.precompute_ref_logps:
        return torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
    settle_fsdp2(trainer.model)
    with _explain_cut_images(trainer):
        return torch.cat(trainer.compute_ref_log_probs(reference_model(trainer), inputs))


def pair_loss_and_metrics(
    trainer: trl.DPOTrainer,
    model: Callable,
    inputs: dict[str, Any],
    outputs: Any,
    ref_logps: torch.Tensor,
    losses: list[tuple[str, float]],
    return_outputs: bool,
    pair_weights: torch.Tensor | None = None,
) -> Any:
    """What TRL's own `_compute_loss` returns and logs for forward passes that were made already.

    `losses` are TRL's loss types with their weights; the result is their weighted sum, plus the load-balancing loss of
    a mixture of experts. TRL reads the reference log-probabilities from the batch, as if they were precomputed.
    `pair_weights`, `(n,)`, multiply the losses of the pairs.
    """
    ref_chosen_logps, ref_rejected_logps = ref_logps.chunk(2)
    inputs = {**inputs, "ref_chosen_logps": ref_chosen_logps, "ref_rejected_logps": ref_rejected_logps}

    def compute(outputs: Any, losses: list[tuple[str, float]], return_outputs: bool, **attributes: Any) -> Any:
        names, weights = zip(*losses, strict=True) if losses else ((), ())
        attributes |= {"precompute_ref_logps": True, "loss_types": list(names), "loss_weights": list(weights)}
        with _attributes(trainer, **attributes):
            return trl.DPOTrainer._compute_loss(trainer, _replay(model, outputs), inputs, return_outputs)

    if pair_weights is None or not losses:
        return compute(outputs, losses, return_outputs)
    sft, others = [pair for pair in losses if pair[0] == "sft"], [pair for pair in losses if pair[0] != "sft"]
    # TRL multiplies in place, also a result that its gradient is computed from (hinge): let autograd keep copies
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda saved: saved):
        result = compute(_wpo_outputs(trainer, outputs, pair_weights), others, return_outputs, use_weighting=True)
    if not sft:
        return result
    # A mean over tokens. What it logs was logged already.
    weighted = copy(outputs)
    weighted.log_probs = outputs.log_probs * pair_weights.repeat(2).unsqueeze(1)
    metrics = {"_metrics": defaultdict(lambda: defaultdict(list)), "aux_loss_enabled": False, "use_weighting": False}
    loss = compute(weighted, sft, False, _total_train_tokens=0, **metrics)
    return (result[0] + loss, result[1]) if return_outputs else result + loss


def _wpo_outputs(trainer: trl.DPOTrainer, outputs: Any, pair_weights: torch.Tensor) -> Any:
    """The outputs with which TRL's `use_weighting` multiplies the loss of each pair by its weight, beside WPO's own
    weights if they are switched on: exp of the mean over a completion's tokens of log_probs - log_sum_sq_probs."""
    weighted = copy(outputs)
    base = outputs.log_sum_sq_probs if trainer.use_weighting else outputs.log_probs.detach()
    half = pair_weights.log().clamp(min=-200) / 2  # of a weight of 0 too, of which nothing is left in float32
    weighted.log_sum_sq_probs = base - half.repeat(2).unsqueeze(1)
    return weighted


# Labelled completions (KTOTrainer)

# The one of TRL's unpaired losses that needs no estimate of the KL divergence
_LOSS_WITHOUT_KL = "apo_zero_unpaired"


@contextmanager
def without_kl(args: trl.KTOConfig):
    """Construct a `trl.KTOTrainer` that neither builds nor forwards KL batches: it decides by the loss type."""
    loss_type, args.loss_type = args.loss_type, _LOSS_WITHOUT_KL
    try:
        yield
    finally:
        args.loss_type = loss_type


def unpaired_reference_logps(trainer: TrlTrainer, inputs: dict[str, Any]) -> torch.Tensor:
    """The reference model's log-probabilities of the completions, `(n,)`."""
    if trainer.precompute_ref_logps:
        return inputs["ref_logps"]
    settle_fsdp2(trainer.model)
    return trainer.compute_ref_log_probs(reference_model(trainer), inputs)[0]


def unpaired_metrics(
    trainer: trl.KTOTrainer,
    model: Callable,
    inputs: dict[str, Any],
    outputs: Any,
    ref_logps: torch.Tensor,
    return_outputs: bool,
) -> Any:
    """Let TRL log its metrics for forward passes that were made already. Returns the outputs if they are asked for."""
    with torch.no_grad(), _attributes(trainer, precompute_ref_logps=True, loss_type=_LOSS_WITHOUT_KL):
        result = trl.KTOTrainer._compute_loss(
            trainer, _replay(model, outputs), {**inputs, "ref_logps": ref_logps}, return_outputs
        )
    return result[1] if return_outputs else None


def unpaired_loss(
    trainer: trl.KTOTrainer, model: Callable, inputs: dict[str, Any], return_outputs: bool, weights: torch.Tensor
) -> Any:
    """TRL's own loss with the losses of the completions multiplied by `(n,)` `weights`."""
    preferred = inputs["label"].bool()
    with _attributes(
        trainer,
        desirable_weight=trainer.desirable_weight * weights[preferred],
        undesirable_weight=trainer.undesirable_weight * weights[~preferred],
    ):
        return trl.KTOTrainer._compute_loss(trainer, model, inputs, return_outputs)


# Both


def with_reference(trainer: TrlTrainer, inputs: dict[str, Any]) -> dict[str, Any]:
    """The batch with the columns of precomputed reference log-probabilities, computed now."""
    settle_fsdp2(trainer.model)
    names = ("ref_logps", "ref_KL_logps") if "label" in inputs else ("ref_chosen_logps", "ref_rejected_logps")
    values = trainer.compute_ref_log_probs(reference_model(trainer), inputs)
    return {**inputs, **dict(zip(names, values, strict=True))}


@contextmanager
def reference_in_batch(trainer: TrlTrainer):
    """Let TRL's `_compute_loss` read the reference log-probabilities from the batch, as if they were precomputed."""
    with _attributes(trainer, precompute_ref_logps=True):
        yield


@contextmanager
def padding_free_is_ours():
    """Keep back TRL's warning that it has no `padding_free` at present."""

    def others(record: logging.LogRecord) -> bool:
        return "`padding_free=True` is temporarily unavailable" not in record.getMessage()

    trl_logger = logging.getLogger(trl.DPOTrainer.__module__)
    trl_logger.addFilter(others)
    try:
        yield
    finally:
        trl_logger.removeFilter(others)


def mean_over_ranks(trainer: TrlTrainer, scalars: dict[str, torch.Tensor]) -> dict[str, float]:
    """The mean of each scalar over the ranks, in one gather and one synchronisation."""
    return means_and_more(trainer, scalars, None)[0]


def means_and_more(
    trainer: TrlTrainer, scalars: dict[str, torch.Tensor], more: torch.Tensor | None
) -> tuple[dict[str, float], torch.Tensor]:
    """`mean_over_ranks`, and `(k,)` further values as each rank has them, `(ranks, k)`, in the same gather."""
    values = torch.stack([value.detach().float() for value in scalars.values()])
    if more is not None:
        values = torch.cat([values, more.detach().float()])
    gathered = trainer.accelerator.gather(values.unsqueeze(0)).cpu()
    of_ranks, rest = gathered[:, : len(scalars)], gathered[:, len(scalars) :]
    return dict(zip(scalars, of_ranks.mean(dim=0).tolist(), strict=True)), rest


def log_metrics(trainer: TrlTrainer, metrics: dict[str, float]) -> None:
    """Add metrics to the ones that TRL averages over micro-batches and logs."""
    for name, value in metrics.items():
        trainer._metrics["train" if trainer.model.training else "eval"][name].append(value)


def drop_metric(trainer: TrlTrainer, name: str) -> None:
    """Leave out of the log what TRL has added to it."""
    trainer._metrics["train" if trainer.model.training else "eval"].pop(name)


def take_metrics(trainer: TrlTrainer) -> dict[str, float]:
    """The metrics that TRL would log next, averaged as it does, which are then gone."""
    metrics = trainer._metrics["train" if trainer.model.training else "eval"]
    means = {name: sum(values) / len(values) for name, values in metrics.items()}
    metrics.clear()
    return means


def trained_tokens(trainer: TrlTrainer) -> int:
    """The tokens of all batches since the training began, as TRL counts them: over all ranks, without padding."""
    return trainer._total_train_tokens


def model_flops_utilisation(trainer: TrlTrainer, tokens_per_second: float, row_length: int) -> float | None:
    """TRL's MFU of one device, in percent; `None` where the device's peak or a token's operations are not known."""
    dtype = {"bf16": "bfloat16", "fp16": "float16"}.get(trainer.accelerator.mixed_precision)
    dtype = dtype or str(trainer.model.dtype).removeprefix("torch.")
    if trainer.accelerator.device.type != "cuda" or not hasattr(trl_utils, "compute_mfu"):  # TRL 1.16 has it
        return None
    peak = trl_utils.get_peak_flops(torch.cuda.get_device_name(trainer.accelerator.device), dtype)
    config = trainer.model.config.get_text_config()
    # Of others TRL looks for fields that they have not
    if peak is None or not hasattr(config, "intermediate_size") or hasattr(config, "num_experts_per_tok"):
        return None
    return trl_utils.compute_mfu(trl_utils.compute_flops_per_token(config, row_length), tokens_per_second, 1, peak)


def input_embeddings(trainer: TrlTrainer) -> torch.nn.Module:
    """The module whose output is what WDPO perturbs."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    return (model.get_base_model() if is_peft_model(model) else model).get_input_embeddings()
