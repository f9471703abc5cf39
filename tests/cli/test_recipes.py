"""`trl-rdro recipes`: the list says what the files say, and a copy runs from where it lies."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from trl_rdro.cli import main
from trl_rdro.cli.recipes import table as table_of
from trl_rdro.quickstart import QUICKSTART_DIR
from trl_rdro.tools import recipes

from ..helpers import ROOT, refusal


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A package with three recipes and an accelerate config of its own."""
    files = {
        "quick.yaml": "# A first run on a small model.\n# Second line.\nloss_type: rdro\nuse_peft: true\n"
        "dataset_name: trl_rdro/data/quickstart\n",
        "qwen-7b/rdro_qlora.yaml": "# RDRO on eight GPUs: a summary\n# method: kto\n# gpus: 8\n"
        "# Launch: trl-rdro kto --config recipes/qwen-7b/rdro_qlora.yaml --accelerate_config "
        "recipes/accelerate/zero9.yaml\n"
        "model_name_or_path: Qwen/Qwen-7B\nloss_type: [rdro, sft]\nuse_peft: true\nload_in_4bit: true\n",
        "llama-8b/rdro_qlora.yaml": "# The same on Llama\n# Launch: accelerate launch scripts/dpo.py --config X\n"
        "model_name_or_path: Llama-8B\nloss_type: rdro\n",
        "accelerate/zero9.yaml": "# ZeRO-9, which does not exist\nnum_processes: 8\n",
    }
    for name, text in files.items():
        path = tmp_path / "package" / "recipes" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(recipes, "PACKAGE", tmp_path / "package")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "package" / "recipes"


def test_list_says_what_the_files_say(library):
    found = {recipe.name: recipe for recipe in recipes.list_recipes()}
    assert list(found) == ["llama-8b/rdro_qlora", "quick", "qwen-7b/rdro_qlora", "accelerate/zero9"]
    qwen = found["qwen-7b/rdro_qlora"]
    assert (qwen.model, qwen.loss, qwen.method, qwen.command, qwen.gpus, qwen.summary) == (
        "Qwen/Qwen-7B",
        "rdro+sft",
        "qlora",
        "kto",
        "8",
        "RDRO on eight GPUs: a summary",
    )
    assert (found["quick"].model, found["quick"].method, found["quick"].command) == ("any", "lora", "")
    assert (found["llama-8b/rdro_qlora"].method, found["llama-8b/rdro_qlora"].command) == ("full", "dpo")
    assert found["quick"].summary == "A first run on a small model"


def test_list_is_a_line_each(library, capsys, monkeypatch):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.endswith("ZeRO-9, which does not exist") for line in lines)
    assert [line.split()[0] for line in lines if line and not line.startswith(("name", "for --"))] == [
        "llama-8b/rdro_qlora",
        "quick",
        "qwen-7b/rdro_qlora",
        "accelerate/zero9",
    ]
    monkeypatch.setenv("COLUMNS", "96")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    table = table_of(recipes.list_recipes()).splitlines()
    assert max(map(len, table)) <= 96 and len(table) == len(lines)


def test_the_packages_own_recipes_can_be_listed():
    found = {recipe.name: recipe for recipe in recipes.list_recipes()}
    assert found["quickstart"].loss == "rdro" and found["quickstart"].command == "dpo"
    assert found["iterate"].loss == "cdpo" and found["iterate"].command == "iterate"
    assert all(recipe.summary for recipe in found.values())


def test_copy_refers_to_installed_files_and_to_itself(library, tmp_path, capsys):
    assert main(["recipes", "--copy", "qwen-7b/rdro_qlora"]) == 0
    assert capsys.readouterr().out.strip() == "rdro_qlora.yaml"
    text = (tmp_path / "rdro_qlora.yaml").read_text()
    assert "--config rdro_qlora.yaml" in text
    assert f"--accelerate_config {library / 'accelerate' / 'zero9.yaml'}" in text
    assert main(["recipes", "--copy", "quick", "--to", "new/folder"]) == 0
    assert yaml.safe_load((tmp_path / "new" / "folder" / "quick.yaml").read_text())["dataset_name"] == QUICKSTART_DIR
    assert main(["recipes", "--copy", "qwen-7b/rdro_qlora", "--to", "new/folder"]) == 0
    copied = tmp_path / "new" / "folder" / "rdro_qlora.yaml"
    assert f"--config {copied} " in copied.read_text()  # wherever it is started from


def test_copy_of_the_loops_recipe_finds_its_prompts(tmp_path):
    assert main(["recipes", "--copy", "iterate", "--to", str(tmp_path)]) == 0
    prompts = Path(yaml.safe_load((tmp_path / "iterate.yaml").read_text())["dataset_name"])
    assert prompts.is_absolute() and (prompts / "train.jsonl").is_file()


@pytest.mark.parametrize("name", ["recipes/accelerate/zero9.yaml", "accelerate/zero9", "zero9"])
def test_names_may_be_paths_or_their_last_part(library, name):
    assert recipes.find(name).name == "accelerate/zero9"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--copy", "quik"], ["quik", "did you mean quick"]),
        (["--copy", "zzzzzzzz"], ["zzzzzzzz", "trl-rdro recipes"]),
        (["--copy", "rdro_qlora"], ["several", "llama-8b/rdro_qlora", "qwen-7b/rdro_qlora"]),
        (["--copy", "quick", "--to", "there"], ["there/quick.yaml", "exists already"]),
        (["--copy", "quick", "--to", "there/quick.yaml"], ["there/quick.yaml"]),
        (["--to", "there"], ["--copy"]),
    ],
)
def test_refusals(library, tmp_path, capsys, argv, words):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "quick.yaml").write_text("mine: true\n")
    message = refusal(capsys, main(["recipes", *argv]))
    for word in words:
        assert word in message
    assert (tmp_path / "there" / "quick.yaml").read_text() == "mine: true\n"


def test_a_broken_recipe_is_named(library, capsys):
    (library / "broken.yaml").write_text("# Broken\na: [1\n")
    assert "broken.yaml" in refusal(capsys, main(["recipes"]))


def test_a_wheel_brings_the_recipes():
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["force-include"] == {"recipes": "trl_rdro/recipes"}


def test_listing_needs_no_torch():
    code = "import sys; from trl_rdro.cli import main; main(['recipes']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT).returncode == 0
