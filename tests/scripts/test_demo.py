"""`scripts/demo.py`: what it measures, and every loss on tiny models."""

import json
import math
import sys

import demo
import pytest
import torch

from trl_rdro.losses.types import of_family

from ..helpers import is_png
from ..loss_cases import LOSS_CASES


def test_ties_count_one_half():
    scores = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 1.0, -2.0, 3.0], [0.0, 0.0, -1.0, 3.0]], dtype=torch.float64)
    values = demo.held_out(scores, kldpo_tau=None)
    assert values["accuracy"].tolist() == [0.5, 1.0, 0.0, 0.5]
    assert torch.equal(values["loss"], scores[0])


def test_kldpo_loss_is_that_of_the_whole_held_out_set():
    scores = torch.rand(3, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = demo.held_out(scores, kldpo_tau=0.3)
    expected = 0.3 * math.log(sum(math.exp(loss / 0.3) for loss in scores[0].tolist()) / 50)
    assert values["loss"].mean().item() == pytest.approx(expected)


def test_standard_error_of_kldpo_loss_against_resampling():
    generator = torch.Generator().manual_seed(0)
    population = torch.rand(2000, 200, generator=generator, dtype=torch.float64)
    means = torch.stack([demo.held_out((row, row, row), 0.5)["loss"].mean() for row in population])
    estimate = demo.mean_and_error(demo.held_out((population[0],) * 3, 0.5)["loss"])["standard_error"]
    assert estimate == pytest.approx(means.std().item(), rel=0.15)


def test_batches_are_distinct_pairs_of_similar_length():
    settings = demo.Settings(steps=10, learning_rate=0.0)
    selected = demo.training_data(settings, seed=3, unpaired=False)
    assert len(set(selected["chosen"])) == 80
    lengths = [len(text) for text in selected["chosen"]]
    spreads = [max(lengths[i : i + 8]) - min(lengths[i : i + 8]) for i in range(0, 80, 8)]
    assert sorted(spreads)[5] < (max(lengths) - min(lengths)) / 5
    assert demo.training_data(settings, 3, unpaired=False)["chosen"] == selected["chosen"]
    assert demo.training_data(settings, 4, unpaired=False)["chosen"] != selected["chosen"]
    unpaired = demo.training_data(settings, 3, unpaired=True)
    assert set(unpaired["completion"]) == {*selected["chosen"], *selected["rejected"]}


def test_a_loss_without_unpaired_form_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["demo", "--loss", "kldpo", "--data", "unpaired"])
    with pytest.raises(SystemExit):
        demo.main()
    assert "kldpo compares the two texts of a pair" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("loss", "data"),
    [(loss, "paired") for loss in demo.SETTINGS]
    + [(loss, "unpaired") for loss in demo.SETTINGS if loss in of_family("density_ratio")],
)
def test_runs_and_measures(model, loss, data, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "HELD_OUT_PAIRS", 6)
    out = tmp_path / "run"
    argv = [
        "demo",
        "--loss",
        loss,
        "--data",
        data,
        "--model",
        model,
        "--steps",
        "2",
        "--output_dir",
        str(out),
    ]
    monkeypatch.setattr(sys, "argv", argv)
    demo.main()
    assert is_png(out / "curves.png")
    assert (out / "adapter_model.safetensors").exists()
    figures = json.loads((out / "figures.json").read_text())
    before = {key: value["before"]["mean"] for key, value in figures["results"].items()}
    assert before["accuracy"] == 0.5
    assert before["logratio_chosen"] == before["logratio_rejected"] == 0.0
    case = LOSS_CASES[loss]
    if "penalty" in case.metrics:
        assert before["loss"] > case.constant
    else:
        assert before["loss"] == pytest.approx(case.constant)
    assert figures["results"]["loss"]["change"]["mean"] == pytest.approx(
        figures["results"]["loss"]["after"]["mean"] - before["loss"]
    )
    assert figures["results"]["logratio_chosen"]["after"]["mean"] != 0
