"""What can be known of a run before its first step, and at it: that something is trained, and from where it starts."""

import torch


# Of the first step's mean log-ratio: nats, and per nat of the completion's log-probability
TOLERANCES = {torch.float32: (0.02, 0.002), torch.float64: (0.02, 0.002)}
HALF_PRECISION_TOLERANCE = (0.1, 0.01)
SAMPLED = 100_000  # entries of a parameter that are looked at


def require_trainable(model: torch.nn.Module) -> None:
    """Refuse a model that nothing of would be trained.

    Raises:
        `ValueError`: if no parameter requires a gradient.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "No parameter of the model requires a gradient, so that nothing would be trained. Load an adapter with "
            "`PeftModel.from_pretrained(..., is_trainable=True)`, or unfreeze the model's parameters."
        )


def share_that_cannot_move(model: torch.nn.Module, learning_rate: float) -> float:
    """The share of the half-precision trained parameters to which an update of `learning_rate`, the size of Adam's, is
    less than half of their last digit, so that it is rounded away. 0 where none is in half precision."""
    stuck = total = 0.0
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16) and parameter.numel():
            values = parameter.detach().flatten()[:SAMPLED].float().abs()
            last_digit = torch.finfo(parameter.dtype).eps * torch.exp2(torch.floor(torch.log2(values)))
            share = (learning_rate < last_digit / 2).float().mean().item()
            stuck, total = stuck + share * parameter.numel(), total + parameter.numel()
    return stuck / total if total else 0.0


def distance_from_reference(metrics: dict[str, float], beta: float, dtype: torch.dtype) -> str | None:
    """How far a run that should start at its reference is from it, in words, or None if it starts there.

    Args:
        metrics: TRL's of the first micro-batch: `rewards/*`, beta times the mean log-ratios, and `logps/*`.
        dtype: what the model computes in, which decides what is rounding.
    """
    nats, per_nat = TOLERANCES.get(dtype, HALF_PRECISION_TOLERANCE)
    far = []
    for side in ("chosen", "rejected"):
        logratio = metrics.get(f"rewards/{side}", 0.0) / beta
        if abs(logratio) > nats + per_nat * abs(metrics.get(f"logps/{side}", 0.0)):
            far.append(f"{logratio:+.3g} nats for {side} completions")
    return " and ".join(far) or None


def first_step_sentence(distance: str, has_columns: bool) -> str:
    """The warning for a run that does not start where it should."""
    causes = [
        "reference log-probabilities in the data set that belong to another model, chat template or `max_length`"
        if has_columns
        else "a model that was changed in memory, while its reference was loaded again from its path",
        "a stale cache of precomputed log-probabilities",
        "an adapter that the reference pass does not switch off",
    ]
    return (
        f"The run does not start at its reference: at the first step the mean log-ratio is {distance}, where it "
        f"should be 0. Look for {', '.join(causes[:-1])}, and {causes[-1]}. If the reference is meant to be another "
        "model, give it as `ref_model`: then this is not checked."
    )
