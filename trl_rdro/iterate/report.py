"""The stability report of a round, and its warnings."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .config import IterateConfig
from .files import Row, read_json, read_rows
from .judges import Judge, MissingLabels
from .margins import preference_norm, stability_margin
from .stability import distance, loss_strength, mean_and_error, near_return


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
            error, error_before = (mean_and_error(values)["standard_error"] for values in (rewards, before))
            change["standard_error"] = float(np.hypot(error, error_before))
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
    norms = [float(preference_norm(matrix)) for matrix in matrices]
    strength = loss_strength(args, tokens)
    margin = None if strength is None else float(stability_margin(config.a, strength, config.sampling_mix, max(norms)))
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


def round_report(
    root: Path, folders: Sequence[Path], config: IterateConfig, args: Any, judge: Judge, rows: list[Row], base: Figures
) -> Figures:
    """
    The report of the last of these rounds.

    Args:
        root: where the completions of pi_0 are.
        folders: of all rounds up to it.
        rows: of the prompts of the report.
        base: the figures of pi_0.
    """
    folder = folders[-1]
    monitor, judged = read_rows(folder / "monitor.jsonl"), read_rows(folder / "judged.jsonl")
    base_samples = read_rows(root / "base.jsonl")
    tokens = float(np.mean([len(ids) for row in read_rows(folder / "samples.jsonl") for ids in row["completion_ids"]]))
    probes = [read_json(other / "probe.json") for other in folders]
    history = [np.asarray(logps) for logps in ([row["policy_logps"] for row in base_samples], *probes)]
    report = {
        "round": len(folders) - 1,
        **judge_policy(judge, rows, monitor, base_samples),
        "entropy": entropy(monitor),
        **distance_figures(history),
        **preference_figures([row["preferences"] for row in judged], config, args, tokens),
        "tokens_per_completion": tokens,
        "training_rows": len(read_rows(folder / "train.jsonl")),
    }
    report["below_floor"] = report["entropy"]["mean"] < config.entropy_floor * base["entropy"]["mean"]
    report["warnings"] = warnings_of(report, base["entropy"]["mean"], config)
    return report


def in_one_line(report: Figures) -> str:
    """A report for the log."""
    parts = []
    for name in ("reward", "reward_change", "win_rate", "entropy"):
        if (figure := report[name]) is not None:
            parts.append(f"{name.replace('_', ' ')} {figure['mean']:.3f} ± {figure['standard_error']:.3f}")
    parts.append(f"distance to the previous round {report['distance_to_previous']:.2f} nats")
    if report["margin"] is not None:
        parts.append(f"margin {report['margin']:.2f}")
    return ", ".join(parts) + "."
