"""
Whose preferences count: a minority that wants the opposite, and is marked (real human ratings).

Of the training pairs 85 % are Ann's, who prefers the text that people rated positive, and 15 % Bob's, who prefers the
other; the prompt says for whom the text is ("Write a tweet for Bob:"). The policy is tested on the same held-out pairs
for both. Nothing but the mark tells a policy whose pair it sees, so that it can do well for Bob only by learning from
his few pairs what the mark means. The ratings are people's; that Bob prefers negative texts is our construction.

The primary endpoint is the accuracy on Bob's pairs. A higher learning rate may reach Bob too, so DPO is trained at
three, and the losses that promise to look after him at the one that turned out the best for DPO.

    python scripts/studies/people_shift.py --size small
"""

import random
from pathlib import Path
from typing import Any

import ratings
import study


MINORITY = 0.15
PERSONS = {"majority": "Ann", "minority": "Bob"}
METHODS = {
    "dpo": {"loss_type": "sigmoid"},
    "kldpo": {"loss_type": "kldpo", "kldpo_tau": 0.1},
    "grdpo": {"loss_type": "grdpo", "grdpo_eta": 0.01},
}
RATES = {"dpo": (1e-3, 2e-3, 3e-3), "kldpo": (3e-3,), "grdpo": (3e-3,)}
STEPS = {"ci": 2, "small": 60, "full": 120}


def cells(size: str) -> list[dict[str, Any]]:
    return ratings.grid(size, RATES, at_ci=("dpo", "grdpo"))


def of(pair: ratings.Pair, group: str) -> ratings.Pair:
    """The pair with the prompt and the preference of one of the two persons."""
    pair = ratings.swapped(pair) if group == "minority" else pair
    return {**pair, "prompt": f"Write a {ratings.kind_of_text(pair)} for {PERSONS[group]}:\n", "group": group}


def training_pairs(pairs: list[ratings.Pair], n: int, seed: int) -> list[ratings.Pair]:
    few = round(MINORITY * n)
    drawn = [of(pair, "minority" if i < few else "majority") for i, pair in enumerate(ratings.draw(pairs, n, seed))]
    random.Random(seed).shuffle(drawn)
    return drawn


def run(cell: dict[str, Any], folder: Path) -> dict[str, Any]:
    pairs = ratings.quickstart_pairs()
    texts = [of(pair, group)["prompt"] + pair[side] for pair in pairs for group in PERSONS for side in ratings.SIDES]
    subject = ratings.Subject(cell, folder, texts)
    size, steps = subject.size, STEPS[cell["size"]]
    trained = training_pairs(pairs, steps * size.pairs_per_step, cell["seed"])
    tests = ratings.held_out(pairs, size.test_pairs)
    scored = [of(pair, group) for group in PERSONS for pair in tests]
    options = {**METHODS[cell["method"]], "learning_rate": cell["rate"]}
    (scores,) = subject.train_and_score(options, trained, scored, at=(steps,))
    result: dict[str, Any] = {}
    for group, logratios in zip(PERSONS, scores.split(len(tests)), strict=True):
        right = ratings.order(logratios)
        margin = (logratios[:, 0] - logratios[:, 1]).mean().item()
        result |= {group: ratings.accuracy(right), f"margin_{group}": margin, f"right_{group}": right}
    return result


def table(rows: list[dict[str, Any]]) -> str:
    by_cell = study.group(rows, ["method", "rate"])
    best = ratings.best_rate(rows, "dpo", "minority")
    right = {
        group: {key: ratings.right_table(members, f"right_{group}") for key, members in by_cell.items()}
        for group in PERSONS
    }
    to_dpo = {group: ratings.differences(right[group], ("dpo", best)) for group in PERSONS}
    lines = []
    for key, members in by_cell.items():
        line = [key[0], f"{key[1]:g}"]
        for group in PERSONS:
            line += [study.cell_text(members, group), study.cell_text(members, f"margin_{group}", "+.1f")]
            line.append(to_dpo[group][key])
        apart = right["majority"][key], 1 - right["minority"][key]
        lines.append([*line, ratings.difference_text(*apart, comparisons=len(by_cell))])
    header = ["method", "rate"]
    for person in PERSONS.values():
        header += [f"accuracy for {person}", "margin", f"less dpo's at {best:g}"]
    text = (
        "Margins in nats. Differences have intervals over draws and test pairs, 95 % together in each column. Told "
        "apart: the sum of the two accuracies less 1, which is what a policy blind to the name has.\n\n"
    )
    return text + study.markdown([*header, "told apart"], lines)


def draw(rows: list[dict[str, Any]]) -> Any:
    return ratings.draw_by_rate(rows, {group: f"pairs for {person} ({group})" for group, person in PERSONS.items()})


STUDY = study.Study("people_shift", cells, run, table, draw, takes_model=True)

if __name__ == "__main__":
    study.main(STUDY)
