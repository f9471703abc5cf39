"""The tables of the documents are what `scripts/docs.py` makes of what they tell of."""

import inspect
import re

import pytest
from trl.trainer import dpo_trainer

import docs


@pytest.mark.parametrize("name", docs.DOCUMENTS)
def test_a_document_is_up_to_date(name):
    if name == docs.OPTIONS and docs.read_table()["versions"] != docs.installed_versions():
        pytest.skip("the options are of other releases")
    assert (docs.ROOT / name).read_text() == docs.written(name), "run python scripts/docs.py"


def test_a_table_goes_between_its_marks_and_nowhere_else():
    text = "before\n<!-- a -->\nold\nolder\n<!-- /a -->\nbetween\n<!-- b -->\n<!-- /b -->\nafter\n"
    assert docs.filled(text, {"a": "new\n", "b": r"\1"}) == (
        "before\n<!-- a -->\nnew\n<!-- /a -->\nbetween\n<!-- b -->\n\\1\n<!-- /b -->\nafter\n"
    )
    with pytest.raises(SystemExit, match="page.md has no <!-- c --> ... <!-- /c -->"):
        docs.filled(text, {"c": ""}, "page.md")


def test_every_mark_has_its_table():
    for name, tables in docs.TABLES.items():
        assert set(re.findall(r"^<!-- (\w+) -->$", (docs.ROOT / name).read_text(), re.MULTILINE)) == set(tables), name


def test_what_is_out_of_date_is_named_and_written(monkeypatch, capsys, tmp_path):
    document = tmp_path / "docs" / "compatibility.md"
    document.parent.mkdir()
    document.write_text("<!-- refused -->\nold\n<!-- /refused -->\n")
    monkeypatch.setattr(docs, "ROOT", tmp_path)
    monkeypatch.setattr(docs, "DOCUMENTS", ["docs/compatibility.md"])
    monkeypatch.setattr(docs, "TABLES", {"docs/compatibility.md": {"refused": docs.refused_table}})
    for argv, code, said in ((["--check"], 1, "out of date"), ([], 0, "written anew"), (["--check"], 0, "")):
        monkeypatch.setattr("sys.argv", ["docs.py", *argv])
        assert docs.main() == code and said in capsys.readouterr().out
    assert docs.refused_table() in document.read_text()


# docs/compatibility.md


def test_tests_that_are_named_exist():
    text = (docs.ROOT / "docs" / "compatibility.md").read_text()
    named = set(re.findall(r"`(test_\w+)(?:\[[^`]*\])?`", text))
    assert named and named <= {name.partition("[")[0] for name in docs.engine_tests()}


@pytest.mark.parametrize(("what", "package", "words"), [(row[0], *row[2:]) for row in docs.REFUSED])
def test_a_refusal_says_so(what, package, words):
    if package == "trl_rdro":
        sources = [path.read_text() for path in (docs.ROOT / "trl_rdro").rglob("*.py")]
    else:
        sources = [inspect.getsource(dpo_trainer)]
    # Messages are broken over lines
    assert any(words in re.sub(r'"\s*\n\s*f?"', "", source) for source in sources), f"nobody says it of {what}"
