"""Data sets of the wrong kind are refused with one sentence: which data set, row and column, what to do."""

import json
import logging
import time

import pyarrow as pa
import pytest
from datasets import Dataset, IterableDataset, load_dataset

from trl_rdro.checks.datasets import BATCH, FIRST_ROWS, check_dataset, check_datasets, check_rows


def user(text):
    return [{"role": "user", "content": text}]


def assistant(text):
    return [{"role": "assistant", "content": text}]


PAIRS = [{"prompt": f"q {i}", "chosen": f" good {i}", "rejected": f" bad {i}"} for i in range(8)]
CHATS = [
    {"prompt": user(row["prompt"]), "chosen": assistant(row["chosen"]), "rejected": assistant(row["rejected"])}
    for row in PAIRS
]
LABELLED = [{"prompt": f"q {i}", "completion": f" answer {i}", "label": i % 2 == 0} for i in range(8)]
LABELLED_CHATS = [
    {"prompt": user(row["prompt"]), "completion": assistant(row["completion"]), "label": row["label"]}
    for row in LABELLED
]
IDS = [{"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4]} for _ in range(8)]
LABELLED_IDS = [{"prompt_ids": [1], "completion_ids": [2, 3], "label": i > 3} for i in range(8)]


def with_row(number, rows, **changes):
    return [{**row, **(changes if i == number else {})} for i, row in enumerate(rows)]


def without(rows, *columns):
    return [{key: value for key, value in row.items() if key not in columns} for row in rows]


def ways(rows, tmp_path):
    """The same rows as a table, selected out of a larger table, and as a stream."""
    try:
        table = Dataset.from_list(rows)
    except (pa.ArrowInvalid, pa.ArrowTypeError):  # kinds are mixed: the command line reads them as JSON values
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        cache = tmp_path / str(abs(hash(str(rows))))
        table = load_dataset("json", data_files=str(path), cache_dir=str(cache))["train"]
    yield table
    yield table.select([0, *range(len(rows))]).select(range(1, len(rows) + 1))
    yield table.to_iterable_dataset()


def refusal(rows, method, tmp_path, **options) -> str:
    """The one sentence with which all ways of giving the rows are refused."""
    sentences = set()
    for dataset in ways(rows, tmp_path):
        with pytest.raises(ValueError) as error:
            check_dataset(dataset, "train_dataset", method, **options)
        sentences.add(str(error.value))
    (sentence,) = sentences
    assert sentence.startswith("`train_dataset`") and "\n" not in sentence and sentence.endswith(".")
    return sentence


# What is right


@pytest.mark.parametrize(
    ("method", "rows"),
    [
        ("dpo", PAIRS),
        ("dpo", CHATS),
        (
            "dpo",
            without(
                [{**row, "chosen": "q" + row["chosen"], "rejected": "q" + row["rejected"]} for row in PAIRS], "prompt"
            ),
        ),
        (
            "dpo",
            [{"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]} for row in CHATS],
        ),
        ("dpo", IDS),
        ("dpo", [{**row, "ref_chosen_logps": -3.0, "ref_rejected_logps": -4} for row in PAIRS]),
        ("dpo", [{**row, "tools": '[{"type": "function"}]', "chat_template_kwargs": {"a": 1}} for row in CHATS]),
        ("dpo", [{**row, "score": None, "source": 3} for row in PAIRS]),
        ("dpo", with_row(5, PAIRS, rejected="")),
        ("dpo", with_row(5, CHATS, rejected=assistant(" "))),
        ("dpo", with_row(5, CHATS, prompt=[{"role": "system", "content": ""}, *user("q")])),
        ("kto", LABELLED),
        ("kto", LABELLED_CHATS),
        ("kto", LABELLED_IDS),
        ("kto", PAIRS),
        ("kto", with_row(5, LABELLED, completion="")),
        ("prompts", [{"prompt": "a"}, {"prompt": "b"}]),
        ("prompts", [{"prompt": user("a"), "answer": 3}]),
    ],
)
def test_accepted(method, rows, tmp_path):
    for dataset in ways(rows, tmp_path):
        checked = check_dataset(dataset, "train_dataset", method)
        assert list(checked) == list(dataset)
        if isinstance(dataset, Dataset):
            assert checked is dataset


def test_any_format():
    labelled = Dataset.from_list(LABELLED)
    for form in (None, "numpy", "torch", "arrow", "pandas"):
        check_dataset(labelled.with_format(form), "train_dataset", "kto")
    labelled.set_transform(lambda batch: {**batch, "completion": [text.upper() for text in batch["completion"]]})
    check_dataset(labelled, "train_dataset", "kto")
    with pytest.raises(ValueError, match="row 3"):
        labelled.set_transform(
            lambda batch: {**batch, "completion": [None if "3" in t else t for t in batch["completion"]]}
        )
        check_dataset(labelled, "train_dataset", "kto")


# What is wrong in one row


NO_MESSAGE = "must be text or a list of messages"


@pytest.mark.parametrize("number", [0, 5])
@pytest.mark.parametrize("column", ["prompt", "chosen", "rejected"])
@pytest.mark.parametrize(
    ("value", "found"),
    [
        (None, f"{NO_MESSAGE}, got null"),
        (3, f"{NO_MESSAGE}, got 3 (int)"),
        (2.5, f"{NO_MESSAGE}, got 2.5 (float)"),
        (True, f"{NO_MESSAGE}, got True (bool)"),
        ({"text": "a"}, f"{NO_MESSAGE}, got {{'text': 'a'}} (dict)"),
        (["a", "b"], "message 1 of 2 that is str, not a message"),
        ([], "a list without messages"),
        ([None], "message 1 of 1 that is NoneType"),
        ([{"from": "human", "value": "a"}], 'message 1 of 1 with the keys "from" and "value"'),
        ([{"content": "a"}], "message 1 of 1 without a role, only content"),
        ([{"role": "user"}], "message 1 of 1 without content"),
        ([{"role": "user", "content": None}], "message 1 of 1 without content"),
        ([{"role": "user", "content": 3}], "message 1 of 1 whose content is int"),
        ([{"role": "user", "content": ["a"]}], "message 1 of 1 whose content is a list but not of parts"),
        ([{"role": "user", "content": [{"type": "text"}]}], "a part of the type text without a text"),
        ([*user("a"), {"role": "asistant", "content": "a"}], "message 2 of 2 of the role 'asistant'"),
        ([{"role": "gpt", "content": "a"}], "message 1 of 1 of the role 'gpt'"),
        ([{"role": 3, "content": "a"}], "message 1 of 1 of the role 3"),
    ],
)
def test_a_value_of_another_kind(number, column, value, found, tmp_path):
    sentence = refusal(with_row(number, CHATS, **{column: value}), "dpo", tmp_path)
    assert f"row {number} (counted from 0): the column `{column}` " in sentence and found in sentence


@pytest.mark.parametrize(
    ("method", "rows", "found"),
    [
        (
            "dpo",
            with_row(5, PAIRS, prompt=""),
            "row 5 (counted from 0): the column `prompt` must have text, got an empty",
        ),
        ("dpo", with_row(5, PAIRS, prompt=" \n\u2003"), "must have text, got no text but white space"),
        ("dpo", with_row(5, PAIRS, chosen=" "), "the column `chosen` must have text"),
        ("dpo", with_row(5, CHATS, prompt=user(" ")), "`prompt` ends with a message of the role 'user' without text"),
        (
            "dpo",
            with_row(5, CHATS, chosen=assistant("")),
            "`chosen` ends with a message of the role 'assistant' without",
        ),
        ("dpo", with_row(5, CHATS, rejected=user("a")), "`rejected` ends with a message of the role 'user'"),
        (
            "kto",
            with_row(4, LABELLED, completion=" "),
            "row 4 (counted from 0): the column `completion` has no text, and is",
        ),
        (
            "kto",
            with_row(4, LABELLED_CHATS, completion=assistant("")),
            "the column `completion` has no text, and is labelled",
        ),
        (
            "kto",
            with_row(5, LABELLED, completion=None),
            "row 5 (counted from 0): the column `completion` must be text",
        ),
        (
            "dpo",
            with_row(5, PAIRS, prompt=user("a")),
            "`prompt` is a list of messages, and `chosen` of the first row text",
        ),
        ("dpo", with_row(5, CHATS, chosen="a"), "`chosen` is text, and `chosen` of the first row a list of messages"),
        (
            "dpo",
            [{**c, "prompt": r["prompt"]} for c, r in zip(CHATS, PAIRS, strict=True)],
            "row 0 (counted from 0): the column `prompt` is text",
        ),
        (
            "kto",
            [{**r, "prompt": user(r["prompt"])} for r in LABELLED],
            "`prompt` is a list of messages, and `completion`",
        ),
        ("dpo", without(CHATS, "prompt"), "their first messages differ"),
        ("dpo", [{"chosen": "a b", "rejected": "c d"}], "their first characters differ"),
        ("dpo", [{"chosen": "a b", "rejected": ""}, {"chosen": "a b", "rejected": "a c"}], "row 0"),
        (
            "dpo",
            with_row(5, IDS, chosen_ids=[]),
            "row 5 (counted from 0): the column `chosen_ids` must be a list of token ids",
        ),
        ("dpo", with_row(5, IDS, prompt_ids=None), "`prompt_ids` must be a list of token ids, got null"),
        ("dpo", with_row(5, IDS, rejected_ids=[1, -4]), "`rejected_ids` must be a list of token ids"),
        ("dpo", [{**row, "rejected_ids": [1.5]} for row in IDS], "`rejected_ids` must be a list of token ids"),
        (
            "dpo",
            [{**row, "ref_chosen_logps": "x"} for row in PAIRS],
            "must be a log-probability: finite and at most 0, got",
        ),
        (
            "dpo",
            [{**row, "ref_chosen_logps": [-1.0]} for row in PAIRS],
            "must be a log-probability: finite and at most 0",
        ),
        ("dpo", [{**row, "ref_chosen_logps": True} for row in PAIRS], "got True (bool)"),
        ("dpo", with_row(5, IDS, rejected_ids=[1, None]), "`rejected_ids` must be a list of token ids"),
        ("kto", with_row(5, LABELLED_IDS, label=1), "row 5 (counted from 0): the column `label`"),
        (
            "dpo",
            with_row(5, [{**r, "tools": None} for r in CHATS], tools="[not JSON"),
            "row 5 (counted from 0): the column `tools`",
        ),
        ("dpo", with_row(5, [{**r, "tools": "[]"} for r in CHATS], tools='{"a": 1}'), "must be a list of tools"),
        ("dpo", with_row(5, [{**r, "tools": "[]"} for r in CHATS], tools='["f"]'), "each a mapping"),
        ("dpo", with_row(5, [{**r, "tools": []} for r in CHATS], tools=["f"]), "each a mapping"),
        ("dpo", with_row(5, [{**r, "tools": [{"a": 1}]} for r in CHATS], tools=[None]), "each a mapping"),
        (
            "dpo",
            with_row(5, [{**r, "chat_template_kwargs": {"a": 1}} for r in CHATS], chat_template_kwargs=None),
            "got null",
        ),
        (
            "dpo",
            with_row(5, [{**r, "images": ["x"]} for r in CHATS], images=None),
            "must be a list of images, got null",
        ),
        ("prompts", [{"prompt": "a"}, {"prompt": 3}], "row 1 (counted from 0): the column `prompt`"),
    ],
)
def test_a_row(method, rows, found, tmp_path):
    assert found in refusal(rows, method, tmp_path)


@pytest.mark.parametrize("number", [0, 5])
@pytest.mark.parametrize(
    ("value", "found"),
    [
        (None, "null"), (1, "1 (int)"), (0, "0 (int)"), (2, "2 (int)"), (1.0, "1.0 (float)"), ("True", "'True' (str)"),
        ("yes", "'yes' (str)"), ("", "an empty text"), ([True], "[True] (list)"), ({"a": 1}, "{'a': 1} (dict)"),
    ],
)  # fmt: skip
def test_labels(number, value, found, tmp_path):
    for rows in (with_row(number, LABELLED, label=value), [{**row, "label": value} for row in LABELLED]):
        sentence = refusal(rows, "kto", tmp_path)
        assert f"must be True (preferred) or False, got {found}" in sentence and "dataset.map" in sentence


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), float("-inf"), 0.5])
@pytest.mark.parametrize(
    ("method", "rows", "column"),
    [("dpo", PAIRS, "ref_chosen_logps"), ("dpo", IDS, "ref_rejected_logps"), ("kto", LABELLED, "ref_logps")],
)
def test_reference_log_probabilities(method, rows, column, value, tmp_path):
    for number in (0, 5):
        rows = with_row(number, [{**row, column: -3.5} for row in rows], **{column: value})
        assert f"row {number} (counted from 0): the column `{column}` must be a log-probability" in refusal(
            rows, method, tmp_path
        )


@pytest.mark.parametrize(
    ("column", "right", "wrong"),
    [
        ("weight", [0, 1.5], [-0.1, float("nan"), float("inf"), None]),
        ("preference_probability", [0.5, 0.75, 1], [-0.1, 0.49, 1.01, float("nan"), None]),
        ("preferred_fraction", [0.01, 0.99], [0.0, 1.0, float("nan"), None]),
        ("group", [3, "a"], [None, "", " "]),
        ("annotator", ["a", 3], [None]),
        ("score", [-3, 0.5], [None, float("nan")]),
    ],
)
def test_columns_that_are_declared_as_used(column, right, wrong, tmp_path):
    for value in right:
        for dataset in ways([{**row, column: value} for row in PAIRS], tmp_path):
            check_dataset(dataset, "train_dataset", "dpo", used=(column,))
    for value in wrong:
        rows = with_row(5, [{**row, column: right[-1]} for row in PAIRS], **{column: value})
        assert f"row 5 (counted from 0): the column `{column}` must be" in refusal(
            rows, "dpo", tmp_path, used=(column,)
        )
        check_dataset(Dataset.from_list(without(PAIRS)), "train_dataset", "dpo")
    with pytest.raises(ValueError, match=f"lacks the column {column}"):
        check_dataset(Dataset.from_list(PAIRS), "train_dataset", "dpo", used=(column,))


def test_columns_that_are_read_where_they_are(tmp_path):
    check_dataset(Dataset.from_list(PAIRS), "train_dataset", "dpo", read=("weight",))
    rows = with_row(5, [{**row, "weight": 1.0} for row in PAIRS], weight=-1.0)
    assert "row 5 (counted from 0): the column `weight` must be" in refusal(rows, "dpo", tmp_path, read=("weight",))


def test_columns_that_are_not_declared_as_used_are_not_looked_at():
    rows = [{**row, "weight": -1.0, "group": None} for row in PAIRS]
    check_dataset(Dataset.from_list(rows), "train_dataset", "dpo")


# What is wrong with the columns


@pytest.mark.parametrize(
    ("method", "rows", "found"),
    [
        (
            "dpo",
            without(PAIRS, "rejected"),
            ["lacks the column rejected of a preference data set", "it has chosen, prompt"],
        ),
        ("dpo", [{"prompt": "a", "text": "b"}], ["lacks the columns chosen, rejected of"]),
        ("dpo", LABELLED, ["use `KTOTrainer` (`trl-rdro kto`)"]),
        (
            "dpo",
            [{"Prompt": "a", "Chosen": "b", " rejected": "c"}],
            [".rename_column('Chosen', 'chosen').rename_column(' rejected', 'rejected')"],
        ),
        ("kto", without(LABELLED, "prompt"), ["lacks the column prompt of an unpaired"]),
        ("kto", without(LABELLED, "label"), ["lacks the column label of an unpaired"]),
        ("kto", [{"prompt": "a", "response": "b", "label": True}], ["lacks the column completion of"]),
        ("kto", [{"prompt": "a", "completions": "b", "label": True}], [".rename_column('completions', 'completion')"]),
        ("kto", [{"prompt_ids": [1], "label": True}], ["lacks the column completion_ids of"]),
        ("dpo", [{"prompt_ids": [1], "chosen_ids": [1]}], ["lacks the column rejected_ids of"]),
        ("prompts", [{"question": "a"}], ["lacks the column prompt of a data set of prompts"]),
        ("dpo", [{**row, "chosen.1": "x"} for row in PAIRS], ["has the column `chosen` twice"]),
    ],
)
def test_missing_columns(method, rows, found, tmp_path):
    sentence = refusal(rows, method, tmp_path)
    assert all(text in sentence for text in found)


def test_a_csv_file_with_a_column_twice(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,chosen,chosen,rejected\na,b,c,d\n")
    table = load_dataset("csv", data_files=str(path), cache_dir=str(tmp_path))["train"]
    with pytest.raises(ValueError, match="`train_dataset` has the column `chosen` twice"):
        check_dataset(table, "train_dataset", "dpo")


def test_tokens_where_text_is_needed():
    with pytest.raises(ValueError, match="`test` is tokenised already .`prompt_ids`.: text is needed here"):
        check_dataset(Dataset.from_list(IDS), "test", "dpo", tokenised=False)


def test_empty_data_sets():
    for dataset in (Dataset.from_list(PAIRS), Dataset.from_list(PAIRS).to_iterable_dataset()):
        with pytest.raises(ValueError, match="^`eval_dataset` is empty"):
            check_dataset(dataset.filter(lambda row: False), "eval_dataset", "dpo")


def test_what_is_no_data_set():
    for wrong in (PAIRS, "data.jsonl", iter(PAIRS)):
        with pytest.raises(TypeError, match="`train_dataset` must be a `datasets.Dataset` or `IterableDataset`, got"):
            check_dataset(wrong, "train_dataset", "dpo")
    with pytest.raises(ValueError, match="`labels` must hold rows with named columns, got int"):
        check_rows([3], "labels", "dpo")
    with pytest.raises(ValueError, match="`train_dataset` has the splits train, test: pass one of them"):
        check_dataset({"train": 1, "test": 2}, "train_dataset", "dpo")


# Tables


def test_only_the_rows_that_were_selected_count():
    table = Dataset.from_list(with_row(0, LABELLED, label=None))
    check_dataset(table.select([7, 3, 1]), "train_dataset", "kto")
    with pytest.raises(ValueError, match="row 2 "):
        check_dataset(table.select([2, 1, 0]), "train_dataset", "kto")


def test_a_row_beyond_the_first_batch():
    table = Dataset.from_dict(
        {"prompt": ["a"] * (BATCH + 3), "chosen": ["b"] * (BATCH + 3), "rejected": ["c"] * (BATCH + 2) + [None]}
    )
    for dataset, number in ((table, BATCH + 2), (table.select(range(BATCH + 2, -1, -1)), 0)):
        with pytest.raises(ValueError, match=f"row {number} .counted from 0.: the column `rejected`"):
            check_dataset(dataset, "train_dataset", "dpo")


def test_many_rows_are_looked_at_in_seconds():
    n = 200_000
    table = Dataset.from_dict({"prompt": ["a question"] * n, "completion": ["an answer"] * n, "label": [True] * n})
    start = time.perf_counter()
    check_dataset(table, "train_dataset", "kto")
    check_dataset(table.shuffle(seed=0), "train_dataset", "kto")
    assert (
        time.perf_counter() - start < 20
    )  # 0.4 s on a quiet machine; a loop in Python over dictionaries takes minutes


# Streams


def test_a_stream_goes_on_being_checked_as_it_is_read():
    rows = [*LABELLED * 40, {"prompt": "a", "completion": "b", "label": 2}]
    assert len(rows) > FIRST_ROWS
    stream = check_dataset(IterableDataset.from_generator(lambda: iter(rows)), "train_dataset", "kto")
    read = []
    with pytest.raises(ValueError, match=f"row {len(rows) - 1} .*must be True .preferred. or False, got 2"):
        for row in stream:
            read.append(row)
    assert read == rows[:-1]


def test_a_column_that_only_later_rows_of_a_stream_have():
    rows = [*CHATS, {**CHATS[0], "tools": ""}]
    with pytest.raises(ValueError, match="row 8 .*the column `tools` must be a list of tools"):
        check_dataset(IterableDataset.from_generator(lambda: iter(rows)), "train_dataset", "dpo")


def test_a_stream_is_not_read_to_its_end_before_training():
    def rows():
        for number in range(10 * FIRST_ROWS):
            assert number < 2 * FIRST_ROWS
            yield PAIRS[number % 8]

    check_datasets("dpo", IterableDataset.from_generator(rows), None)


# What is odd


@pytest.fixture
def warnings(caplog):
    def found(rows, method, tmp_path) -> list[str]:
        said = set()
        for dataset in ways(rows, tmp_path):
            caplog.clear()
            with caplog.at_level(logging.WARNING, logger="trl_rdro"):
                check_dataset(dataset, "train_dataset", method)
            said.add(tuple(record.getMessage().removeprefix("[RANK 0] ") for record in caplog.records))
        (messages,) = said
        return list(messages)

    logging.getLogger("trl_rdro").propagate = True
    return found


def test_pairs_of_equal_completions_are_warned_of(warnings, tmp_path):
    for rows in (PAIRS, CHATS):
        rows = with_row(5, with_row(3, rows, rejected=rows[3]["chosen"]), rejected=rows[5]["chosen"])
        (warning,) = warnings(rows, "dpo", tmp_path)
        assert "`chosen` and `rejected` are the same in 2 of 8 rows, the first of them row 3" in warning


def test_blank_completions_are_warned_of_where_they_may_be_right(warnings, tmp_path):
    for method, rows in (
        ("dpo", with_row(5, PAIRS, rejected="")),
        ("dpo", with_row(5, CHATS, rejected=assistant(""))),
        ("kto", with_row(5, LABELLED, completion=" ")),
    ):
        (warning,) = warnings(rows, method, tmp_path)
        assert "has no text in 1 of 8 rows, the first of them row 5" in warning


def test_a_column_without_any_text_is_refused(tmp_path):
    for dataset in ways([{**row, "rejected": " "} for row in PAIRS], tmp_path):
        with pytest.raises(ValueError, match="the column `rejected` has no text in any row"):
            check_dataset(dataset, "train_dataset", "dpo")


def test_prompts_that_are_repeated_are_warned_of(warnings, tmp_path):
    for rows in (PAIRS, CHATS):
        repeated = [{**row, "chosen": row["prompt"] + row["chosen"]} for row in rows]
        (warning,) = warnings(repeated, "dpo", tmp_path)
        assert "`chosen` begins with the prompt" in warning
        assert warnings(with_row(0, rows, chosen=repeated[0]["chosen"]), "dpo", tmp_path) == []  # one may quote it
