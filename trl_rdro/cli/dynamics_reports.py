"""What `trl-rdro dynamics` prints."""

from typing import Any

import numpy as np

from ..iterate.dynamics import CLOSE


def ipo_report(result: dict[str, Any]) -> str:
    rate, rounds = result["rate"], len(result["policies"]) - 1
    answers = len(result["fixed_point"])
    margin = "converges from anywhere" if result["margin"] > 0 else "no promise from far away"
    turn = (
        "each round brings it closer" if rate < 1 else "each round drives it away" if rate > 1 else "no pull to pi_0"
    )
    after, left = result["settled_after"], result["entropies"][-1]
    lines = {
        "regime": result["regime"],
        "margin": f"{result['margin']:.4f}: 1 - (a + (b lam / 2) ||P - 1/2||), {margin}",
        "rate": f"{rate:.4f}: the factor per round of a small distance from the fixed point, {turn}",
        "fixed point": " ".join(f"{p:.4f}" for p in result["fixed_point"]),
        "entropy": f"{result['entropy']:.4f} nats there, of {np.log(answers):.4f}; a collapse is below "
        f"{result['entropy_floor']:.4f}",
        "simulated": "from half pi_0, half the first answer: "
        + (
            f"within {CLOSE} of it for good after {after} rounds"
            if after is not None
            else f"not within {CLOSE} of it after {rounds} rounds; entropy then {left:.4f} nats"
        ),
    }
    return table(lines)


def dpo_report(result: dict[str, Any]) -> str:
    rounds, after = len(result["policies"]) - 1, result["settled_after"]
    margin = "none: the judge can be certain, and a round of DPO has no bound then (--label_smoothing gives one)"
    if result["margin"] is not None:
        margin = f"{result['margin']:.4f}: 1 - (a + (b lam / 2) ||P - 1/2||) with b = {result['b']:.2f}"
    settled = "not settled" if after is None else f"within {CLOSE} of the last policy after {after}"
    lines = {
        "regime": f"{result['regime']}, by simulation",
        "margin": margin,
        "simulated": f"from half pi_0, half the first answer: {rounds} rounds, {settled}",
        "last policy": " ".join(f"{p:.4f}" for p in result["policies"][-1]),
        "entropy": f"{result['entropies'][-1]:.4f} nats there; a collapse is below {result['entropy_floor']:.4f}",
    }
    return table(lines)


def one_shot_report(result: dict[str, Any]) -> str:
    """What one round keeps. Answers are counted from 1, as the rows of a file are."""
    top = [i + 1 for i in result["smith_set"]]
    names = {"top": f"answers {top} above all others, which they beat", "order": "the order of the answers"}
    if len(top) == 1:
        names["top"] = f"answer {top[0]}, which beats all others, on top"
    lines = {"one round": "log-ratios " + " ".join(f"{z:.4f}" for z in result["rewards"])}
    for name, is_kept in result["kept"].items():
        lines[f"  {name}"] = f"keeps {names[name]}"
        if not is_kept:
            found = result["restored_by"][name]
            remedy = "none of the sampling distributions that were tried does"
            if found is not None:
                remedy = "pairs drawn with " + " ".join(f"{share:.3f}" for share in found) + " would"
            lines[f"  {name}"] = f"does not keep {names[name]}; {remedy}"
    return table(lines)


def table(lines: dict[str, str]) -> str:
    return "\n".join(f"{name:13}{text}" for name, text in lines.items())
