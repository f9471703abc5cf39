"""`scripts/demo.py`: what it measures, and every kind of loss on tiny models."""

import json
import sys

import demo
import pytest
import torch

from ..helpers import is_png


def test_the_figures_of_given_log_ratios():
    logratios = torch.tensor([[0.0, 0.0], [1.0, 0.5], [-2.0, -1.0], [0.5, -0.5]])
    figures = demo.figures_of(logratios)
    assert figures["accuracy"]["mean"] == (0.5 + 1 + 0 + 1) / 4  # a tie counts one half
    assert figures["margin"]["mean"] == pytest.approx((0 + 0.5 - 1 + 1) / 4)
    assert figures["chosen"]["mean"] == pytest.approx(-0.125)
    expected = logratios.exp().mean().log().item()
    assert figures["log_normalisation"]["mean"] == pytest.approx(expected)


def test_the_normalisation_is_0_within_its_error_where_the_texts_come_from_the_reference():
    generator = torch.Generator().manual_seed(0)
    reference, policy = torch.randn(2, 20, generator=generator, dtype=torch.float64).log_softmax(dim=1)
    outcomes = torch.multinomial(reference.exp(), 4000, replacement=True, generator=generator)
    normalisation = demo.figures_of((policy - reference)[outcomes].view(2000, 2))["log_normalisation"]
    assert abs(normalisation["mean"]) < 3 * normalisation["standard_error"] < 0.2


def test_batches_are_distinct_pairs_of_similar_length():
    pairs = demo.training_pairs(steps=10, seed=3)
    assert len({pair["chosen"] for pair in pairs}) == 80
    lengths = [len(pair["chosen"]) for pair in pairs]
    spreads = [max(lengths[i : i + 8]) - min(lengths[i : i + 8]) for i in range(0, 80, 8)]
    assert sorted(spreads)[5] < (max(lengths) - min(lengths)) / 5
    assert demo.training_pairs(10, 3) == pairs != demo.training_pairs(10, 4)
    held_out = {pair["chosen"] for pair in demo.held_out_pairs()}
    assert len(held_out) == demo.HELD_OUT_PAIRS and not held_out & {pair["chosen"] for pair in pairs}


def test_adapters_stand_on_the_last_fifth_of_the_layers(model):
    names = demo.last_layers(demo.load(model))
    last = demo.load(model).config.num_hidden_layers - 1
    assert names and all(f"layers.{last}." in name for name in names)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--loss", "kldpo", "--data", "unpaired"], "kldpo compares the two texts of a pair"),
        (["--loss", "rdroo"], "rdroo"),
    ],
)
def test_what_cannot_be_trained_is_said_before_a_model_is_loaded(monkeypatch, capsys, tmp_path, argv, message):
    monkeypatch.setattr(sys, "argv", ["demo", *argv, "--output_dir", str(tmp_path / "run"), "--model", "/nowhere"])
    with pytest.raises(SystemExit):
        demo.main()
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("loss", "data"),
    [("rdro", "paired"), ("ddro", "unpaired"), ("wdpo", "paired"), ("ipo", "paired"), ("dpo", "paired")],
)
def test_runs_and_measures(model, loss, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "HELD_OUT_PAIRS", 6)
    out = tmp_path / "run"
    argv = ["demo", "--loss", loss, "--data", data, "--model", model, "--steps", "2", "--output_dir", str(out)]
    monkeypatch.setattr(sys, "argv", argv)
    demo.main()
    assert is_png(out / "demo.png")
    figures = json.loads((out / "figures.json").read_text())
    assert list(figures["results"]) == list(dict.fromkeys([loss, "dpo"]))
    for name, results in figures["results"].items():
        assert (out / name / "adapter_model.safetensors").exists()
        assert results["margin"]["mean"] == pytest.approx(results["chosen"]["mean"] - results["rejected"]["mean"])
        assert results["chosen"]["mean"] != 0
    printed = capsys.readouterr().out
    assert "[3/6] the reference" in printed and f"training with {loss}" in printed
