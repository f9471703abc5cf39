"""What judges say of completions, and where they are found."""

import json
import math

import numpy as np
import pytest

from trl_rdro.iterate.config import IterateConfig
from trl_rdro.iterate.judges import (
    LabelledPairs,
    LabelledScores,
    MissingLabels,
    PreferenceFunction,
    RewardFunctions,
    make_judge,
)
from trl_rdro.iterate.pairs import judge_prompts
from trl_rdro.iterate.rewards import positivity

from .worker import vowels


VOWELS = "tests.iterate.worker.vowels"


def config(**changes) -> IterateConfig:
    return IterateConfig(**{"reward_funcs": [VOWELS], **changes})


def count_ones(prompts, completions, **kwargs):
    return [float(text.count("1")) for text in completions]


def test_rewards_are_weighted_and_see_columns_and_the_format_of_the_prompt():
    seen = {}

    def spy(prompts, completions, **columns):
        seen.update(columns, prompts=prompts, completions=completions)
        return [10.0] * len(prompts)

    messages = [{"role": "user", "content": "hello"}]
    rows = [{"prompt": messages, "topic": "a"}, {"prompt": messages, "topic": "b"}]
    judge = RewardFunctions(
        [spy, lambda completions, **_: [len(text[0]["content"]) for text in completions]], [0.5, 2.0]
    )
    assert judge.rewards(rows, ["x", "yyy"]) == [7.0, 11.0]
    assert seen["topic"] == ["a", "b"] and seen["prompts"] == [messages, messages]
    assert seen["completions"] == [[{"role": "assistant", "content": text}] for text in ("x", "yyy")]
    assert judge.preferences(rows[:1] * 3, ["x", "yy", "x"], ["yy", "x", "z"]) == [0.0, 1.0, 0.5]


@pytest.mark.parametrize(
    ("values", "sentence"),
    [([1.0], "must return 2 values, one for each, got 1"), ([1.0, None], "got None"), ([1.0, math.nan], "got nan")],
)
def test_bad_rewards_are_refused(values, sentence):
    with pytest.raises(ValueError) as error:
        RewardFunctions([lambda **_: values], None).rewards([{"prompt": "p"}] * 2, ["a", "b"])
    assert sentence in str(error.value)


def test_bad_probabilities_are_refused():
    with pytest.raises(ValueError, match=r"probabilities in \[0, 1\], got 1.5"):
        PreferenceFunction(lambda **_: [1.5]).preferences([{"prompt": "p"}], ["a"], ["b"])


def test_preference_function_is_asked_once_for_each_pair_of_texts():
    asked = []

    def first_letter(prompts, first, second, **columns):
        asked.extend(zip(prompts, first, second, columns["id"], strict=True))
        return [0.9 if a < b else 0.1 for a, b in zip(first, second, strict=True)]

    rows = [{"prompt": "p", "id": 7}, {"prompt": "q", "id": 8}]
    verdicts = judge_prompts(PreferenceFunction(first_letter), rows, [["b", "a", "b", "c"], ["x", "x", "x", "x"]])
    assert asked == [("p", "b", "a", 7), ("p", "b", "c", 7), ("p", "a", "c", 7)]
    assert verdicts[0].distinct == ["b", "a", "c"] and verdicts[0].response == [0, 1, 0, 2]
    np.testing.assert_allclose(verdicts[0].preferences, [[0.5, 0.1, 0.9], [0.9, 0.5, 0.9], [0.1, 0.1, 0.5]])
    # The mean over the prompt's completions, of which two are b
    np.testing.assert_allclose(verdicts[0].scores, [(2 * 0.5 + 0.1 + 0.9) / 4, (2 * 0.9 + 0.5 + 0.9) / 4, 0.8 / 4])
    assert verdicts[1].preferences == [[0.5]] and verdicts[1].scores == [0.5]


def test_labels_are_looked_up_and_missing_ones_named():
    rows = [{"prompt": "p"}] * 2
    scores = LabelledScores(
        [{"prompt": "p", "completion": "a", "score": score} for score in (1, 4)]
        + [{"prompt": "p", "completion": [{"role": "assistant", "content": "b"}], "score": 3}]
    )
    assert scores.rewards(rows, ["a", "b"]) == [2.5, 3.0]
    with pytest.raises(MissingLabels) as error:
        scores.rewards(rows, ["a", "c"])
    assert error.value.rows == [{"prompt": "p", "completion": "c", "score": None}]

    wins = LabelledPairs([{"prompt": "p", "chosen": x, "rejected": y} for x, y in ("ab", "ab", "ba")])
    assert wins.preferences(rows, ["a", "b"], ["b", "a"]) == [pytest.approx(2 / 3), pytest.approx(1 / 3)]
    assert wins.preferences(rows[:1], ["c"], ["c"]) == [0.5]
    with pytest.raises(MissingLabels) as error:
        wins.preferences(rows, ["a", "c"], ["b", "a"])
    assert error.value.rows == [{"prompt": "p", "chosen": "c", "rejected": "a"}]


def test_judge_is_found_by_its_name(tmp_path):
    assert make_judge(config()).functions == [vowels]
    judge = make_judge(config(reward_funcs=None, preference_func="tests.iterate.test_judging.count_ones"))
    assert judge.function is count_ones
    for path in ("nowhere.function", "tests.iterate.worker.consonants", "function"):
        with pytest.raises(ValueError, match="Cannot import the function"):
            make_judge(config(reward_funcs=[path]))
    with pytest.raises(ValueError, match="must be a function, got str"):
        make_judge(config(reward_funcs=["tests.iterate.test_judging.VOWELS"]))

    file = tmp_path / "labels.jsonl"
    with pytest.raises(ValueError, match="is not a file"):
        make_judge(config(reward_funcs=None, labelled_file=str(file)))
    for row, kind in (
        ({"prompt": "p", "completion": "c", "score": 1}, LabelledScores),
        ({"prompt": "p", "chosen": "c", "rejected": "d"}, LabelledPairs),
    ):
        file.write_text(json.dumps(row) + "\n")
        assert type(make_judge(config(reward_funcs=None, labelled_file=str(file)))) is kind
    file.write_text(json.dumps({"prompt": "p", "completion": "c"}) + "\n")
    with pytest.raises(ValueError, match="it has completion, prompt"):
        make_judge(config(reward_funcs=None, labelled_file=str(file)))


def test_positivity_of_texts_and_conversations():
    pytest.importorskip("vaderSentiment")
    texts = ["A wonderful day.", "A horrible day."]
    good, bad = positivity(["p", "p"], texts)
    assert bad < 0 < good
    messages = [[{"role": "assistant", "content": text}] for text in texts]
    assert positivity(["p", "p"], messages) == [good, bad]
