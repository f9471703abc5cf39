"""
Rows drawn at random: what the checks accept, TRL can prepare and collate; what they refuse, they refuse in a sentence;
and a table, a stream and a list of the same rows get the same verdict.
"""

from types import SimpleNamespace

import pyarrow as pa
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from trl_rdro.checks.datasets import check_dataset, check_rows
from trl_rdro.compat.trl import prepare_dataset

from ..fuzz import fuzz
from ..tiny import tiny_tokenizer


TOKENIZER = tiny_tokenizer()
ARGS = SimpleNamespace(max_length=None, truncation_mode="keep_start", dataset_num_proc=None, pad_to_multiple_of=None)
texts = st.sampled_from(["", " ", "a", "a b", "a c", "b ", "\n", "é<|im_end|>", "\u2028"])
dicts = st.sampled_from([{}, {"a": 1}])
odd = st.one_of(st.none(), st.booleans(), st.integers(-2, 3), st.floats(), st.lists(texts, max_size=2), dicts)
roles = st.one_of(st.sampled_from(["user", "assistant", "system", "tool", "human", "User", ""]), odd)
part = st.sampled_from([{"type": "text", "text": "a"}, {"type": "text"}, {"text": "a"}, {}, "a"])
parts = st.lists(part, max_size=2)
messages = st.one_of(
    st.fixed_dictionaries({"role": roles, "content": st.one_of(texts, texts, odd, parts)}),
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": texts}),
    st.sampled_from([{"from": "human", "value": "a"}, {"role": "user"}, {"content": "a"}, {}, None, "a", 3]),
    st.just({"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "f"}}]}),
)
conversations = st.one_of(
    st.lists(messages, max_size=3),
    texts.map(lambda text: [{"role": "user", "content": text}]),
    texts.map(lambda text: [{"role": "assistant", "content": text}]),
    texts.map(lambda text: [{"role": "user", "content": "q"}, {"role": "assistant", "content": text}]),
)
values = st.one_of(texts, texts, conversations, conversations, odd)


def rows_of(*columns: str, label=None):
    """Rows of which most share their form, as a data set's do, and some do not."""
    prompts = texts.map(lambda text: [{"role": "user", "content": text}])
    answers = texts.map(lambda text: [{"role": "assistant", "content": text}])
    plain = dict.fromkeys(columns, texts)
    chats = {column: prompts if column == "prompt" else answers for column in columns}
    wild = dict.fromkeys(columns, values)
    labels, right = ({}, {}) if label is None else ({"label": label}, {"label": st.booleans()})
    extra = {
        "tools": st.one_of(
            st.none(), texts, st.sampled_from(["[]", [""], [{"type": "function"}], [None], "[1]"]), odd
        ),
        "ref_logps": st.one_of(st.floats(), odd),
    }
    kinds = [
        st.fixed_dictionaries({**plain, **right}),
        st.fixed_dictionaries({**chats, **right}),
        st.fixed_dictionaries({**plain, **labels}, optional=extra),
        st.fixed_dictionaries({**chats, **labels}, optional=extra),
        st.fixed_dictionaries({**wild, **labels}, optional=extra),
        st.fixed_dictionaries({}, optional={**wild, **labels, **extra}),
    ]
    one_kind = st.sampled_from(kinds).flatmap(lambda kind: st.lists(kind, min_size=1, max_size=4))
    return st.one_of(one_kind, one_kind, st.lists(st.one_of(kinds), min_size=1, max_size=4))


data = st.one_of(
    st.tuples(st.just("dpo"), rows_of("prompt", "chosen", "rejected")),
    st.tuples(st.just("dpo"), rows_of("chosen", "rejected")),
    st.tuples(st.just("kto"), rows_of("prompt", "completion", label=st.one_of(st.booleans(), odd, texts))),
    st.tuples(st.just("kto"), rows_of("prompt", "chosen", "rejected")),
)


def verdict(check) -> str | None:
    """The sentence with which a check refuses; any other exception is a failure."""
    try:
        check()
    except ValueError as error:
        sentence = str(error)
        assert sentence.startswith("`train_dataset`") and "\n" not in sentence and sentence.endswith((".", "`."))
        return sentence
    return None


class Rows(list):
    """What TRL's preparation asks of a data set, without the files and hashes of a real one, which take a second."""

    @property
    def column_names(self):
        return list(self[0])

    def map(self, function, fn_kwargs=None, batched=False, **_):
        if batched:
            columns = function({key: [row[key] for row in self] for key in self[0]}, **(fn_kwargs or {}))
            return Rows({key: value[i] for key, value in columns.items()} for i in range(len(columns["label"])))
        return Rows({**row, **function(dict(row), **(fn_kwargs or {}))} for row in self)


@fuzz(300)
@given(data)
def test_accepted_rows_can_be_prepared(drawn):
    method, rows = drawn
    if verdict(lambda: check_rows(rows, "train_dataset", method)) is not None:
        return
    prepared, collator = prepare_dataset(method, Rows(map(dict, rows)), TOKENIZER, ARGS)
    batch = collator([dict(row) for row in prepared])
    assert batch["completion_mask"].sum(dim=1).min() > 0


@fuzz(300)
@given(data)
def test_tables_streams_and_lists_get_the_same_verdict(drawn):
    method, rows = drawn
    try:
        table = Dataset.from_list(rows)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError, TypeError):
        return  # a table cannot hold them
    if not len(table):  # rows without columns
        return
    rows = table.to_list()  # with the columns and keys that a table fills with nulls
    expected = verdict(lambda: check_rows(rows, "train_dataset", method))
    assert verdict(lambda: check_dataset(table, "train_dataset", method)) == expected
    stream = table.to_iterable_dataset()
    assert verdict(lambda: list(check_dataset(stream, "train_dataset", method))) == expected


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_the_strategies_reach_both_verdicts(method):
    """The two tests above would say nothing if all rows were refused, or none."""
    found = set()

    @fuzz(200)
    @given(data.filter(lambda drawn: drawn[0] == method))
    def look(drawn):
        found.add(verdict(lambda: check_rows(drawn[1], "train_dataset", method)) is None)

    look()
    assert found == {True, False}
