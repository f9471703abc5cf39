"""The sdist and the wheel: built offline from the working tree, looked at, and the wheel built from the sdist."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

import trl_rdro


ROOT = Path(__file__).parents[1]


def build(directory: Path, target: str, out: Path) -> Path:
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", target, "-d", out], cwd=directory, check=True)
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """The unpacked sdist."""
    archive = build(ROOT, "sdist", tmp_path_factory.mktemp("sdist"))
    with tarfile.open(archive) as tar:
        tar.extractall(archive.parent, filter="data")
    return archive.parent / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> zipfile.ZipFile:
    """Built from the sdist, as an installation from there does it."""
    return zipfile.ZipFile(build(sdist, "wheel", tmp_path_factory.mktemp("wheel")))


def below(directory: Path, *names: str) -> set[str]:
    """The files below `names`, relative to `directory`, less what running Python leaves there."""
    files = (file for name in names for file in (directory / name).rglob("*") if file.is_file())
    return {str(file.relative_to(directory)) for file in files if "__pycache__" not in file.parts}


def test_the_sdist_is_the_repository(sdist):
    """Documents, scripts and recipes too: the tests read them."""
    for folder in ("trl_rdro", "tests", "docs", "recipes", "scripts", ".ci", ".github"):
        here = below(ROOT, folder)
        if (ROOT / ".git").exists():  # less what git ignores
            listed = subprocess.run(["git", "ls-files", "-z", folder], cwd=ROOT, capture_output=True, text=True)
            here = set(listed.stdout.split("\0")) & here
        missing = here - below(sdist, folder)
        assert here and not missing, f"not in the sdist: {sorted(missing)}"
    for name in ("Makefile", "CHANGELOG.md", "README.md", "CONTRIBUTING.md", "LICENSE", "pyproject.toml"):
        assert (sdist / name).is_file(), name


def test_nothing_stray_lies_beside_the_package(sdist):
    """A run folder at the top level would be committed, and distributed with its model."""
    folders = {".ci", ".github", "docs", "recipes", "scripts", "tests", "trl_rdro"}
    files = {
        ".gitignore",
        ".pre-commit-config.yaml",
        "Makefile",
        "PKG-INFO",
        "hatch_build.py",
        "llms.txt",
        "mkdocs.yml",
    }
    files |= {"CITATION.cff", "LICENSE", "pyproject.toml"}
    files |= {f"{name}.md" for name in ("CHANGELOG", "CONTRIBUTING", "README", "SECURITY", "SKILL")}
    assert {path.name for path in sdist.iterdir()} == folders | files


def test_the_wheel_is_the_package_and_the_recipes(sdist, wheel):
    expected = below(sdist, "trl_rdro") | {f"trl_rdro/{name}" for name in below(sdist, "recipes")}
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == expected
    assert {"trl_rdro/py.typed", "trl_rdro/recipes/quickstart.yaml"} <= expected


def test_the_description_links_to_the_repository(wheel):
    metadata = message_from_bytes(wheel.read(next(name for name in wheel.namelist() if name.endswith("/METADATA"))))
    repository = metadata["Project-URL"].split(", ")[1]
    text = metadata.get_payload(decode=True).decode()
    assert f"({repository}/raw/HEAD/docs/images/" in text
    assert f"({repository}/blob/HEAD/docs/losses.md)" in text
    readme = (ROOT / "README.md").read_text()
    # Nothing but links changed, and each one leads to something
    assert text.replace(f"{repository}/raw/HEAD/", "").replace(f"{repository}/blob/HEAD/", "") == readme
    for part in text.split("](")[1:]:
        target = part.split(")")[0]
        assert target.startswith(("https://", "#")), target
        if target.startswith(repository):
            assert (ROOT / target.split("/HEAD/")[1].split("#")[0]).exists(), target


def test_citation_and_changelog_are_of_this_version():
    assert f"\nversion: {trl_rdro.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## [{trl_rdro.__version__}]\n" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.slow
def test_the_wheel_works_in_an_environment_of_its_own(wheel, tmp_path):
    """Its dependencies are those of this environment, behind its own directory on the path; this checkout is not."""
    environment = tmp_path / "environment"
    venv.create(environment)
    python = environment / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", wheel.filename], check=True)
    (site_packages,) = environment.glob("lib/python*/site-packages")
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def output(*command) -> str:
        clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(list(map(str, command)), cwd=tmp_path, env=clean, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    command = environment / "bin" / "trl-rdro"
    assert output(command, "--version") == f"trl-rdro {trl_rdro.__version__}\n"
    assert "qwen2.5-7b/rdro_qlora" in output(command, "recipes")
    assert output(command, "recipes", "--copy", "quickstart") == "quickstart.yaml\n"
    code = "import trl_rdro; from trl_rdro import DPOTrainer, KTOTrainer; print(trl_rdro.__file__)"
    assert Path(output(python, "-c", code).strip()).is_relative_to(site_packages)
    requirements = subprocess.run([*pip, "check"], capture_output=True, text=True).stdout
    assert "trl-rdro " not in requirements


@pytest.mark.slow
def test_the_sdists_own_tests_pass(sdist):
    tests = ["tests/losses/test_rdro.py", "tests/cli/test_recipes.py"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
        cwd=sdist,
        env={**os.environ, "PYTHONPATH": str(sdist)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:]


def test_the_package_index_would_take_them(sdist, wheel):
    pytest.importorskip("twine")
    archives = [str(sdist) + ".tar.gz", wheel.filename]
    done = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", *archives], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_the_repository_stands_in_one_place(sdist):
    """Only its address in pyproject.toml is to be changed when the repository moves."""
    repository = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"].encode()
    files = [path.name for path in sdist.rglob("*") if path.is_file() and repository in path.read_bytes()]
    assert sorted(files) == ["PKG-INFO", "pyproject.toml"]
