"""Judges drawn at random: whatever one returns, the loop goes on with finite numbers or ends in a sentence."""

import itertools
import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trl_rdro.errors import UserError
from trl_rdro.iterate.config import SELECTIONS
from trl_rdro.iterate.judges import PreferenceFunction, RewardFunctions
from trl_rdro.iterate.pairs import judge_prompts, select_pairs

from ..fuzz import fuzz
from .test_judging import config


ROWS = [{"prompt": "p", "topic": "a"}, {"prompt": "q"}]  # the second lacks a column
GROUPS = [["a", "b"], ["c", "c", "d"]]
TEXTS = 4  # distinct ones; 2 comparisons


class Odd:
    """An object whose conversion to a number fails as `error`."""

    def __init__(self, error):
        self.error = error

    def __float__(self):
        raise self.error

    def __repr__(self):
        return "an odd\nobject"


errors = st.sampled_from([ValueError("a\nb"), KeyError("k"), RuntimeError(""), ZeroDivisionError(), SystemExit(0)])
good = st.one_of(st.floats(0, 1), st.integers(0, 1), st.booleans(), st.floats(0, 1, width=32).map(np.float32))
numbers = st.one_of(
    good,
    st.floats(),
    st.integers(-(10**400), 10**400),
    st.sampled_from([math.nan, math.inf, -math.inf, 1e308, -1e308, 1j, np.float32(2), np.int64(3)]),
    st.floats(-2, 2).map(torch.tensor),
    st.floats(-2, 2).map(lambda value: np.array([value])),
)
junk = st.one_of(
    st.none(),
    st.text(max_size=3),
    st.binary(max_size=3),
    st.just([]),
    st.just({}),
    st.just(torch.ones(2)),
    st.just(object()),
    errors.map(Odd),
)
lists = st.one_of(
    st.lists(good, min_size=TEXTS, max_size=TEXTS),
    st.lists(good, min_size=2, max_size=2),
    st.lists(numbers, max_size=6),
    st.lists(st.one_of(numbers, junk), max_size=6),
)


def broken(values, error):
    yield from values
    raise error


answers = st.one_of(
    lists,
    lists.map(tuple),
    lists.map(iter),
    lists.map(lambda values: dict(enumerate(map(repr, values)))),
    st.lists(st.floats(-2, 2), max_size=6).map(np.array),
    st.lists(st.floats(-2, 2), max_size=6).map(torch.tensor),
    st.lists(st.floats(0, 1), min_size=TEXTS, max_size=TEXTS).map(torch.tensor),
    st.just(torch.ones(TEXTS, 2)),
    st.tuples(lists, errors).map(lambda drawn: broken(*drawn)),
    st.builds(itertools.count),  # without an end
    numbers,
    junk,
)
judges = st.one_of(
    st.tuples(answers, st.none()),
    st.tuples(answers, st.none()),
    st.tuples(st.none(), errors),
)


def judge_of(answer, error):
    def judge(prompts, **columns):
        if error is not None:
            raise error
        return answer

    return judge


@fuzz(500)
@given(
    drawn=st.lists(judges, min_size=1, max_size=2),
    weights=st.one_of(st.none(), st.lists(st.sampled_from([1.0, -1.0, 0.0, 1e308]), min_size=2, max_size=2)),
    gives_rewards=st.booleans(),
    selection=st.sampled_from(list(SELECTIONS)),
)
def test_finite_numbers_or_a_sentence(drawn, weights, gives_rewards, selection):
    functions = [judge_of(*one) for one in drawn]
    weights = weights and weights[: len(functions)]
    judge = RewardFunctions(functions, weights) if gives_rewards else PreferenceFunction(functions[0])
    try:
        judged = judge_prompts(judge, ROWS, GROUPS)
    except UserError as error:
        assert "`judge`" in str(error) and "\n" not in str(error)
        return
    json.dumps([asdict(one) for one in judged], allow_nan=False)
    for one, group in zip(judged, GROUPS, strict=True):
        assert len(one.scores) == len(one.distinct) == len(set(group))
        assert all(0 <= p <= 1 for line in one.preferences for p in line)
        pairs = select_pairs(one, selection, config(pair_selection=selection), judge.gives_rewards, "seed")
        assert all(one.response[i] != one.response[j] for i, j in pairs)


@pytest.mark.parametrize("gives_rewards", [True, False])
def test_the_strategies_reach_both_ends(gives_rewards):
    """The test above would say nothing if all judges were refused, or none."""
    found = set()

    @fuzz(200)
    @given(judges)
    def look(drawn):
        function = judge_of(*drawn)
        judge = RewardFunctions([function], None) if gives_rewards else PreferenceFunction(function)
        try:
            judge_prompts(judge, ROWS, GROUPS)
        except UserError:
            found.add("refused")
        else:
            found.add("taken")

    look()
    assert found == {"refused", "taken"}
