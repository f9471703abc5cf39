"""The notebook runs from top to bottom, with its tiny model."""

import json

import pytest

from .documents import ROOT
from .helpers import is_png


NOTEBOOK = json.loads((ROOT / "docs" / "first-run.ipynb").read_text())


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "notebook"}
    for cell in NOTEBOOK["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed if "±" in line] == ["rdro", "sigmoid"]
    assert is_png(tmp_path / "build" / "notebook-rdro" / "curves.png")


def test_it_is_stored_without_output():
    code = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    assert code and not any(cell["outputs"] or cell["execution_count"] for cell in code)
