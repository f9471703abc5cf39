"""What pyproject.toml promises is what `make test-versions` has run."""

import json
import tomllib
from pathlib import Path

import pytest
import test_versions
from packaging.specifiers import SpecifierSet


ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def tested():
    return json.loads((ROOT / "docs" / "versions.json").read_text())


def test_the_lower_bounds_are_what_was_tested(tested):
    for package, bound in test_versions.lower_bounds().items():
        assert SpecifierSet(f"=={bound}").contains(tested["oldest"]["versions"][package]), "run make test-versions"
    for entry in tested.values():
        for package, specifier in test_versions.declared().items():
            assert SpecifierSet(specifier).contains(entry["versions"][package]), "run make test-versions"


def test_the_python_classifiers_are_what_was_tested(tested):
    """From the oldest to the newest, which are the two that were run."""
    prefix = "Programming Language :: Python :: 3."
    minors = [int(text.removeprefix(prefix)) for text in PROJECT["classifiers"] if text.startswith(prefix)]
    oldest, newest = (int(tested[name]["versions"]["python"].split(".")[1]) for name in ("oldest", "newest"))
    assert minors == list(range(oldest, newest + 1))
    assert PROJECT["requires-python"] == f">=3.{oldest}"
