"""What TRL's trainers refuse, warn of or pass over in combinations of their own options, said when a config is built
rather than once the model is loaded."""

from typing import Any

from .validation import Range, require


ABOVE_ZERO = Range("[1e-9, 1e9]", "With 0 nothing would be trained.")
FLIPPED = Range("[0, 0.5)", "It is the assumed probability that a label is flipped.")
# Whose part that does not cancel in another score than the log-ratio does cancel between a pair's two
F_DIVERGENCE_LOSSES = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft")
SORTING_LOSSES = ("aot", "aot_unpaired")


def refuse_combinations(args: Any) -> None:
    """Of `DPOConfig` and `KTOConfig`. Raises `ValueError` with one sentence."""
    if args.sync_ref_model and args.precompute_ref_log_probs:
        raise ValueError(
            "`sync_ref_model=True` cannot be combined with `precompute_ref_log_probs=True`: a reference that moves "
            "has no log-probabilities to compute before training. Set one of the two to False."
        )
    if getattr(args, "use_liger_kernel", False) and (args.liger_kernel_config or {}).get("fused_linear_cross_entropy"):
        raise ValueError(
            "`liger_kernel_config={'fused_linear_cross_entropy': True}` replaces the forward that the trainer needs. "
            "Remove the key."
        )


def refuse_pair_losses(args: Any) -> None:
    """Of `DPOConfig`, whose `loss_type` is a list of TRL's losses and ours. Raises `ValueError` with one sentence."""
    losses = args.loss_type
    others = [name for name in losses if name not in F_DIVERGENCE_LOSSES]
    if args.f_divergence_type != "reverse_kl" and others:
        raise ValueError(
            f"`f_divergence_type={args.f_divergence_type!r}` cannot be combined with {' and '.join(others)}, only "
            f"with {', '.join(F_DIVERGENCE_LOSSES)}. Use the default `f_divergence_type='reverse_kl'`."
        )
    if "robust" in losses:
        require("label_smoothing", args.label_smoothing, (float,), FLIPPED)
    if "exo_pair" in losses and args.label_smoothing == 0:
        raise ValueError(
            "`label_smoothing` must be greater than 0 with `exo_pair`, got 0: its target is the logarithm of it. The "
            "paper recommends 1e-3."
        )
    if args.use_weighting and (sorting := [name for name in losses if name in SORTING_LOSSES]):
        raise ValueError(
            f"`use_weighting=True` cannot be combined with {' and '.join(sorting)}, which sorts the pairs of a batch, "
            "so that a weight belongs to no pair. Set `use_weighting=False`."
        )


def refuse_kl_losses(args: Any) -> None:
    """Of `KTOConfig`, with a loss that estimates a KL divergence from a batch's other completions. Raises
    `ValueError` with one sentence."""
    if args.train_sampling_strategy != "sequential":
        raise ValueError(
            f"`train_sampling_strategy={args.train_sampling_strategy!r}` cannot be combined with "
            f"`loss_type={args.loss_type!r}`, which pairs each prompt with the completion of its neighbour. Leave it "
            "None, or use `apo_zero_unpaired`."
        )
    if args.per_device_train_batch_size == 1:
        raise ValueError(
            f"`per_device_train_batch_size` must be at least 2 with `loss_type={args.loss_type!r}`, got 1: the KL "
            "divergence is estimated from the other completions of a batch. Raise it, or use `apo_zero_unpaired`."
        )
