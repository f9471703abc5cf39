"""The import paths of the documentation stay what they are, wherever the code lives."""

import importlib

import pytest


@pytest.mark.parametrize(
    ("path", "home", "names"),
    [
        (
            "trl_rdro.dynamics",
            "trl_rdro.iterate.dynamics",
            ["cycle", "bradley_terry", "check_preferences", "trajectory", "fixed_point", "rate", "margin", "regime"]
            + ["phase_diagram", "softmax", "entropy", "disturbed", "default_entropy_floor", "REGIMES", "study"],
        ),
        (
            "trl_rdro.estimate",
            "trl_rdro.tools.memory",
            ["read_shape", "Shape", "Run", "estimate", "Estimate", "savings", "knobs", "as_dict", "trainable"]
            + ["GIB", "CARDS", "RESERVE"],
        ),
        (
            "trl_rdro.scoring",
            "trl_rdro.tools.scoring",
            ["load_policy", "Policy", "prepare", "PreparedRows", "completion_logps", "summarise", "per_row", "score"]
            + ["pair_figures", "unpaired_figures", "area_under_curve", "mean_and_error", "default_dtype"],
        ),
    ],
)
def test_documented_path(path, home, names):
    documented, real = importlib.import_module(path), importlib.import_module(home)
    for name in names:
        assert getattr(documented, name) is getattr(real, name)
