"""`trl-rdro plot` and `plot: true`: curves of runs from what they leave on disk."""

import json
import shutil

import pytest

from trl_rdro import DPOConfig, KTOConfig
from trl_rdro.cli import main, train
from trl_rdro.tools.run_logs import log_history

from ..helpers import is_png, refusal
from ..tiny import cpu_args


def panels(figure) -> dict[str, dict[str, list]]:
    """Title to label to points."""
    return {
        axes.get_title(): {line.get_label(): line.get_xydata().tolist() for line in axes.lines} for axes in figure.axes
    }


def write_run(directory, steps, loss, **metrics):
    history = [{"step": step, "loss": loss, **metrics} for step in range(1, steps + 1)]
    directory.mkdir(parents=True)
    (directory / "trainer_state.json").write_text(json.dumps({"global_step": steps, "log_history": history}))


@pytest.mark.parametrize(
    ("loss", "titles"),
    [
        ("kldpo", {"kldpo: weights in the batch"}),
        ("wdpo", {"wdpo: input gradient", "wdpo: penalty", "wdpo: error of the central difference"}),
        ("ddro", {"ddro: share beyond the cap", "log mean of policy / reference (0: it is the mixture)"}),
        ("sigmoid", {"reward (beta times log-ratio)"}),
    ],
)
def test_a_real_run_is_drawn_at_its_end_and_later(config, tmp_path, capsys, figures, loss, titles):
    path = config(plot=True, loss_type=loss, rdro_alpha=None, save_strategy="no")
    assert train.main("dpo", ["--config", path]) == 0
    assert f"Curves in {tmp_path / 'out' / 'curves.png'}" in capsys.readouterr().out
    assert is_png(tmp_path / "out" / "curves.png")
    assert main(["plot", str(tmp_path / "out"), "--output", str(tmp_path / "later.png")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "later.png")
    at_end, later = map(panels, figures)
    assert at_end == later
    common = {"loss", "preference accuracy", "gradient norm"}
    assert set(at_end) - {"log-ratio to the reference (nats)"} == common | titles
    assert ("log-ratio to the reference (nats)" in at_end) == (loss != "sigmoid")
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert at_end["loss"] == {"train": [[row["step"], row["loss"]] for row in history if "loss" in row]}
    assert at_end["gradient norm"] == {"train": [[row["step"], row["grad_norm"]] for row in history if "loss" in row]}


def test_without_the_field_nothing_is_drawn_but_the_state_is_there(config, tmp_path, figures):
    assert train.main("dpo", ["--config", config(save_strategy="no")]) == 0
    assert not figures
    assert (tmp_path / "out" / "trainer_state.json").is_file()


def test_several_runs_share_the_panels(tmp_path, figures):
    write_run(tmp_path / "a" / "run", 3, 1.0, grad_norm=2.0)
    write_run(tmp_path / "b" / "run", 2, 0.5)
    write_run(tmp_path / "other", 1, 0.1)
    runs = [str(tmp_path / name) for name in ("a/run", "b/run", "other")]
    assert main(["plot", *runs, "--output", str(tmp_path / "new" / "c.png")]) == 0
    drawn = panels(figures[0])
    assert list(drawn) == ["loss", "gradient norm"]
    assert {label: len(points) for label, points in drawn["loss"].items()} == {
        f"{runs[0]} train": 3,  # two runs of one name are told apart by their paths
        f"{runs[1]} train": 2,
        "other train": 1,
    }


def test_an_unfinished_run_is_read_from_its_last_complete_checkpoint(tmp_path):
    write_run(tmp_path / "run" / "checkpoint-2", 2, 1.0)
    write_run(tmp_path / "run" / "checkpoint-10", 10, 1.0)
    (tmp_path / "run" / "checkpoint-20").mkdir()
    assert len(log_history(str(tmp_path / "run"))) == 10
    assert len(log_history(str(tmp_path / "run" / "checkpoint-2"))) == 2
    # Resumed beyond the end of an earlier run, and then cut off
    shutil.copy(tmp_path / "run" / "checkpoint-2" / "trainer_state.json", tmp_path / "run")
    assert len(log_history(str(tmp_path / "run"))) == 10


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["nowhere"], ["no such directory", "nowhere"]),
        (["empty"], ["trainer_state.json", "empty", "output_dir"]),
        (["broken"], ["cannot read", "broken"]),
        (["other"], ["log_history"]),
        (["silent"], ["silent", "nothing to draw", "logging_steps"]),
        (["good", "--output", "curves.jpg"], ["curves.jpg", ".png"]),
        (["good", "--output", "."], [".png"]),
    ],
)
def test_refusals(tmp_path, monkeypatch, capsys, argv, words):
    monkeypatch.chdir(tmp_path)
    for name, text in (("broken", "{"), ("other", "[]")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text(text)
    (tmp_path / "empty").mkdir()
    write_run(tmp_path / "silent", 0, 0.0)
    write_run(tmp_path / "good", 1, 1.0)
    message = refusal(capsys, main(["plot", *argv]))
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"log_history": [1, 2]}, "entry 0 of its log_history"),
        ({"log_history": [{"step": 1, "loss": 1.0}, None]}, "entry 1 of its log_history"),
        ({"log_history": [{"loss": 1.0}]}, "a number for `step`"),
        ({"log_history": [{"step": "one", "loss": 1.0}]}, "a number for `step`"),
        ({"log_history": [{"step": 10**400, "loss": 1.0}]}, "a number for `step`"),
        ({"log_history": [{"step": 1, "loss": "low"}]}, "nothing to draw"),
        ({"log_history": [{"step": 1, "loss": [1.0]}]}, "nothing to draw"),
        ({"log_history": {"step": 1}}, "no log_history"),
        ({"log_history": None}, "no log_history"),
        ({"global_step": "one", "log_history": []}, "global_step"),
        (b"\xff\x00", "cannot read"),
        (b"[" * 100_000, "cannot read"),
    ],
)
def test_a_state_that_cannot_be_drawn(tmp_path, capsys, content, words):
    path = tmp_path / "run" / "trainer_state.json"
    path.parent.mkdir()
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    message = refusal(capsys, main(["plot", str(path.parent), "--output", str(tmp_path / "c.png")]))
    assert words in message and "run" in message


@pytest.mark.parametrize("config_class", [DPOConfig, KTOConfig])
def test_the_field_is_validated(config_class, tmp_path, monkeypatch):
    common = cpu_args(output_dir=str(tmp_path))
    assert config_class(**common).plot is False
    with pytest.raises(ValueError, match="`plot` must be True or False, got 'yes'"):
        config_class(plot="yes", **common)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="matplotlib"):
        config_class(plot=True, **common)


def test_missing_matplotlib_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "trl-rdro[plot]" in refusal(capsys, main(["plot", str(tmp_path)]))
