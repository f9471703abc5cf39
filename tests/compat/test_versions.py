"""What the package needs: declared in pyproject.toml, and said in a sentence where another release is installed."""

import ast
import os
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from trl_rdro.compat.versions import SUPPORTED


ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIRED = {canonicalize_name(r.name): r.specifier for r in map(Requirement, PROJECT["dependencies"])}
OPTIONAL = {
    canonicalize_name(Requirement(r).name) for extra in PROJECT["optional-dependencies"].values() for r in extra
}
# Said in docs/iterate.md: no release of it can be installed beside the supported transformers
UNDECLARED = {"vllm"}
# Modules that only draw import it at their top, and are imported where something is drawn
DRAWING = {"matplotlib"}


def imports(tree: ast.AST, nested: bool = False):
    """The top-level names that a module imports from outside the package, and whether inside a function."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], nested) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0], nested
        else:
            yield from imports(node, nested or isinstance(node, ast.FunctionDef))


def imported_distributions() -> dict[str, bool]:
    """Each distribution that the package imports, and whether only inside functions."""
    distributions = packages_distributions()
    found: dict[str, bool] = {}
    for path in (ROOT / "trl_rdro").rglob("*.py"):
        for module, nested in imports(ast.parse(path.read_text())):
            if module not in {*sys.stdlib_module_names, "trl_rdro"}:
                name = canonicalize_name(distributions.get(module, [module])[0])
                found[name] = found.get(name, True) and nested
    return found


def test_what_is_imported_is_declared():
    found = imported_distributions()
    assert {"torch", "trl", "transformers", "pyyaml"} <= found.keys()
    undeclared = found.keys() - REQUIRED.keys() - OPTIONAL - UNDECLARED
    assert not undeclared, f"imported by trl_rdro and not declared in pyproject.toml: {sorted(undeclared)}"
    optional = {name for name, nested in found.items() if not nested} - REQUIRED.keys() - DRAWING
    assert not optional, f"imported at the top of a module, so needed by everybody: {sorted(optional)}"
    assert not REQUIRED.keys() - found.keys(), "declared in pyproject.toml and not imported by trl_rdro"


def test_supported_versions_are_the_declared_ones():
    assert {name: SpecifierSet(text) for name, text in SUPPORTED.items()} == {
        name: REQUIRED[name] for name in SUPPORTED
    }


@pytest.mark.parametrize(
    ("package", "version"),
    [
        ("trl", "1.15.0"),
        ("trl", "1.17.0.dev0"),
        ("trl", "2.0.0"),
        ("transformers", "5.22.2"),
        ("transformers", "6.0.0"),
    ],
)
def test_another_version_is_named_in_one_sentence(package, version, tmp_path):
    """The distribution on the path is a stand-in whose version is real to Python and whose code has none of TRL's."""
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").touch()
    info = tmp_path / f"{package}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    run = subprocess.run(
        [sys.executable, "-c", "from trl_rdro import DPOConfig"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    assert run.stderr.strip().splitlines()[-1] == (
        f"ImportError: trl_rdro works with {package}{SUPPORTED[package]}, and {package} {version} is installed: "
        f"pip install '{package}{SUPPORTED[package]}'."
    )
