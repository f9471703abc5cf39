"""From the completions of a prompt and what the judge says of them to pairs of a better and a worse one."""

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from ..run.files import Row
from .config import IterateConfig
from .judges import Judge


@dataclass
class Judged:
    """What a judge says of the completions of one prompt.

    Attributes:
        distinct: the distinct texts; equal completions are one response.
        response: for each completion the index of its text.
        scores: of the distinct texts: rewards, or the mean probability of beating the prompt's completions.
        preferences: P_ij, the probability that text i beats text j.
    """

    distinct: list[str]
    response: list[int]
    scores: list[float]
    preferences: list[list[float]]


def judge_prompts(judge: Judge, rows: Sequence[Row], groups: Sequence[Sequence[str]]) -> list[Judged]:
    """Judge the completions of several prompts in one call."""
    distinct = [list(dict.fromkeys(group)) for group in groups]
    flat = [(row, text) for row, texts in zip(rows, distinct, strict=True) for text in texts]
    rewards = iter(judge.rewards(*zip(*flat, strict=True)) if judge.gives_rewards else ())
    results = []
    for texts, group in zip(distinct, groups, strict=True):
        scores = [next(rewards) for _ in texts] if judge.gives_rewards else []
        preferences = [[0.5 if a == b else float(a > b) for b in scores] for a in scores]
        results.append(Judged(texts, [texts.index(text) for text in group], scores, preferences))
    if not judge.gives_rewards:
        _compare(judge, rows, results)
    return results


def _compare(judge: Judge, rows: Sequence[Row], results: list[Judged]) -> None:
    """Ask for each pair of distinct texts once, the earlier one first."""
    pairs = [
        (row, result.distinct[i], result.distinct[j])
        for row, result in zip(rows, results, strict=True)
        for i, j in itertools.combinations(range(len(result.distinct)), 2)
    ]
    answers = iter(judge.preferences(*zip(*pairs, strict=True)) if pairs else ())
    for result in results:
        size = len(result.distinct)
        result.preferences = [[0.5] * size for _ in range(size)]
        for i, j in itertools.combinations(range(size), 2):
            probability = next(answers)
            result.preferences[i][j], result.preferences[j][i] = probability, 1 - probability
        result.scores = [sum(line[j] for j in result.response) / len(result.response) for line in result.preferences]


def select_pairs(
    judged: Judged, selection: str, config: IterateConfig, gives_rewards: bool, seed: str, toss_ties: bool = False
) -> list[tuple[int, int]]:
    """Pairs of indices into the prompt's completions, (better, worse).

    Equal texts and equal rewards make no pair, or with `toss_ties` one whose winner a coin decides: without such pairs
    the chosen and the rejected completions together are no sample of what was drawn.
    """
    scores, rng = [judged.scores[i] for i in judged.response], random.Random(seed)
    if selection == "best_vs_worst":
        order = list(range(len(scores)))
        if toss_ties:
            rng.shuffle(order)
        order.sort(key=scores.__getitem__)
        best, worst = order[-1], order[0]
        return [(best, worst)] if toss_ties or scores[best] > scores[worst] else []
    if selection == "threshold":
        gap = config.threshold_tau * math.log(config.threshold_eta / (1 - config.threshold_eta))
        pairs = itertools.permutations(range(len(scores)), 2)
        return [(i, j) for i, j in pairs if scores[i] > scores[j] and scores[i] - scores[j] >= gap]
    order = list(range(len(scores)))
    rng.shuffle(order)
    if selection == "rejection":
        order = accepted(order, scores, config.rejection_accepted, config.rejection_beta, rng)
    return _random_pairs(judged, gives_rewards, order, rng, toss_ties)


def accepted(
    candidates: Sequence[int], rewards: Sequence[float], number: int, beta: float, rng: random.Random
) -> list[int]:
    """Rejection sampling as in RSO (https://huggingface.co/papers/2309.06657): of candidates from a distribution p
    to draws from p exp(r / beta), normalised.

    A candidate is accepted with probability exp((r - r_max) / beta), one after another until `number` are. r_max is
    the largest reward of those that are left; who was not accepted gets another chance once all have had theirs.

    Args:
        candidates: indices into `rewards`, in random order, at least `number`.
    """
    left = list(candidates)
    result: list[int] = []
    while len(result) < number:
        largest = max(rewards[i] for i in left)
        for i in left.copy():
            if len(result) < number and rng.random() < math.exp((rewards[i] - largest) / beta):
                result.append(i)
                left.remove(i)
    return result


def _random_pairs(
    judged: Judged, gives_rewards: bool, order: Sequence[int], rng: random.Random, toss_ties: bool
) -> list[tuple[int, int]]:
    """Disjoint pairs; the winner is drawn with the judge's probability, as a judge of one mind at a time would say."""
    pairs = []
    for i, j in zip(order[::2], order[1::2], strict=False):
        first, second = judged.response[i], judged.response[j]
        is_tie = first == second or (gives_rewards and judged.scores[first] == judged.scores[second])
        first_wins = rng.random() < judged.preferences[first][second]
        if toss_ties or not is_tie:
            pairs.append((i, j) if first_wins else (j, i))
    return pairs
