"""A zero in the table of scores is explained below it."""

import pytest
import torch

from trl_rdro.cli.score_notes import notes
from trl_rdro.tools.score_figures import pair_figures, unpaired_figures


def result(overall, **changes):
    paired = "margin" in overall
    head = {"reference": "base", "dtype": "float32", "format": "pairs" if paired else "unpaired"}
    return {"overall": overall, **head, **changes}


def pairs(*margins: float):
    chosen = torch.tensor(margins, dtype=torch.float64)
    return pair_figures(torch.stack([chosen + 0.1, torch.full_like(chosen, 0.1)], dim=1))


def test_nothing_is_said_of_plain_figures():
    assert notes(result(pairs(1.0, -0.5, 0.2))) == []
    scores, preferred = torch.tensor([1.0, 0.2, 0.5]).double(), torch.tensor([True, True, False])
    assert notes(result(unpaired_figures(scores, preferred))) == []


@pytest.mark.parametrize("paired", [True, False])
def test_a_model_that_is_its_reference(paired):
    zeros = torch.zeros(4, dtype=torch.float64)
    figures = pair_figures(zeros.view(2, 2)) if paired else unpaired_figures(zeros, torch.arange(4) < 2)
    (sentence,) = notes(result(figures))
    assert "same probabilities as base" in sentence and ("one half" in sentence) == paired


@pytest.mark.parametrize(("sign", "figure"), [(1, "1.000"), (-1, "0.000")])
def test_no_exception(sign, figure):
    (sentence,) = notes(result(pairs(*[sign] * 60)))
    assert f"The error of {figure} is 0.000" in sentence and "5.0%" in sentence


def test_a_margin_that_rounds_to_zero():
    assert "1.0e-03 nats" in notes(result(pairs(0.003, -0.001)))[0]
    assert "--dtype float32" in notes(result(pairs(0.003, -0.001), dtype="bfloat16"))[0]
