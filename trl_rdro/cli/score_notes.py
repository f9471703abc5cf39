"""What a table of scores cannot show: why a figure in it is 0, or has no error."""

from typing import Any


def notes(result: dict[str, Any]) -> list[str]:
    """Sentences below the table of a result of `trl_rdro.scoring.score`."""
    overall, paired = result["overall"], result["format"] == "pairs"
    if result["reference"] and all(_is_constant(overall[side], 0) for side in _sides(paired)):
        tie = " A tie counts one half." if paired else ""
        return [f"Every score is 0: the model gives the same probabilities as {result['reference']}.{tie}"]
    sentences = []
    figure = overall["accuracy" if paired else "auc"]
    if any(_is_constant(figure, value) for value in (0, 1)):
        share = f", which up to {min(3 / overall['n'], 1):.1%} of exceptions would give too" if paired else ""
        sentences.append(f"The error of {figure['mean']:.3f} is 0.000 for want of an exception in these rows{share}.")
    margin = overall["margin"]["mean"] if paired else None
    if margin is not None and 0 < abs(margin) < 0.005:
        rounding = "" if result["dtype"] == "float32" else f", and {result['dtype']} rounds: see --dtype float32"
        sentences.append(f"The margin is {margin:.1e} nats: the model is very near its reference{rounding}.")
    return sentences


def _sides(paired: bool) -> tuple[str, str]:
    return ("chosen", "rejected") if paired else ("preferred", "non_preferred")


def _is_constant(figure: dict[str, Any], value: float) -> bool:
    return figure["mean"] == value and not figure["standard_error"]
