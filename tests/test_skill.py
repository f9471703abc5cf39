"""SKILL.md does what it says: its file and its commands, in their order, with a tiny model on a CPU."""

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


@pytest.mark.slow
def test_its_commands_run_in_their_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = save_tiny(tmp_path)
    shutil.copytree(ROOT / "trl_rdro" / "data" / "quickstart", tmp_path / "trl_rdro" / "data" / "quickstart")
    (settings,) = blocks(SKILL, "yaml")
    (tmp_path / "run.yaml").write_text(settings.replace(MODEL, model))
    # In this process, which has imported everything
    monkeypatch.setattr(launch, "launch_module", lambda module, argv, flags: train.main(argv[0], argv[1:]))
    for argv in commands(SKILL):
        argv = [word.replace(MODEL, model) for word in argv]
        assert main([*argv, *(WITHOUT_A_GPU if argv[0] == "dpo" else [])]) == 0, argv
    assert {argv[0] for argv in commands(SKILL)} == {"recipes", "inspect", "estimate", "dpo", "score", "plot"}
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["overall"]["n"] == 64 and 0 <= scores["overall"]["accuracy"]["mean"] <= 1
    assert is_png(tmp_path / "curves.png")


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
