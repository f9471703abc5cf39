"""The stability report of a round, its warnings, and the curves of a run."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .config import IterateConfig
from .files import Row
from .judges import Judge, MissingLabels
from .stability import distance, loss_strength, mean_and_error, near_return, preference_norm, stability_margin


Figures = dict[str, Any]


def judge_policy(judge: Judge, rows: list[Row], samples: list[Row], baseline: list[Row]) -> Figures:
    """Reward of a policy, and its change and win rate against pi_0, on the same prompts. Each figure is None where the
    judge cannot give it: a preference function gives no rewards, a file has no labels for new completions."""
    per_prompt = len(samples[0]["completions"])
    repeated = [row for row in rows for _ in range(per_prompt)]
    new, old = ([text for row in group for text in row["completions"]] for group in (samples, baseline))
    shape = (len(samples), per_prompt)
    figures: Figures = {"reward": None, "reward_change": None, "win_rate": None}
    try:
        if judge.gives_rewards:
            rewards = np.reshape(judge.rewards(repeated, new), shape)
            before = np.reshape(judge.rewards(repeated, old), shape)
            wins = (rewards > before) + 0.5 * (rewards == before)
            change = {"mean": float(rewards.mean() - before.mean())}
            errors = [mean_and_error(values)["standard_error"] for values in (rewards, before)]
            change["standard_error"] = float(np.hypot(*errors))
            figures |= {"reward": mean_and_error(rewards), "reward_change": change}
        else:
            wins = np.reshape(judge.preferences(repeated, new, old), shape)
        figures["win_rate"] = mean_and_error(wins)
    except MissingLabels:
        pass
    return figures


def entropy(samples: list[Row]) -> Figures:
    """Nats per completion, from completions drawn from the policy itself."""
    return mean_and_error(-np.asarray([row["policy_logps"] for row in samples]))


def preference_figures(
    matrices: Sequence[Sequence[Sequence[float]]], config: IterateConfig, args: Any, tokens: float
) -> Figures:
    """The norm of the preference matrices of the round's prompts, and with the largest the margin."""
    norms = [preference_norm(matrix) for matrix in matrices]
    strength = loss_strength(args, tokens)
    margin = None if strength is None else stability_margin(config.a, strength, config.sampling_mix, max(norms))
    return {"preference_norm": {"largest": max(norms), "mean": float(np.mean(norms))}, "b": strength, "margin": margin}


def distance_figures(history: Sequence[np.ndarray]) -> Figures:
    """How far the policy is from earlier ones. `history` has the log-probabilities of the same completions under
    pi_0, pi_1, ...; those completions are draws from pi_0."""
    last = history[-1]
    return {
        "distance_to_base": distance(last, history[0]),
        "distance_to_previous": distance(last, history[-2]),
        "distance_to_two_rounds_ago": distance(last, history[-3]) if len(history) > 2 else None,
        "near_return": near_return(history),
    }


def warnings_of(report: Figures, base_entropy: float, config: IterateConfig) -> list[str]:
    """What is wrong with a round, a sentence each."""
    sentences = []
    if report["margin"] is not None and report["margin"] < 0:
        sentences.append(
            f"The stability margin is {report['margin']:.2f}: with this judge the loop may oscillate or collapse. "
            f"Lower `sampling_mix` (now {config.sampling_mix}) or `reference_mix` (now {config.a}), or raise `beta`."
        )
    if (turn := report["near_return"]) is not None:
        sentences.append(
            f"The policy circles: after round {report['round']} it is {turn['back']:.2f} nats from where it was after "
            f"{turn['index']} rounds, having been {turn['out']:.2f} away. Lower `sampling_mix` (now "
            f"{config.sampling_mix}) or `reference_mix` (now {config.a})."
        )
    if report["below_floor"]:
        sentences.append(
            f"The entropy is {report['entropy']['mean']:.2f} nats, below the floor of {config.entropy_floor} times "
            f"that of pi_0 ({base_entropy:.2f}): the run stops."
        )
    return sentences


def best_round(reports: Sequence[Figures]) -> int:
    """The round of the highest reward (else win rate; else the last one) among those above the entropy floor."""
    candidates = [report for report in reports if not report["below_floor"]] or reports
    for name in ("reward", "win_rate"):
        if all(report[name] is not None for report in candidates):
            return max(candidates, key=lambda report: report[name]["mean"])["round"]
    return candidates[-1]["round"]


# Figure

# Title, and the figures of each panel
PANELS = {
    "reward": ("reward",),
    "win rate against the start": ("win_rate",),
    "entropy (nats per completion)": ("entropy",),
    "distance (nats)": ("distance_to_base", "distance_to_previous", "distance_to_two_rounds_ago"),
    "stability margin (negative: may be unstable)": ("margin",),
    "largest norm of P - 1/2": ("preference_norm",),
}


def draw_report(result: Figures, path: Path) -> bool:
    """Draw the curves of a run, or do nothing without matplotlib. Returns whether they were drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13.2, 7.2), layout="constrained")
    points = [{**result["base"], "round": -1}, *result["rounds"]]
    for axes, (title, names) in zip(figure.subplots(2, 3).ravel(), PANELS.items(), strict=True):
        for name in names:
            found = [(point["round"] + 1, point[name]) for point in points if point.get(name) is not None]
            if not found:
                continue
            rounds, values = zip(*found, strict=True)
            if isinstance(values[0], dict):
                heights = [value["largest" if "largest" in value else "mean"] for value in values]
                errors = [value.get("standard_error", 0.0) for value in values]
            else:
                heights, errors = values, [0.0] * len(values)
            label = name.replace("distance_", "").replace("_", " ")
            axes.errorbar(rounds, heights, yerr=errors, marker="o", capsize=3, label=label)
        if title.startswith("entropy"):
            floor = result["entropy_floor"] * result["base"]["entropy"]["mean"]
            axes.axhline(floor, color="0.5", linestyle="--", label="floor")
        axes.set(title=title, xlabel="rounds of training")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        if axes.has_data():
            axes.legend(fontsize="small")
        else:
            axes.text(0.5, 0.5, "not known", ha="center", va="center", transform=axes.transAxes)
    FigureCanvasAgg(figure).print_png(path)
    return True
