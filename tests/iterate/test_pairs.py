"""Which pairs of a prompt's completions are trained on."""

import math

import pytest

from trl_rdro.iterate.config import IterateConfig
from trl_rdro.iterate.judges import (
    PreferenceFunction,
    RewardFunctions,
)
from trl_rdro.iterate.pairs import judge_prompts, select_pairs


VOWELS = "tests.iterate.worker.vowels"


def config(**changes) -> IterateConfig:
    return IterateConfig(**{"reward_funcs": [VOWELS], **changes})


def count_ones(prompts, completions, **kwargs):
    return [float(text.count("1")) for text in completions]


ONES = RewardFunctions([count_ones], None)
FOUR = ["10", "111", "", "1"]  # rewards 1, 3, 0, 1


def pairs_of(texts: list[str], judge=ONES, **changes) -> list[tuple[int, int]]:
    (verdict,) = judge_prompts(judge, [{"prompt": "p"}], [texts])
    return select_pairs(verdict, config(**changes), judge.gives_rewards, seed="0")


def test_best_versus_worst():
    assert pairs_of(FOUR) == [(1, 2)]
    assert pairs_of(["1", "01", "1"]) == []


def test_rejection_takes_every_pair_beyond_the_gap():
    found = pairs_of(FOUR, pair_selection="rejection", reward_gap=0.5)
    assert sorted(found) == [(0, 2), (1, 0), (1, 2), (1, 3), (3, 2)]
    assert sorted(pairs_of(FOUR, pair_selection="rejection", reward_gap=1)) == [(1, 0), (1, 2), (1, 3)]
    assert len(pairs_of(FOUR, pair_selection="rejection")) == 5  # equal rewards make no pair


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
