"""What `make test-versions` has run is what pyproject.toml promises and docs/compatibility.md says."""

import importlib.util
import json
import tomllib
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet


ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("test_versions_script", ROOT / "scripts" / "test_versions.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tested():
    return json.loads((ROOT / "docs" / "versions.json").read_text())


def test_the_lower_bounds_are_what_was_tested(script, tested):
    for package, bound in script.lower_bounds().items():
        assert SpecifierSet(f"=={bound}").contains(tested["oldest"]["versions"][package]), "run make test-versions"
    for entry in tested.values():
        for package, specifier in script.declared().items():
            assert SpecifierSet(specifier).contains(entry["versions"][package]), "run make test-versions"


def test_the_python_classifiers_are_what_was_tested(tested):
    """From the oldest to the newest, which are the two that were run."""
    prefix = "Programming Language :: Python :: 3."
    minors = [int(text.removeprefix(prefix)) for text in PROJECT["classifiers"] if text.startswith(prefix)]
    oldest, newest = (int(tested[name]["versions"]["python"].split(".")[1]) for name in ("oldest", "newest"))
    assert minors == list(range(oldest, newest + 1))
    assert PROJECT["requires-python"] == f">=3.{oldest}"


def test_the_document_has_the_table(script, tested):
    text = (ROOT / "docs" / "compatibility.md").read_text()
    assert f"<!-- versions -->\n{script.table(tested)}\n<!-- /versions -->" in text, (
        "run python scripts/test_versions.py --table"
    )
