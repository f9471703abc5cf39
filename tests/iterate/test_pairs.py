"""Which pairs of a prompt's completions are trained on."""

import math
import random
from collections import Counter

import pytest

from trl_rdro.iterate.config import IterateConfig
from trl_rdro.iterate.judges import (
    PreferenceFunction,
    RewardFunctions,
)
from trl_rdro.iterate.pairs import accepted, judge_prompts, select_pairs


def count_ones(prompts, completions, **kwargs):
    return [float(text.count("1")) for text in completions]


ONES = RewardFunctions([count_ones], None)
FOUR = ["10", "111", "", "1"]  # rewards 1, 3, 0, 1


def pairs_of(
    texts: list[str], judge=ONES, pair_selection="best_vs_worst", seed="0", toss_ties=False, **changes
) -> list[tuple[int, int]]:
    (verdict,) = judge_prompts(judge, [{"prompt": "p"}], [texts])
    config = IterateConfig(reward_funcs=["set.below"], pair_selection=pair_selection, **changes)
    return select_pairs(verdict, pair_selection, config, judge.gives_rewards, seed, toss_ties)


def test_best_versus_worst():
    assert pairs_of(FOUR) == [(1, 2)]
    assert pairs_of(["1", "01", "1"]) == []


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize(("eta", "tau"), [(0.5, 1.0), (0.8, 1.0), (0.8, 2.0), (0.95, 1.0), (sigmoid(2.0), 1.0)])
def test_the_threshold_of_rs_dpo(eta, tau):
    """Pairs with sigma((r_i - r_j) / tau) >= eta, by a loop over all; equal rewards make no pair."""
    rewards = [text.count("1") for text in FOUR]
    expected = [
        (i, j)
        for i in range(4)
        for j in range(4)
        if rewards[i] > rewards[j] and sigmoid((rewards[i] - rewards[j]) / tau) >= eta
    ]
    assert pairs_of(FOUR, pair_selection="threshold", threshold_eta=eta, threshold_tau=tau) == expected
    assert 0 < len(expected) < 6


def test_rejection_pairs_are_of_accepted_completions_and_the_same_again():
    texts = ["1" * (i % 5) + "0" * (i // 5) for i in range(40)]
    options = {"pair_selection": "rejection", "samples_per_prompt": 40, "rejection_accepted": 8}
    found = pairs_of(texts, **options)
    assert found == pairs_of(texts, **options)
    chosen = {i for pair in found for i in pair}
    assert len(chosen) == 2 * len(found) <= 8
    assert all(texts[i].count("1") > texts[j].count("1") for i, j in found)
    # Whoever accepts everything pairs at random
    everything = pairs_of(texts, **options, rejection_beta=1e6)
    assert len({i for pair in everything for i in pair} | chosen) > len(chosen)


def outcomes(order, rewards, number, beta):
    """The probability of each list that `accepted` can return: naively, every toss of every pass by itself."""

    def one_pass(left, place, largest, result, probability):
        if len(result) == number:
            yield result, probability
        elif place == len(left):
            rest = [i for i in left if i not in result]
            yield from one_pass(rest, 0, max(rewards[i] for i in rest), result, probability)
        else:
            chance = math.exp((rewards[left[place]] - largest) / beta)
            yield from one_pass(left, place + 1, largest, [*result, left[place]], probability * chance)
            if chance < 1:
                yield from one_pass(left, place + 1, largest, result, probability * (1 - chance))

    found = Counter()
    for result, probability in one_pass(list(order), 0, max(rewards), [], 1.0):
        found[tuple(result)] += probability
    return found


@pytest.mark.parametrize("number", [1, 2, 3])
def test_acceptance_against_a_naive_loop_over_all_tosses(number):
    rewards, beta, draws = [0.0, 0.3, 1.0, 0.8], 0.5, 20_000
    expected = outcomes(range(4), rewards, number, beta)
    assert sum(expected.values()) == pytest.approx(1)
    rng = random.Random(0)
    counts = Counter(tuple(accepted(range(4), rewards, number, beta, rng)) for _ in range(draws))
    assert counts.keys() <= expected.keys()
    for result, probability in expected.items():
        tolerance = 5 * math.sqrt(probability * (1 - probability) / draws)
        assert counts[result] / draws == pytest.approx(probability, abs=tolerance + 1e-9), result


def test_accepted_draws_follow_the_tilted_distribution():
    """p exp(r / beta), normalised, where the candidates are drawn from p."""
    p, rewards, beta = [0.6, 0.3, 0.1], [0.0, 0.5, 1.0], 0.5
    tilted = [share * math.exp(reward / beta) for share, reward in zip(p, rewards, strict=True)]
    tilted = [value / sum(tilted) for value in tilted]
    rng, counts = random.Random(0), Counter()
    for _ in range(40):
        kinds = rng.choices(range(3), p, k=1000)
        of_candidates = [rewards[kind] for kind in kinds]
        counts.update(kinds[i] for i in accepted(range(1000), of_candidates, 150, beta, rng))
    total = counts.total()
    chi_squared = sum((counts[k] - total * tilted[k]) ** 2 / (total * tilted[k]) for k in range(3))
    assert total == 6000 and chi_squared < 13.8  # exceeded by one in a thousand


def test_extreme_temperatures_of_rejection():
    rewards = [0.0, 5.0, 3.0, 4.0]
    assert accepted(range(4), rewards, 3, 1e-6, random.Random(0)) == [1, 3, 2]  # the best ones
    assert accepted(range(4), rewards, 3, 1e6, random.Random(0)) == [0, 1, 2]  # as they come


def test_random_pairs_are_disjoint_and_won_by_the_better_one():
    texts = ["1" * i for i in range(9)]
    found = pairs_of(texts, pair_selection="random")
    assert len(found) == 4 and len({i for pair in found for i in pair}) == 8
    assert all(better > worse for better, worse in found)
    assert found == pairs_of(texts, pair_selection="random")
    assert pairs_of(["1", "01", "1"], pair_selection="random") == []


def test_random_pairs_are_won_with_the_judges_probability():
    judge = PreferenceFunction(lambda prompts, first, second, **_: [0.8 if a == "a" else 0.2 for a in first])
    found = pairs_of(["a", "b"] * 4000, judge, pair_selection="random")
    # Half of the pairs are of two equal texts
    assert len(found) == pytest.approx(2000, abs=5 * math.sqrt(1000))
    share = sum(better % 2 == 0 for better, _ in found) / len(found)
    assert share == pytest.approx(0.8, abs=5 * math.sqrt(0.16 / len(found)))


@pytest.mark.parametrize("pair_selection", ["random", "best_vs_worst"])
def test_a_coin_decides_ties(pair_selection):
    """Pass or fail in pairs of two: every completion is used once, the better one wins, and equal ones by halves. The
    same seed tosses the same coins."""
    texts, won = ["1", "", "", "1"], []
    for i, j in ((0, 1), (1, 0), (1, 2), (0, 3)):
        wins = 0
        for seed in range(1000):
            (pair,) = pairs_of([texts[i], texts[j]], ONES, pair_selection, seed=str(seed), toss_ties=True)
            assert sorted(pair) == [0, 1]
            wins += pair == (0, 1)
        won.append(wins)
    assert won[:2] == [1000, 0]
    assert won[2:] == pytest.approx([500, 500], abs=5 * math.sqrt(250))
    assert pairs_of(texts * 9, toss_ties=True, pair_selection=pair_selection) == pairs_of(
        texts * 9, toss_ties=True, pair_selection=pair_selection
    )


def test_with_tossed_ties_both_sides_together_are_what_was_drawn():
    found = pairs_of(["1", "", "", "", "1", "0"], pair_selection="random", toss_ties=True)
    assert sorted(i for pair in found for i in pair) == list(range(6))
