"""Wrong labels: the estimates on log-ratios that are drawn from the model they assume, and on a trained model."""

import json
import math

import pytest
import torch
from datasets import Dataset

from trl_rdro.cli import main
from trl_rdro.tools.suspects import FEWEST, OTHERS, flipped_by_moments, judge_labels, most_suspect, reliability

from ..tiny import save_tiny, tiny_preferences
from ..training import train


BETA = 0.5


def drawn(n, flips, seed=0, spread=3.0):
    """Scores of `n` pairs whose labels come from the model: the better one is chosen with probability sigma(beta h),
    and the label then flipped with probability `flips`. And which were flipped."""
    generator = torch.Generator().manual_seed(seed)
    h = spread / BETA * torch.randn(n, generator=generator, dtype=torch.float64)
    first = torch.rand(n, generator=generator, dtype=torch.float64) < torch.sigmoid(BETA * h)
    flipped = torch.rand(n, generator=generator, dtype=torch.float64) < flips
    margins = torch.where(first != flipped, h, -h)
    return [{"row": i, "chosen": m, "rejected": 0.0} for i, m in enumerate(margins.tolist())], flipped


def data(n, **columns):
    return Dataset.from_dict(
        {"prompt": ["p"] * n, "chosen": list(map(str, range(n))), "rejected": ["r"] * n, **columns}
    )


@pytest.mark.parametrize("flips", [0.0, 0.1, 0.2, 0.4])
def test_the_share_is_right_within_its_error(flips):
    """Over forty data sets: errors that are standard errors have a mean square of 1 (less at the border, 0)."""
    scaled = {"flipped": [], "flipped_by_moments": []}
    for seed in range(40):
        scores, _ = drawn(1000, flips, seed)
        labels = judge_labels(data(1000), scores, BETA)
        for name, values in scaled.items():
            values.append((labels[name]["mean"] - flips) / labels[name]["standard_error"])
    for name, values in scaled.items():
        values = torch.tensor(values)
        assert values.square().mean() < 1 + 4 * math.sqrt(2 / 40), name
        if flips > 0:
            assert values.mean().abs() < 4 / math.sqrt(40) and values.square().mean() > 1 - 3 * math.sqrt(2 / 40), name


def test_the_likelihood_is_at_its_maximum():
    scores, _ = drawn(300, 0.2)
    u = BETA * torch.tensor([row["chosen"] for row in scores], dtype=torch.float64)
    eta, _ = reliability(u)

    def likelihood(value):
        return sum(math.log(value * s + (1 - value) * (1 - s)) for s in torch.sigmoid(u).tolist())

    assert likelihood(eta) > max(likelihood(eta - 1e-3), likelihood(eta + 1e-3))
    # There it is the mean of the posteriors, as in the E-step
    assert torch.tensor(judge_labels(data(300), scores, BETA)["posteriors"]).mean().item() == pytest.approx(
        eta, abs=1e-6
    )


def test_posteriors_are_calibrated():
    scores, flipped = drawn(20_000, 0.3, spread=2.0)
    posteriors = torch.tensor(judge_labels(data(20_000), scores, BETA)["posteriors"])
    for low in (0.0, 0.2, 0.4, 0.6, 0.8):
        inside = (posteriors >= low) & (posteriors < low + 0.2)
        right = (~flipped[inside]).double().mean().item()
        assert right == pytest.approx(posteriors[inside].mean().item(), abs=4 * 0.5 / math.sqrt(inside.sum()))


def test_a_model_that_tells_nothing_apart_says_so():
    labels = judge_labels(data(4), [{"row": i, "chosen": 1.0, "rejected": 1.0} for i in range(4)], BETA)
    assert labels["flipped"]["standard_error"] is None and labels["flipped_by_moments"]["mean"] is None
    assert flipped_by_moments(torch.tensor([2.0], dtype=torch.float64))["standard_error"] is None


def test_scores_beyond_float_stay_finite():
    scores = [{"row": i, "chosen": sign * 1e4, "rejected": 0.0} for i, sign in enumerate((1, 1, 1, -1))]
    labels = judge_labels(data(4), scores, BETA)
    assert labels["flipped"]["mean"] == pytest.approx(0.25, abs=1e-6)
    assert labels["posteriors"] == pytest.approx([1, 1, 1, 0])


def test_annotators_have_their_own_share_and_those_with_few_pairs_one_together():
    careful, careless = drawn(2000, 0.05, 1)[0], drawn(2000, 0.45, 2)[0]
    scores = [{**row, "row": i} for i, row in enumerate(careful + careless)]
    few = FEWEST - 1
    names = ["ann"] * 2000 + ["bo"] * (2000 - 2 * few) + ["cy"] * few + [7] * few
    dataset = data(4000, annotator=list(map(str, names)))
    labels = judge_labels(dataset, scores, BETA)
    assert labels["annotators"].keys() == {"ann", "bo", OTHERS}
    assert labels["annotators"]["ann"]["mean"] == pytest.approx(0.05, abs=0.05)
    assert labels["annotators"]["bo"]["mean"] == pytest.approx(0.45, abs=0.06)
    assert labels["flipped"]["mean"] == pytest.approx(0.25, abs=0.05)
    # The same margin is more suspect where its annotator is
    equal = [{"row": i, "chosen": -1.0, "rejected": 0.0} for i in (0, 2000)]
    equal += [row for row in scores if row["row"] not in (0, 2000)]
    posteriors = judge_labels(dataset, equal, BETA)["posteriors"]
    assert posteriors[0] > posteriors[1]


def test_the_worst_come_first_with_their_rows():
    scores, flipped = drawn(200, 0.2)
    scores = [{**row, "row": 2 * row["row"]} for row in scores]  # as if every other row had been dropped
    dataset = data(400, group=["a"] * 400)
    found = most_suspect(dataset, scores, judge_labels(dataset, scores, BETA), 20)
    assert [row["label_right"] for row in found] == sorted(row["label_right"] for row in found)
    assert all(row["chosen"] == str(row["row"]) and row["group"] == "a" for row in found)
    assert sum(flipped[row["row"] // 2].item() for row in found) > 15
    assert len(most_suspect(dataset, scores, judge_labels(dataset, scores, BETA), 1000)) == 200


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    """A run on pairs of which a fifth are flipped, and files of other such pairs, with which are."""
    root = tmp_path_factory.mktemp("noisy")

    def flip(rows):
        return [
            {**row, "chosen": row["rejected"], "rejected": row["chosen"]} if i % 5 == 0 else row
            for i, row in enumerate(rows)
        ]

    path = root / "pairs.jsonl"
    Dataset.from_list(flip(tiny_preferences(200, seed=7).to_list())).to_json(path)
    model = save_tiny(root)
    train(
        model,
        root / "run",
        trainer_kwargs={"train_dataset": Dataset.from_list(flip(tiny_preferences(320, seed=1).to_list()))},
        loss_type="repo",
        beta=0.5,
        learning_rate=5e-3,
        max_steps=80,
    ).save_model(str(root / "run"))
    return root, model, path


def run(noisy, capsys, *argv):
    root, model, path = noisy
    output, suspects = root / "scores.json", root / "suspects.jsonl"
    names = ["--model", str(root / "run"), "--ref", model, "--dataset", str(path), "--output", str(output)]
    code = main(["score", *names, "--suspects_file", str(suspects), *argv])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return (
        json.loads(output.read_text()),
        [json.loads(line) for line in suspects.read_text().splitlines()],
        captured.out,
    )


def test_planted_flips_are_found(noisy, capsys):
    result, suspects, printed = run(noisy, capsys, "--suspects", "40")
    assert len(suspects) == 40 and sum(row["row"] % 5 == 0 for row in suspects) >= 36  # 8 by chance
    share = result["labels"]["flipped"]
    assert share["mean"] == pytest.approx(0.2, abs=3 * share["standard_error"] + 0.02)
    assert result["labels"]["beta"] == 0.5  # of the run, from its settings
    assert f"at beta 0.5: {share['mean']:.3f} ± " in printed and "suspects.jsonl" in printed
    posteriors = [row["label_right"] for row in result["scores"]]
    assert sum(posteriors[::5]) / 40 < 0.5 and (sum(posteriors) - sum(posteriors[::5])) / 160 > 0.85

    # Dropped or relabelled, as the documentation does it
    dataset = Dataset.from_json(str(noisy[2]))
    wrong = {row["row"] for row in suspects if row["label_right"] < 0.5}
    dropped = dataset.select(i for i in range(len(dataset)) if i not in wrong)
    assert len(dropped) == 200 - len(wrong)
    relabelled = dataset.map(
        lambda row, i: {"chosen": row["rejected"], "rejected": row["chosen"]} if i in wrong else row, with_indices=True
    )
    clean = tiny_preferences(200, seed=7)
    assert sum(a == b for a, b in zip(relabelled["chosen"], clean["chosen"], strict=True)) >= 180  # 160 before


def test_beta_may_be_given(noisy, capsys):
    result, _, _ = run(noisy, capsys, "--suspects", "1", "--beta", "0.25")
    assert result["labels"]["beta"] == 0.25


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--suspects", "0"], ["--suspects", "at least 1"]),
        (["--suspects", "3", "--beta", "0"], ["--beta"]),
        (["--suspects", "3", "--suspects_file", "no/where/s.jsonl"], ["no/where"]),
        (["--suspects", "3"], ["needs log-ratios to a reference model (--ref)"]),
    ],
)
def test_refusals(noisy, capsys, argv, words):
    _, model, path = noisy
    assert main(["score", "--model", model, "--dataset", str(path), *argv]) == 2
    printed = capsys.readouterr().err
    for word in words:
        assert word in printed
