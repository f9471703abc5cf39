"""
A shift of wording: does wdpo's penalty on the gradient of the inputs help with texts that are written otherwise?

Policies are trained on pairs of texts that people rated, as they were written, and tested on held-out pairs as they
are and in three other wordings made by rule (wordings.py): typing errors, synonyms and capitals. Which is preferred
stays.

The primary endpoint is the accuracy on the reworded pairs, the mean over the three wordings. A smaller step may do as
much as a penalty, so DPO is trained at three learning rates, and wdpo, with two radii, at the one that turned out the
best for DPO.

    python scripts/studies/wording_shift.py --size small
"""

from pathlib import Path
from typing import Any

import ratings
import study
import torch
from torch.nn.functional import logsigmoid
from wordings import WORDINGS


BETA = 0.1
METHODS = {
    "dpo": {"loss_type": "sigmoid"},
    "wdpo, rho 0.001": {"loss_type": "wdpo", "wdpo_rho": 0.001},  # the default
    "wdpo, rho 0.01": {"loss_type": "wdpo", "wdpo_rho": 0.01},
}
RATES = {"dpo": (1e-3, 2e-3, 3e-3), "wdpo, rho 0.001": (3e-3,), "wdpo, rho 0.01": (3e-3,)}
STEPS = {"ci": 2, "small": 24, "full": 60}


def cells(size: str) -> list[dict[str, Any]]:
    return ratings.grid(size, RATES, at_ci=("dpo", "wdpo, rho 0.01"))


def reworded(pair: ratings.Pair, wording: str) -> ratings.Pair:
    return {**pair, **{side: WORDINGS[wording](pair[side]) for side in ratings.SIDES}}


def run(cell: dict[str, Any], folder: Path) -> dict[str, Any]:
    pairs = ratings.quickstart_pairs()
    tests = ratings.held_out(pairs, ratings.SIZES[cell["size"]].test_pairs)
    shifted = [reworded(pair, wording) for wording in WORDINGS for pair in tests]
    texts = [pair["prompt"] + pair[side] for pair in pairs + shifted for side in ratings.SIDES]
    # In bfloat16 these thirty layers keep `wdpo/gap` above the 3 % that are warned about
    subject = ratings.Subject(cell, folder, texts, dtype=torch.float32)
    steps = STEPS[cell["size"]]
    trained = ratings.draw(pairs, steps * subject.size.pairs_per_step, cell["seed"])
    options = {**METHODS[cell["method"]], "learning_rate": cell["rate"], "beta": BETA}
    (scores,) = subject.train_and_score(options, trained, tests + shifted, at=(steps,))
    result: dict[str, Any] = {}
    for wording, logratios in zip(("as written", *WORDINGS), scores.split(len(tests)), strict=True):
        right = ratings.order(logratios)
        result |= {wording: ratings.accuracy(right), f"right_{wording}": right, f"loss_{wording}": loss(logratios)}
    for name, form in (("reworded", "{}"), ("loss_reworded", "loss_{}")):
        result[name] = sum(result[form.format(wording)] for wording in WORDINGS) / len(WORDINGS)
    return result


def loss(logratios: torch.Tensor) -> float:
    """The mean DPO loss of `(n, 2)` log-ratios of chosen and rejected completions."""
    return -logsigmoid(BETA * (logratios[:, 0] - logratios[:, 1]).double()).mean().item()


def table(rows: list[dict[str, Any]]) -> str:
    by_cell = study.group(rows, ["method", "rate"])
    best = ratings.best_rate(rows, "dpo", "reworded")
    # The three wordings of a pair vary together: a pair is right by thirds
    right = {
        key: sum(ratings.right_table(members, f"right_{wording}") for wording in WORDINGS) / len(WORDINGS)
        for key, members in by_cell.items()
    }
    to_dpo = ratings.differences(right, ("dpo", best))
    columns = ("as written", *WORDINGS, "reworded", "loss_as written", "loss_reworded")
    lines = [
        [key[0], f"{key[1]:g}", *(study.cell_text(members, column) for column in columns), to_dpo[key]]
        for key, members in by_cell.items()
    ]
    header = ["method", "rate", "as written", *WORDINGS, "mean of the three", "DPO loss, as written", "of the three"]
    text = (
        "Accuracies on held-out pairs. The difference is in the mean of the three, with intervals over draws and test "
        "pairs, 95 % together.\n\n"
    )
    return text + study.markdown([*header, f"less dpo's at {best:g}"], lines)


def draw(rows: list[dict[str, Any]]) -> Any:
    return ratings.draw_by_rate(rows, {"as written": "as written", "reworded": "mean of the three other wordings"})


STUDY = study.Study("wording_shift", cells, run, table, draw, takes_model=True)

if __name__ == "__main__":
    study.main(STUDY)
