"""SKILL.md and the first run of README.md do what they say, in their order, with a tiny model on a CPU."""

import json
import shutil

import pytest
import yaml

from trl_rdro.cli import launch, main, train
from trl_rdro.configs.loss_names import LOSSES_OF

from .documents import ROOT, blocks, commands
from .helpers import is_png
from .tiny import save_tiny


SKILL = ROOT / "SKILL.md"
MODEL = "Qwen/Qwen2.5-0.5B-Instruct"
WITHOUT_A_GPU = ["--use_cpu", "--bf16", "false"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run commands in a directory with the quickstart data, in this process, which has imported everything."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "trl_rdro" / "data" / "quickstart", tmp_path / "trl_rdro" / "data" / "quickstart")
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    monkeypatch.setattr(launch, "launch_module", lambda module, argv, flags: train.main(argv[0], argv[1:]))
    model = save_tiny(tmp_path)

    def run(lines: list[list[str]], name: str, extra: list[str]) -> None:
        for argv in lines:
            argv = [word.replace(name, model) for word in argv]
            assert main([*argv, *(extra if argv[0] == "dpo" else [])]) == 0, argv

    return run


@pytest.mark.slow
def test_its_commands_run_in_their_order(run, tmp_path):
    (settings,) = blocks(SKILL, "yaml")
    (tmp_path / "run.yaml").write_text(settings.replace(MODEL, str(tmp_path / "qwen2")))
    run(commands(SKILL), MODEL, WITHOUT_A_GPU)
    assert {argv[0] for argv in commands(SKILL)} == {"recipes", "inspect", "estimate", "dpo", "score", "plot"}
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["overall"]["n"] == 64 and 0 <= scores["overall"]["accuracy"]["mean"] <= 1
    assert is_png(tmp_path / "curves.png")


@pytest.mark.slow
def test_the_readmes_first_run(run, tmp_path):
    lines = [argv for argv in commands(ROOT / "README.md") if any(word.startswith("runs/") for word in argv)][:5]
    assert [argv[0] for argv in lines] == ["dpo", "dpo", "score", "score", "plot"]
    run(lines, "build/SmolLM2-135M-Instruct", ["--max_steps", "2"])
    assert is_png(tmp_path / "runs" / "curves.png")


def test_its_head_is_what_agents_read():
    head = yaml.safe_load(SKILL.read_text().split("---")[1])
    assert head["name"] == "trl-rdro" and len(head["description"]) < 1024


def test_the_losses_it_names_exist():
    rows = [line for line in SKILL.read_text().splitlines() if line.endswith(("| `dpo` |", "| `kto` |"))]
    for row in rows:
        loss, command = row.split("|")[2:4]
        named = [word for word in loss.split("`")[1::2] if ":" not in word]
        assert named and {*named} <= {*LOSSES_OF[command.strip(" `")]}, row


def test_every_document_is_in_llms_txt():
    text = (ROOT / "llms.txt").read_text()
    missing = [path.name for path in (ROOT / "docs").glob("*.md") if f"(docs/{path.name})" not in text]
    assert not missing
