"""The studies at their smallest: each runs through its command line, resumes, and shows a fact that must hold."""

import csv
import json
import random
from importlib import import_module
from pathlib import Path

import pytest
import study
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..tiny import save_tiny


ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results" / "studies"
NAMES = [
    *("consistency", "stability", "reward_shift", "people_shift", "comparison", "displacement"),
    *("prompt_shares", "reference_length"),
]


def run(name, folder, *options):
    """The finished cells of a study at size ci."""
    module = import_module(name)
    rows = study.main(module.STUDY, ["--size", "ci", "--output_dir", str(folder), *options])
    with open(folder / "cells.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    summary = json.loads((folder / "summary.json").read_text())
    assert f"scripts/studies/{name}.py --size ci" in summary["command"]
    assert summary["hardware"] and summary["versions"]["trl"] and len(summary["cells"]) == len(rows)
    assert (folder / "table.md").read_text().count("\n| ") >= len({row["method"] for row in rows})
    assert (folder / "figure.png").stat().st_size > 5000
    return rows


@pytest.mark.slow
def test_consistency_rdro_reaches_p_plus_and_dpo_does_not(tmp_path):
    rows = run("consistency", tmp_path)
    kl = {(row["data"], row["method"]): row["kl"] for row in rows}
    assert kl["pairs", "rdro"] < 0.005 < 1 < kl["pairs", "dpo"]
    assert kl["labels", "rdro"] < 0.03


def test_the_limit_of_a_pairwise_loss_is_that_of_its_beta():
    consistency = import_module("consistency")
    limits = {beta: consistency.limit({"loss_type": "sigmoid", "beta": beta}) for beta in (0.1, 2.0, 3.0, 4.0)}
    # The beta that the study gives dpo is near the best one, and there DPO still stops short of p+
    assert 0.003 < limits[3.0] < min(limits[2.0], limits[4.0]) < limits[0.1]
    assert consistency.limit({"loss_type": "rdro"}) is None


@pytest.mark.slow
def test_stability_rdro_stays_finite_and_moves_towards_p_plus(tmp_path):
    rows = {row["method"]: row for row in run("stability", tmp_path)}
    assert rows["rdro"]["diverged"] == 0 and rows["rdro"]["kl"] < rows["rdro"]["kl_before"] / 5
    assert rows["ddro, cap 0.99"]["capped_chosen"] > 0.1  # the ratio p+/pi_ref lies beyond the cap
    assert "capped_chosen" not in rows["rdro"]


@pytest.mark.slow
def test_one_alpha_for_prompts_of_unequal_shares_is_worse_than_the_reference_and_their_own_are_not(tmp_path):
    """A tiny Qwen2 through `KTOTrainer`; with one alpha the mass on the hard prompt's answers is alpha(x) / alpha."""
    rows = {row["method"]: row for row in run("prompt_shares", tmp_path)}
    one = rows["rdro, one alpha"]
    assert one["kl"] > 1.3 * one["kl_reference"]
    assert one["mass_0.12"] == pytest.approx(0.12 / one["alpha"], abs=0.04) and one["mass_0.4"] > 0.99
    for method in ("rdro, alpha(x)", "ddro, t(x)"):
        assert rows[method]["kl"] < 0.01
        for share in (0.12, 0.4, 0.8):
            assert rows[method][f"mass_{share}"] > 0.99
            assert rows[method][f"kl_{share}"] < rows[method][f"kl_reference_{share}"]


@pytest.mark.slow
def test_rdro_goes_to_p_plus_at_any_length_with_the_mixture_and_stops_without(tmp_path):
    rows = {(row["reference"], row["method"], row["length"]): row for row in run("reference_length", tmp_path)}
    for length in (20, 500):
        exact = rows["exact mixture", "rdro", length]
        assert exact["share"] > 0.8
        assert abs(exact["log_normalisation"]) < max(0.03, 3 * exact["log_normalisation_error"])
    assert rows["SFT on both", "rdro", 500]["share"] < 0.5 < rows["SFT on both", "rdro", 20]["share"]
    assert max(rows["base", "rdro", length]["share"] for length in (20, 500)) < 0.3
    # ddro at t = 1/2 becomes SFT on the chosen, which the live test sees at once
    assert rows["SFT on both", "ddro", 500]["share"] == pytest.approx(
        rows["SFT on both", "sft", 500]["share"], abs=0.05
    )
    assert min(rows[reference, "ddro", 500]["log_normalisation"] for reference in ("SFT on both", "base")) > 1


@pytest.mark.slow
def test_people_shift_and_resuming(tmp_path, monkeypatch):
    model = save_tiny(tmp_path, kind="llama")
    rows = run("people_shift", tmp_path / "out", "--model", model)
    for row in rows:
        values = [row[f"accuracy_{domain}"] for domain in ("film", "product", "tweet", "editorial")]
        assert row["accuracy_worst"] == min(values) and row["accuracy_mean"] == pytest.approx(sum(values) / 4)

    # As if killed while it wrote its last line: the first cell is kept, the second is run again
    record = tmp_path / "out" / "cells.jsonl"
    lines = record.read_text().splitlines(keepends=True)
    record.write_text(lines[0] + lines[1][:20])
    calls = []
    module = import_module("people_shift")

    def counted(cell, folder):
        calls.append(cell["method"])
        return module.run(cell, folder)

    monkeypatch.setattr(module.STUDY, "run", counted)
    counted.__module__ = module.__name__
    again = study.main(module.STUDY, ["--size", "ci", "--output_dir", str(tmp_path / "out"), "--model", model])
    assert calls == [rows[1]["method"]]
    assert again == rows  # and gives the same figures


@pytest.mark.slow
def test_displacement_sft_raises_what_it_trains_on(tmp_path):
    rows = {
        row["method"]: row
        for row in run("displacement", tmp_path / "out", "--model", save_tiny(tmp_path, kind="llama"))
    }
    assert rows["sft"]["chosen"] > 0.1


def test_comparison_tunes_once_and_beats_chance(tmp_path, monkeypatch):
    rows = run("comparison", tmp_path)
    assert all(row["accuracy"] > 0.6 for row in rows)
    tried = (tmp_path / "tuning.jsonl").read_text().splitlines()
    assert len(tried) == 2 * len(rows)
    comparison = import_module("comparison")
    monkeypatch.setattr(comparison, "trained", None)  # nothing is trained for what is known
    assert comparison.tuned(rows[0], tmp_path) == (rows[0]["rate"], rows[0]["beta"])


@pytest.mark.parametrize("data", ["language", "ratings"])
def test_a_finite_policy_is_normalised_and_learns(data):
    finite_policies = import_module("finite_policies")
    task = finite_policies.TASKS[data]()
    pairs = task.flipped(320, 0.0, seed=0)
    assert task.accuracy(torch.zeros(task.features.shape[1])) == 0.5
    theta = finite_policies.train(task, pairs, "sigmoid", steps=40, rate=0.1, beta=0.3, seed=0)
    assert task.accuracy(theta) > 0.6 and task.accuracy(theta, pairs) > 0.8
    policy = (task.log_reference + task.logratios(theta)).exp()
    for prompt in task.prompts.unique():
        assert policy[task.prompts == prompt].sum() == pytest.approx(1, abs=1e-4)
    wrong = (task.flipped(640, 0.25, seed=0) != task.flipped(640, 0.0, seed=0)).any(dim=1)
    assert wrong.float().mean() == pytest.approx(0.25, abs=4 * (0.19 / 640) ** 0.5)


def test_t_test_and_holm_against_tabulated_values():
    paired = import_module("paired")
    # Student's t: 2.262 has 5 % outside with 9 degrees of freedom, 12.706 with 1, 4.781 has 0.1 % with 9
    for t, freedom, outside in ((2.262157, 9, 0.05), (12.7062, 1, 0.05), (4.780913, 9, 0.001), (0.0, 4, 1.0)):
        assert 2 * paired._tail(t, freedom) == pytest.approx(outside, rel=1e-4)
    values = [1.0, 2.0, 3.0, 4.0]  # t = 2.5 / sqrt(5/12) = 3.873 with 3 degrees of freedom
    assert paired.t_test(values) == pytest.approx(0.030466, rel=1e-3)
    assert paired.t_test([0.0, 0.0]) == 1 and paired.t_test([0.1, 0.1]) == 0
    assert paired.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_comparison_prints_wins_and_defeats_alike():
    comparison = import_module("comparison")
    effects = {"dpo": 0.0, "repo": 0.1, "kldpo": -0.1, "ropo": 0.0}
    rng = random.Random(0)
    rows = [
        {
            "data": "language",
            "flips": 0.2,
            "method": method,
            "seed": seed,
            "accuracy": 0.7 + effect + rng.gauss(0, 0.01),
        }
        for method, effect in effects.items()
        for seed in range(10)
    ]
    text = comparison.table(rows)
    assert "Better than dpo beyond chance: repo at 20%. Worse than dpo beyond chance: kldpo at 20%." in text
    lines = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if line.startswith("| ")}
    assert "\\*)" in lines["repo"] and "\\*)" in lines["kldpo"] and "\\*" not in lines["ropo"] + lines["dpo"]


@pytest.mark.slow
def test_reward_shift_measures_every_mixture(tmp_path):
    for row in run("reward_shift", tmp_path / "out", "--model", save_tiny(tmp_path, kind="llama")):
        accuracies = [row[f"accuracy_{i / 10}"] for i in range(11)]
        assert row["worst"] == min(accuracies) and all(0 <= accuracy <= 1 for accuracy in accuracies)


def test_reward_shift_mixes_two_rewards_that_differ():
    module, ratings = import_module("reward_shift"), import_module("ratings")
    pairs = module.random_pairs(module.texts_with_rewards(ratings.quickstart_pairs()), random.Random(0))
    assert {pair["split"] for pair in pairs} == {"train", "test"}
    assert all("positive" not in pair["prompt"] for pair in pairs)
    gaps = torch.tensor([pair["gaps"] for pair in pairs])
    assert abs(torch.corrcoef(gaps.T)[0, 1]) < 0.15  # otherwise there would be no shift
    assert [module.mixed(pairs[0], a) for a in (0.0, 1.0)] == pairs[0]["gaps"][::-1]


@pytest.mark.parametrize("size", ["small", "full"])
def test_the_sizes_that_tests_do_not_run_have_cells_and_enough_pairs(size):
    assert all(import_module(name).cells(size) for name in NAMES)
    ratings, people_shift = import_module("ratings"), import_module("people_shift")
    pool = [pair for pair in ratings.quickstart_pairs() if pair["split"] == "train"]
    for shares in (people_shift.SHARES, import_module("displacement").SHARES):
        drawn = ratings.draw_pairs(pool, shares, ratings.SIZES[size], seed=0)
        assert len({pair["chosen"] for pair in drawn}) == ratings.SIZES[size].train_pairs


def test_a_cut_vocabulary_splits_texts_alike_and_only_shares_out_the_rest(tmp_path):
    directory = save_tiny(tmp_path, kind="llama")
    texts = ["the film was good", " a song: it felt warm"]
    target = import_module("vocabulary").cut_vocabulary(directory, texts, tmp_path / "cut")
    models = [AutoModelForCausalLM.from_pretrained(path) for path in (directory, target)]
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in (directory, target)]
    assert models[1].config.vocab_size == len(tokenizers[1]) < len(tokenizers[0])
    assert tokenizers[1].decode(tokenizers[1](texts[0])["input_ids"]) == texts[0]
    kept = [
        tokenizers[0].convert_tokens_to_ids(token)
        for token in tokenizers[1].convert_ids_to_tokens(range(len(tokenizers[1])))
    ]
    logits = [
        model(**tokenizer(texts[1], return_tensors="pt", return_token_type_ids=False)).logits
        for model, tokenizer in zip(models, tokenizers, strict=True)
    ]
    torch.testing.assert_close(logits[0][..., kept], logits[1])


def test_the_document_shows_the_committed_results():
    text = (ROOT / "docs" / "studies.md").read_text()
    for name in NAMES:
        assert f"](results/studies/{name}/figure.png)" in text
        assert (RESULTS / name / "cells.csv").exists()
