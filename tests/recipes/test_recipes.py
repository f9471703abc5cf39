"""
Every recipe, as it is, through the real command line.

First strictly parsed, with the accelerate config that its header names. Then two steps with a tiny model of the same
architecture and a file of the same columns: in this process for the recipes of one GPU, and under `trl-rdro` with two
processes for the others. The loss of the first step must be the method's constant for policy = reference. What is
changed for that is in the three lists of `worker.py`, each with its reason, and nowhere else.
"""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from filelock import FileLock

from trl_rdro.cli import launch, main, train
from trl_rdro.tools.recipes import read_header

from ..helpers import ROOT, free_port, run_process
from ..loss_cases import LOSS_CASES
from ..tiny import save_tiny, tiny_preferences
from .worker import LAUNCH_OVERRIDES, OVERRIDES, run


RECIPES = sorted(path for path in (ROOT / "recipes").glob("*/*.yaml") if path.parent.name != "accelerate")
NAMES = [str(path.relative_to(ROOT / "recipes").with_suffix("")) for path in RECIPES]


def recipe(name: str) -> tuple[Path, dict[str, str], dict]:
    path = ROOT / "recipes" / f"{name}.yaml"
    return path, read_header(path), yaml.safe_load(path.read_text())


def training_argv(path: Path, **values: str) -> list[str]:
    argv = ["--config", str(path)]
    for key, (value, _) in OVERRIDES.items():
        argv += [f"--{key}", value.format(**values)]
    return argv


def launch_argv(header: dict[str, str]) -> list[str]:
    config = header["accelerate"]
    argv = ["--accelerate_config", str(ROOT / config) if config.endswith(".yaml") else config]
    for key, (value, _) in LAUNCH_OVERRIDES.items():
        argv += [f"--{key}", value.format(port=free_port())]
    return argv


# Data sets of the recipes: columns as on the hub, in a directory of a training and a test file


def _messages(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def pairs_with_prompt(n: int) -> list[dict]:
    """As `prepare_best_vs_worst.py` writes them."""
    return [
        {
            "prompt": [_messages("user", row["prompt"])],
            "chosen": [_messages("assistant", row["chosen"])],
            "rejected": [_messages("assistant", row["rejected"])],
            "score_chosen": 4.0,
            "score_rejected": 1.0,
        }
        for row in tiny_preferences(n)
    ]


def pairs_without_prompt(n: int) -> list[dict]:
    """As trl-lib/ultrafeedback_binarized: the prompt is the common beginning."""
    return [
        {
            "chosen": row["prompt"] + row["chosen"],
            "rejected": row["prompt"] + row["rejected"],
            "score_chosen": row["score_chosen"],
            "score_rejected": row["score_rejected"],
        }
        for row in pairs_with_prompt(n)
    ]


def pairs_with_soft_labels(n: int) -> list[dict]:
    """As `prepare_best_vs_worst.py --soft_labels` writes them."""
    return [{**row, "preference_probability": 0.6 + 0.4 * (i % 2)} for i, row in enumerate(pairs_with_prompt(n))]


def pairs_with_groups(n: int) -> list[dict]:
    """As `quickstart_groups.py` writes them. Groups of one size start with equal weights."""
    return [{**row, "group": ("film", "tweet")[i % 2]} for i, row in enumerate(tiny_preferences(n))]


def completions(n: int) -> list[dict]:
    """As trl-lib/kto-mix-14k and UF-G; 39 % are preferred."""
    rows = []
    for i, row in enumerate(pairs_with_prompt(n)):
        label = i % 100 < 39
        rows.append({"prompt": row["prompt"], "completion": row["chosen" if label else "rejected"], "label": label})
    return rows


SCHEMAS = {
    "data/helpsteer2": pairs_with_prompt,
    "data/hs2-soft": pairs_with_soft_labels,
    "data/quickstart-groups": pairs_with_groups,
    "trl-lib/ultrafeedback_binarized": pairs_without_prompt,
    "trl-lib/ultrafeedback-gpt-3.5-turbo-helpfulness": completions,
    "trl-lib/kto-mix-14k": completions,
}


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """The `{model}` and `{data}` of a recipe."""
    root = tmp_path_factory.mktemp("stand-ins")
    # On a CPU bitsandbytes wants whole blocks of 64 weights in a row
    models = {kind: save_tiny(root, kind, hidden_size=64, intermediate_size=128) for kind in ("qwen2", "llama")}
    for name, schema in SCHEMAS.items():
        for split, n in (("train", 256), ("test", 16)):
            path = root / name / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            Dataset.from_list(schema(n)).to_json(path)

    def values(name: str) -> dict[str, str]:
        _, _, settings = recipe(name)
        kind = "llama" if "llama" in settings["model_name_or_path"].lower() else "qwen2"
        return {"model": models[kind], "data": str(root / settings["dataset_name"])}

    return values


# Strict parsing


@pytest.mark.parametrize("name", NAMES)
def test_recipe_is_strictly_valid_and_means_what_its_header_says(name, monkeypatch):
    path, header, settings = recipe(name)
    assert header["method"] in ("dpo", "kto") and int(header["gpus"]) >= 1
    (script_args, args, model_args, _), flags, unused = train.parse(
        header["method"], ["--config", str(path), "--use_cpu", "true"]
    )
    assert not flags and not unused
    loss, _, kind = path.stem.partition("_")
    assert args.loss_type in (loss, [loss])
    assert kind == ("full" if not model_args.use_peft else "qlora" if model_args.load_in_4bit else "lora")
    assert model_args.load_in_4bit == (kind == "qlora")
    assert args.precompute_ref_log_probs or header["accelerate"] in ("single_gpu", "multi_gpu")
    assert Path(args.output_dir).name.startswith(path.parent.name)
    # The launch line gives the accelerate config of the header, which exists
    text = path.read_text()
    command = f"trl-rdro {header['method']} --config recipes/{name}.yaml --accelerate_config {header['accelerate']}"
    assert f"#   {command}" in text
    monkeypatch.chdir(ROOT)
    assert Path(launch.accelerate_config_file(header["accelerate"])).is_file()
    # What `batch` comments say
    sizes = re.search(r"# (\d+) x (\d+) x (\d+) GPUs? = (\d+) ", text)
    batch, accumulation, gpus, total = map(int, sizes.groups())
    assert (batch, accumulation) == (args.per_device_train_batch_size, args.gradient_accumulation_steps)
    assert gpus == int(header["gpus"]) and batch * accumulation * gpus == total


@pytest.mark.parametrize("name", NAMES)
def test_lines_of_a_recipe_can_be_read(name):
    path, _, settings = recipe(name)
    lines = path.read_text().splitlines()
    assert re.match(r"# [A-Z].*\.$", lines[0])
    assert max(map(len, lines)) <= 145
    knobs = [
        "dtype",
        "lora_r",
        "load_in_4bit",
        "use_bnb_nested_quant",
        "bnb_4bit_quant_storage",
        "max_length",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "activation_checkpointing",
        "precompute_ref_log_probs",
        "optim",
    ]
    for knob in knobs:
        for line in lines:
            if line.startswith(f"{knob}:"):
                assert " # " in line, line


@pytest.mark.parametrize("name", NAMES)
def test_launch_line_reaches_accelerate(name, monkeypatch, stand_ins, tmp_path):
    path, header, _ = recipe(name)
    calls = []
    monkeypatch.setattr(launch, "launch_command", calls.append)
    monkeypatch.chdir(ROOT)
    nodes = ["--machine_rank", "1", "--main_process_ip", "10.0.0.1", "--main_process_port", "29500"]
    argv = ["--config", f"recipes/{name}.yaml", "--accelerate_config", header["accelerate"], "--use_cpu", "true"]
    assert main([header["method"], *argv, *(nodes if int(header["gpus"]) > 8 else [])]) == 0
    args = calls[0]
    settings = yaml.safe_load(Path(args.config_file).read_text())
    if header["accelerate"] != "single_gpu":
        assert settings["num_processes"] == int(header["gpus"])
    assert args.training_script_args[:3] == [header["method"], "--config", f"recipes/{name}.yaml"]


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_config_is_valid(path):
    from accelerate.commands.config import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.deepspeed_config["zero_stage"] == 3
    assert path.read_text().startswith("# ")
    assert f"accelerate/{path.name}" in (ROOT / "recipes" / "README.md").read_text()


# Two steps


def check(name: str, result: dict, world_size: int) -> None:
    """What must hold of a recipe's run of two steps."""
    path, header, settings = recipe(name)
    assert "error" not in result, result["error"][-2000:]
    assert result["code"] == 0
    assert result["world_size"] == world_size
    assert result["bits"] == (4 if settings.get("load_in_4bit") else 16)
    assert result["lora"] == bool(settings.get("use_peft"))
    assert result["checkpointing"] == settings["activation_checkpointing"]
    assert result["zero_stage"] == (3 if "zero3" in header["accelerate"] else 0)
    assert result["batch"] == settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"]

    first, second = [step for step in result["log"] if "loss" in step][:2]
    loss = settings["loss_type"]
    if header["method"] == "dpo":
        expected = LOSS_CASES[loss].constant
        if "penalty" in LOSS_CASES[loss].metrics:
            assert first[f"{loss}/penalty"] > 0
            expected += first[f"{loss}/penalty"]
    else:
        # Each class has its constant, and counts by its weight: 2 log 2 at the proportions of the training set
        rows = completions(256)
        preferred = sum(row["label"] for row in rows) / len(rows)
        alpha = settings.get("rdro_alpha") or preferred
        constants = {"rdro": (1 + alpha, 1 - alpha), "ddro": (1, 1)}[loss]
        shares = (first["share/chosen"] / preferred, first["share/rejected"] / (1 - preferred))
        expected = math.log(2) * sum(c * share for c, share in zip(constants, shares, strict=True))
    assert first["loss"] == pytest.approx(expected, abs=2e-4)
    assert math.isfinite(second["loss"]) and first["grad_norm"] > 0
    assert any("eval_loss" in step for step in result["log"])


SINGLE = [name for name in NAMES if recipe(name)[1]["accelerate"] == "single_gpu"]
GROUPS: dict[str, list[str]] = {}
for _name in NAMES:
    if _name not in SINGLE:
        GROUPS.setdefault(recipe(_name)[1]["accelerate"], []).append(_name)


@pytest.mark.slow
@pytest.mark.parametrize("name", SINGLE)
def test_recipe_of_one_gpu(name, stand_ins, tmp_path):
    if recipe(name)[2].get("load_in_4bit"):
        pytest.importorskip("bitsandbytes")
    path, header, _ = recipe(name)
    check(name, run(header["method"], training_argv(path, output=str(tmp_path / "out"), **stand_ins(name))), 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2.5-0.5b/kldpo_lora", "qwen2.5-0.5b/rdro_full"])
def test_recipe_with_packed_rows(name, stand_ins, tmp_path):
    """Pairs and completions; what each recipe offers is no more than a line of it."""
    path, header, settings = recipe(name)
    assert all("padding_free" in recipe(other)[2] for other in NAMES)
    argv = [*training_argv(path, output=str(tmp_path / "out"), **stand_ins(name)), "--padding_free", "true"]
    check(name, run(header["method"], argv), 1)


@pytest.fixture(scope="module")
def launched(tmp_path_factory, stand_ins):
    """Run all recipes of an accelerate config in one launch of `trl-rdro` with two processes, once."""
    # pytest-xdist: the process that comes first launches, the others read
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "launched"
    root.mkdir(exist_ok=True)

    def results(config: str, name: str) -> list[dict]:
        folder = root / Path(config).stem
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                folder.mkdir()
                _launch(folder, config, stand_ins)
        files = sorted(folder.glob(f"{name.replace('/', '--')}.rank*.json"))
        if not files:
            pytest.fail((folder / "log").read_text()[-3000:], pytrace=False)
        return [json.loads(file.read_text()) for file in files]

    return results


def _launch(folder: Path, config: str, stand_ins) -> None:
    runs = []
    for name in GROUPS[config]:
        path, header, _ = recipe(name)
        argv = training_argv(path, output=str(folder / f"{path.parent.name}-{path.stem}"), **stand_ins(name))
        runs.append((name.replace("/", "--"), header["method"], argv))
    (folder / "runs.json").write_text(json.dumps(runs))
    _, method, argv = runs[0]
    command_line = [method, *argv, *launch_argv(recipe(GROUPS[config][0])[1])]
    code = (
        "import sys; from trl_rdro.cli import launch, main; launch.TRAINING_MODULE = 'tests.recipes.worker'; "
        f"sys.exit(main({command_line!r}))"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "RECIPE_RUNS": str(folder / "runs.json"),
        "HF_DATASETS_CACHE": str(folder / "cache"),
        "TQDM_DISABLE": "1",
    }
    with open(folder / "log", "w") as log:
        subprocess.run(
            [sys.executable, "-c", code], stdout=log, stderr=subprocess.STDOUT, env=environment, timeout=900, cwd=ROOT
        )


@pytest.mark.slow
@pytest.mark.parametrize(("config", "name"), [(config, name) for config, names in GROUPS.items() for name in names])
def test_recipe_of_several_gpus(config, name, launched):
    if "zero" in config:
        pytest.importorskip("deepspeed")
    if recipe(name)[2].get("load_in_4bit"):
        pytest.importorskip("bitsandbytes")
    results = launched(config, name)
    assert len(results) == 2
    for result in results:
        check(name, result, 2)


@pytest.mark.slow
def test_recipe_trains_through_the_command_itself(stand_ins, tmp_path):
    """Without the worker in between, to the model on disk."""
    name = "llama-3.2-1b/kldpo_full"
    path, header, _ = recipe(name)
    argv = training_argv(path, output=str(tmp_path / "out"), **stand_ins(name))
    command = [sys.executable, "-m", "trl_rdro.cli", header["method"], *argv, *launch_argv(header)]
    result = run_process(command)
    assert (tmp_path / "out" / "model.safetensors").is_file(), result.stderr[-3000:]
    state = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["log_history"][0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
