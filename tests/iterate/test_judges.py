"""Whatever goes wrong in a judge is one sentence that names it: in Python, and through `trl-rdro iterate`."""

import json
import math
import sys
import uuid

import numpy as np
import pytest
import torch

from trl_rdro.cli import iterate, main
from trl_rdro.errors import UserError
from trl_rdro.iterate.functions import ask, load_function
from trl_rdro.iterate.judges import PreferenceFunction, RewardFunctions

from ..helpers import refusal


ROWS = [{"prompt": "p"}, {"prompt": "q"}]


def raises(**_):
    raise KeyError("score")


def exits(**_):
    sys.exit("enough")


def stops_half_way(**_):
    yield 1.0
    raise RuntimeError("out of rewards")


async def forgets_to_wait(**_):
    return [1.0, 2.0]


def wrong_arguments(texts):
    return [1.0, 2.0]


FAILING = {
    "raises": (raises, ["KeyError: 'score'", "test_judges.py, line"]),
    "asserts": (lambda **_: [][1], ["IndexError"]),
    "exits": (exits, ["sys.exit('enough')"]),
    "exits with success": (lambda **_: sys.exit(0), ["sys.exit(0)"]),
    "stops half way": (stops_half_way, ["RuntimeError: out of rewards"]),
    "other arguments": (wrong_arguments, ["unexpected keyword argument"]),
}
ANSWERS = {
    "None": None,
    "a number": 1.0,
    "a text": "12",
    "a mapping": {"a": 1.0, "b": 2.0},
    "a set": {1.0, 2.0},
    "too few": [1.0],
    "too many": [1.0, 2.0, 3.0],
    "a mean": np.float64(1.0),
    "none": [1.0, None],
    "nan": [1.0, math.nan],
    "inf": [math.inf, 1.0],
    "texts": ["1", "2"],
    "lists": [[1.0], [2.0]],
    "complex": [1j, 1.0],
    "nan in a tensor": torch.tensor([1.0, math.nan]),
    "a tensor of rows": torch.ones(2, 3),
    "a number that no float holds": [10**400, 1],
}


@pytest.mark.parametrize("kind", FAILING)
@pytest.mark.parametrize("judge_class", [RewardFunctions, PreferenceFunction])
def test_failing_judge(kind, judge_class):
    function, words = FAILING[kind]
    with pytest.raises(UserError) as error:
        if judge_class is RewardFunctions:
            RewardFunctions([function], None).rewards(ROWS, ["a", "b"])
        else:
            PreferenceFunction(function).preferences(ROWS, ["a", "b"], ["c", "d"])
    for word in [f"`{function.__name__}`", *words]:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ANSWERS)
def test_wrong_answer(kind):
    def judge(**_):
        return ANSWERS[kind]

    with pytest.raises(UserError, match="`judge` must return"):
        ask(judge, 2, prompts=["p", "q"])


@pytest.mark.filterwarnings("ignore:coroutine")
def test_coroutine():
    with pytest.raises(UserError, match="`forgets_to_wait` must return a list of 2 numbers, got <coroutine"):
        ask(forgets_to_wait, 2)


@pytest.mark.parametrize(
    "values", [[1, 2], (1.0, 2.0), np.array([1, 2]), torch.tensor([1.0, 2.0]), iter([1, 2]), [True, np.float32(2)]]
)
def test_right_answer(values):
    assert ask(lambda **_: values, 2) == [1.0, 2.0]


def test_ctrl_c_is_not_the_judges_fault():
    def interrupted(**_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ask(interrupted, 2)


# Found by name


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write a module of a new name into the working directory, and return that name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def write(text: str) -> str:
        name = f"judge_{uuid.uuid4().hex}"
        (tmp_path / f"{name}.py").write_text(text)
        return name

    return write


FORMS = {
    "a function": "def f(completions, **_): return [{0}] * len(completions)\n",
    "an object": """
class Scorer:
    def __call__(self, completions, **_): return [{0}] * len(completions)
f = Scorer()
""",
    "a partial": """
import functools
def score(completions, value, **_): return [value] * len(completions)
f = functools.partial(score, value={0})
""",
    "a decorated one": """
def logged(function):
    def wrapper(**arguments): return function(**arguments)
    return wrapper
@logged
def f(completions, **_): return [{0}] * len(completions)
""",
    "a made one": """
def make(value):
    def score(completions, **_): return [value] * len(completions) if completions else score(completions=["a"])
    return score
f = make({0})
""",
}


@pytest.mark.parametrize("form", FORMS)
def test_another_text_is_another_judge(form, module):
    """Of the same name: a run is not continued with it."""
    first, same, other = (
        RewardFunctions([load_function(f"{module(FORMS[form].format(value))}.f")], None) for value in (1.0, 1.0, 2.0)
    )
    assert [judge.rewards(ROWS, ["a", "b"]) for judge in (first, same, other)] == [[1, 1], [1, 1], [2, 2]]
    assert first.source() == same.source() != other.source()


IMPORTS = {
    "syntax error": ("def f(:\n", "SyntaxError"),
    "raises": ("x = 1\nraise RuntimeError('no')\n", "RuntimeError: no"),
    "exits": ("import sys\nsys.exit(0)\n", "sys.exit(0)"),
    "misses a library": ("import no_such_library\n", "no_such_library"),
    "has no such name": ("def g(): pass\n", "has no attribute 'f'"),
    "is no function": ("f = 3\n", "must be a function, got int"),
    "is not text": (None, "ValueError"),
}


@pytest.mark.parametrize("kind", IMPORTS)
def test_function_that_cannot_be_imported(kind, module, tmp_path):
    text, words = IMPORTS[kind]
    name = module(text or "")
    if text is None:
        (tmp_path / f"{name}.py").write_bytes(b"\0")
        words = "null bytes"
    with pytest.raises(UserError) as error:
        load_function(f"{name}.f")
    assert f"{name}.f" in str(error.value) and words in str(error.value)


@pytest.mark.parametrize("path", ["", ".", "f", ".f", "..f", "a..f", "a.f.", "no_such_module.f", "math.no_such_name"])
def test_path_of_no_function(path):
    with pytest.raises(UserError, match="Cannot import the function"):
        load_function(path)


def test_working_directory_is_searched_last(module, tmp_path):
    name = module("def f(**_): return []\n")
    (tmp_path / "colorsys.py").write_text(
        "def f(**_): return []\n"
    )  # a module of Python that nothing here has imported
    sys.modules.pop("colorsys", None)
    assert load_function(f"{name}.f")() == []
    assert sys.path[-1] == str(tmp_path)
    with pytest.raises(UserError, match="'colorsys' has no attribute 'f'"):
        load_function("colorsys.f")


# Files of labels

LABELS = {
    "binary": (b"\xff\x00", "JSON lines"),
    "no JSON": (b"{", "JSON lines"),
    "empty": (b"", "at least one"),
    "a list": (b"[1]\n", "a mapping in each line"),
    "a later list": (b'{"prompt": "p", "completion": "c", "score": 1}\n[1]\n', "a mapping in each line"),
    "a later row without a score": (
        b'{"prompt": "p", "completion": "c", "score": 1}\n{"prompt": "p", "completion": "d"}\n',
        "row 1 (counted from 0): the column `score`",
    ),
    "not filled in": (
        b'{"prompt": "p", "completion": "c", "score": null}\n',
        "row 0 (counted from 0): the column `score`",
    ),
    "a text score": (
        b'{"prompt": "p", "completion": "c", "score": "high"}\n',
        "row 0 (counted from 0): the column `score`",
    ),
    "nan": (b'{"prompt": "p", "completion": "c", "score": NaN}\n', "row 0 (counted from 0): the column `score`"),
    "true": (b'{"prompt": "p", "completion": "c", "score": true}\n', "row 0 (counted from 0): the column `score`"),
    "a number for a prompt": (
        b'{"prompt": 3, "completion": "c", "score": 1}\n',
        "row 0 (counted from 0): the column `prompt`",
    ),
    "no messages": (
        b'{"prompt": "p", "chosen": ["a"], "rejected": "b"}\n',
        "row 0 (counted from 0): the column `chosen`",
    ),
    "a blank prompt": (b'{"prompt": " ", "completion": "c", "score": 1}\n', "the column `prompt` must have text"),
    "a column twice": (b'{"prompt": "p", "completion": "c", "completion.1": "d", "score": 1}\n', "twice"),
    "a user's answer": (
        b'{"prompt": "p", "chosen": [{"role": "user", "content": "a"}], "rejected": "b"}\n',
        "ends with a message of the role 'user'",
    ),
    "other columns": (b'{"prompt": "p", "completion": "c"}\n', "it has completion, prompt"),
}


@pytest.mark.parametrize("kind", LABELS)
def test_bad_labels_end_in_one_sentence_before_anything_is_launched(kind, config, tmp_path, capsys):
    content, words = LABELS[kind]
    (tmp_path / "labels.jsonl").write_bytes(content)
    argv = ["iterate", "--config", config(reward_funcs=None, labelled_file=str(tmp_path / "labels.jsonl"))]
    message = refusal(capsys, main(argv))
    assert "labelled_file" in message and words in message


@pytest.mark.parametrize(
    "rows",
    [
        [{"prompt": [{"role": "user", "content": "p"}], "completion": "c", "score": 1}],
        [{"prompt": "p", "completion": "c", "score": 1}, {"prompt": "p", "completion": "", "score": 0.5}],
        [{"prompt": "p", "chosen": "", "rejected": "c"}, {"prompt": "p", "chosen": "d", "rejected": ""}],
        [{"prompt": "p", "chosen": [{"role": "assistant", "content": "a"}], "rejected": "b"}],
    ],
)
def test_labels_that_are_right(rows, config, tmp_path):
    """Silence may be judged, and preferred; prompts and completions need not share their form."""
    (tmp_path / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (_, judge, *_) = iterate.parse(
        ["--config", config(reward_funcs=None, labelled_file=str(tmp_path / "labels.jsonl"))]
    )
    assert judge.labels


# Through the command


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def f(**_): raise KeyError('x')\n", "The judge `f` failed: KeyError: 'x'"),
        ("def f(**_): return None\n", "`f` must return a list of"),
        ("def f(prompts, **_): return [float('nan')] * len(prompts)\n", "`f` must return finite numbers, got nan"),
        ("def f(**_): exit(0)\n", "The judge `f` failed: it ends the process"),
    ],
)
@pytest.mark.parametrize("option", ["reward_funcs", "preference_func"])
def test_failing_judge_ends_the_command_in_one_sentence(option, text, words, module, config, capsys):
    path = f"{module(text)}.f"
    changes = {"reward_funcs": [path]} if option == "reward_funcs" else {"reward_funcs": None, option: path}
    assert words in refusal(capsys, iterate.run(["--config", config(**changes)]))


@pytest.mark.parametrize("value", ["tests.iterate.worker.vowels", 3, {"a": 1}, [3]])
def test_reward_funcs_are_a_list_of_paths(value, config, capsys):
    assert "`reward_funcs` must be a list" in refusal(
        capsys, main(["iterate", "--config", config(reward_funcs=value)])
    )


def test_missing_labels_of_the_first_round_are_asked_for(config, tmp_path, capsys):
    labels = tmp_path / "labels.jsonl"
    labels.write_text(json.dumps({"prompt": "p", "completion": "c", "score": 1.0}) + "\n")
    message = refusal(capsys, iterate.run(["--config", config(reward_funcs=None, labelled_file=str(labels))]))
    assert "to_label.jsonl" in message and "start the same command again" in message
    wanted = [json.loads(line) for line in (tmp_path / "out/round_000/to_label.jsonl").read_text().splitlines()]
    assert wanted and all(row["score"] is None for row in wanted)


def test_a_judge_whose_package_is_missing_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "vaderSentiment", None)
    monkeypatch.delitem(sys.modules, "trl_rdro.iterate.rewards", raising=False)
    with pytest.raises(UserError, match=r"needs vaderSentiment: pip install 'trl-rdro\[iterate\]'"):
        load_function("trl_rdro.iterate.rewards.positivity")
