"""The studies at their smallest: each runs through its command line, resumes, and shows a fact that must hold."""

import csv
import json
import math
import random
import re
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import study
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..tiny import save_tiny


ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results" / "studies"
NAMES = [
    *("consistency", "stability", "linear_shift", "people_shift", "wording_shift", "comparison", "displacement"),
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
    assert summary["hardware"] and summary["versions"]["trl"]
    assert sum(cell["seeds"] for cell in summary["cells"]) == len(rows)
    assert (folder / "table.md").read_text().count("\n| ") >= len({row["method"] for row in rows})
    assert (folder / "figure.png").stat().st_size > 5000
    return rows


@pytest.mark.slow
def test_consistency_at_its_smallest(tmp_path):
    rows = run("consistency", tmp_path)
    most = max(row["n"] for row in rows if not row.get("trained"))
    kl = {(row["data"], row["method"], row["pi"], row["reference"]): row["kl"] for row in rows if row["n"] == most}
    assert kl["pairs", "rdro", 0.5, "exact"] < 0.8 * kl["pairs", "sft", 0.5, "exact"]
    for method in ("rdro", "ddro"):  # with a reference fitted to the same labels all three are one
        assert kl["labels", method, 0.39, "fitted"] == pytest.approx(kl["labels", "sft", 0.39, "exact"], rel=1e-3)
    assert kl["labels", "rdro, pooled", 0.2, "exact"] > 50 * kl["labels", "rdro", 0.2, "exact"]
    assert kl["prompts", "rdro, one alpha", 0.4, "exact"] > 5 * kl["prompts", "rdro, alpha per prompt", 0.4, "exact"]
    trained = [row["ratio"] for row in rows if row.get("trained")]
    assert len(trained) == 2 and all(0.8 < ratio < 1.25 for ratio in trained)


def test_the_minimiser_of_a_loss_whose_minimiser_is_known():
    minimisers = import_module("minimisers")
    plus, minus = torch.rand(2, 3, 36, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.1
    plus, minus = (weights / weights.sum(dim=1, keepdim=True) for weights in (plus, minus))
    reference = torch.full((36,), 1 / 36, dtype=torch.float64)

    def sft(z, preferred):
        return torch.where(preferred, -z, 0.0 * z)

    torch.testing.assert_close(minimisers.minimiser(sft, plus, minus, reference).exp(), plus, rtol=1e-5, atol=1e-8)
    # rdro, where the reference is the mixture: p+, whatever p- is
    rdro = import_module("consistency").loss_at("rdro", 0.3)
    mixture = 0.3 * plus + 0.7 * minus
    torch.testing.assert_close(minimisers.minimiser(rdro, plus, minus, mixture).exp(), plus, rtol=1e-4, atol=1e-7)


def test_the_slope_is_that_of_a_power_law():
    rows = [{"n": n, "log_kl": 3 - 0.9 * math.log(n), "log_kl_error": 0.01} for n in (300, 1000, 10_000, 100_000)]
    rows[0]["log_kl"] += 5  # below the n from which it is fitted
    rate, half = import_module("consistency").slope(rows)
    assert rate == pytest.approx(-0.9) and 0 < half < 0.02


def test_the_limit_of_a_pairwise_loss_is_that_of_its_beta():
    limit = import_module("consistency").limit
    limits = {beta: limit("sigmoid", beta) for beta in (0.1, 2.0, 3.0, 4.0)}
    # The beta that the study gives dpo is near the best one, and there DPO still stops short of p+
    assert 0.003 < limits[3.0] < min(limits[2.0], limits[4.0]) < limits[0.1]


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_kto_and_apo_zero_give_up_what_is_preferred_less_often_than_not(beta):
    """Their population objective is linear in sigma(beta z) with the weights (1 - pi) p- - pi p+: however long they
    are trained, a completion with a positive weight goes on losing mass, so that KL(p+ || policy) has no finite
    limit."""
    language = import_module("language").cyclic_language()
    p_plus, p_minus = torch.tensor(language.p_plus), torch.tensor(language.p_minus)
    reference, weight = (p_plus + p_minus) / 2, (p_minus - p_plus) / 2
    logits = torch.zeros(36, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.05)
    divergences = []
    for step in range(1, 2001):
        log_policy = (logits + reference.log()).log_softmax(dim=0)
        loss = (weight * torch.sigmoid(beta * (log_policy - reference.log()))).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in (200, 2000):
            divergences.append((p_plus * (p_plus.log() - log_policy.detach())).sum().item())
            mass = log_policy.detach().exp()[weight > 0].sum().item()
    assert divergences[1] > divergences[0] + 1 > 2
    assert mass < 0.01 < 0.2 < p_plus[weight > 0].sum()


@pytest.mark.slow
def test_stability_rdro_moves_towards_p_plus_and_a_wrong_reference_shows(tmp_path):
    rows = {(row["reference"], row["method"]): row for row in run("stability", tmp_path)}
    assert rows["mixture", "rdro"]["diverged"] == 0
    assert rows["mixture", "rdro"]["kl"] < rows["mixture", "rdro"]["kl_before"] / 5
    assert rows["mixture", "ddro, cap 0.99"]["largest_ratio"] <= 1 < rows["base", "ddro, cap 0.99"]["largest_ratio"]
    assert rows["base", "ddro, cap 0.99"]["capped_chosen"] > rows["mixture", "ddro, cap 0.99"]["capped_chosen"]
    assert "capped_chosen" not in rows["base", "rdro"]


def test_exact_intervals_of_shares():
    text = import_module("stability").diverged_text([{"diverged": 0.0}] * 10)
    assert text == "0/10 [0.00, 0.31]"  # 1 - 0.025^(1/10)
    assert (
        import_module("stability").diverged_text([{"diverged": 1.0}] * 3 + [{"diverged": 0.0}] * 7)
        == "3/10 [0.07, 0.65]"
    )


def test_linear_shift_compares_with_dpo_of_the_same_mean_loss(tmp_path):
    rows = run("linear_shift", tmp_path)
    for row in rows:
        assert abs(row["mean_less_scaled"]) < 1e-6 and abs(row["mean_less_stopped"]) < 2e-3
        assert row["ball_0.1_less_dpo"] < 0  # what the papers report
        assert row["mean"] < row["ball_0.1"] < row["ball_0.5"]


def test_the_worst_case_over_a_ball_is_that_of_its_tilted_weights():
    losses = torch.rand(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for tau in (0.1, 0.3):
        weights = torch.softmax(losses / tau, dim=0)
        radius = (weights * (weights * len(losses)).log()).sum().item()  # KL to uniform weights
        worst = import_module("linear_shift").worst_in_ball(losses, (radius,))
        assert worst.item() == pytest.approx((weights @ losses).item(), rel=1e-4)


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
        for group in ("majority", "minority"):
            assert row[group] == row[f"right_{group}"].count("1") / 8

    # As if killed while it wrote its last line: the others are kept, the last is run again
    record = tmp_path / "out" / "cells.jsonl"
    lines = record.read_text().splitlines(keepends=True)
    record.write_text("".join(lines[:-1]) + lines[-1][:20])
    calls = []
    module = import_module("people_shift")

    def counted(cell, folder):
        calls.append(cell["method"])
        return module.run(cell, folder)

    monkeypatch.setattr(module.STUDY, "run", counted)
    counted.__module__ = module.__name__
    again = study.main(module.STUDY, ["--size", "ci", "--output_dir", str(tmp_path / "out"), "--model", model])
    assert calls == [rows[-1]["method"]]
    assert again == rows  # and gives the same figures


def test_the_two_persons_want_the_opposite_of_the_same_texts():
    people_shift, ratings = import_module("people_shift"), import_module("ratings")
    pairs = ratings.quickstart_pairs()
    ann, bob = (people_shift.of(pairs[0], group) for group in ("majority", "minority"))
    assert (
        (ann["chosen"], ann["rejected"])
        == (bob["rejected"], bob["chosen"])
        == (pairs[0]["chosen"], pairs[0]["rejected"])
    )
    assert ann["prompt"].replace("Ann", "Bob") == bob["prompt"] and "positive" not in bob["prompt"]
    drawn = people_shift.training_pairs(pairs, 200, seed=0)
    assert [pair["group"] for pair in drawn].count("minority") == 30
    assert len({pair["chosen"] for pair in drawn} | {pair["rejected"] for pair in drawn}) == 400


def test_a_policy_blind_to_the_name_tells_nobody_apart():
    rng, rows = random.Random(0), []
    for method, seed in ((method, seed) for method in ("dpo", "kldpo") for seed in range(3)):
        right = {"majority": "".join(rng.choices("01", [1, 4], k=20))}
        right["minority"] = right["majority"].translate(str.maketrans("01", "10"))
        row = {"method": method, "rate": 1e-3, "seed": seed}
        for group, digits in right.items():
            row |= {group: digits.count("1") / 20, f"margin_{group}": 0.0, f"right_{group}": digits}
        rows.append(row)
    blind = "| +0.000 [+0.000, +0.000] |\n"  # the last column
    assert import_module("people_shift").table(rows).count(blind) == 2
    other = [{**row, "right_minority": "1" * 20} for row in rows]
    assert blind not in import_module("people_shift").table(other)


@pytest.mark.slow
def test_wording_shift_counts_each_wording(tmp_path):
    rows = run("wording_shift", tmp_path / "out", "--model", save_tiny(tmp_path, kind="llama"))
    for row in rows:
        right = [row[f"right_{wording}"].count("1") / 8 for wording in ("typing errors", "synonyms", "capitals")]
        assert row["reworded"] == pytest.approx(sum(right) / 3)
        assert row["loss_reworded"] == pytest.approx(math.log(2), abs=0.1)  # after two steps
    assert {row["method"] for row in rows} == {"dpo", "wdpo, rho 0.01"}


def test_wordings_say_the_same():
    wordings, ratings = import_module("wordings"), import_module("ratings")
    text = "A really GREAT film: I love it, the DVD also, and its quiet ending."
    assert wordings.typing_errors(text) == "A really GREAT flim: I love it, the DVD also, and its qiuet ending."
    assert wordings.synonyms(text) == "A truly GRAND picture: I adore it, the DVD too, and its quiet ending."
    texts = [pair[side] for pair in ratings.held_out(ratings.quickstart_pairs(), 256) for side in ratings.SIDES]
    for wording, share in (("typing errors", 0.9), ("synonyms", 0.65), ("capitals", 0.99)):
        assert sum(wordings.WORDINGS[wording](text) != text for text in texts) > share * len(texts)
    assert all(sorted(wordings.typing_errors(text)) == sorted(text) for text in texts)


def test_the_whole_model_trains_as_the_one_whose_first_layers_are_kept(tmp_path):
    """wdpo trains the whole model, on packed rows; without its penalty it is DPO."""
    ratings = import_module("ratings")
    pairs = ratings.quickstart_pairs()[:6]
    cell = {"model": save_tiny(tmp_path, kind="llama"), "size": "ci", "seed": 0}
    texts = [pair["prompt"] + pair[side] for pair in pairs for side in ratings.SIDES]
    subject = ratings.Subject(cell, tmp_path, texts, dtype=torch.float32)
    scores = [
        subject.train_and_score({**options, "learning_rate": 1e-2}, pairs, pairs, at=(3,))[0]
        for options in ({"loss_type": "sigmoid"}, {"loss_type": "wdpo", "wdpo_rho": 0.0})
    ]
    assert scores[0].abs().min() > 1e-3
    torch.testing.assert_close(*scores, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_displacement_sft_raises_what_it_trains_on(tmp_path):
    rows = {
        row["method"]: row
        for row in run("displacement", tmp_path / "out", "--model", save_tiny(tmp_path, kind="llama"))
    }
    assert rows["sft"]["trained_chosen_8"] > rows["sft"]["trained_chosen_1"] + 5
    assert rows["dpo"]["trained_chosen_8"] - rows["dpo"]["trained_rejected_8"] > 1
    assert rows["sft"]["chosen_8"] != rows["sft"]["trained_chosen_8"]


def test_near_identical_pairs_differ_in_one_word():
    opposites, ratings = import_module("opposites"), import_module("ratings")
    pairs = opposites.near_identical(ratings.quickstart_pairs())
    assert len(pairs) > 1000
    for pair in pairs:
        chosen, rejected = (re.findall(r"[A-Za-z']+|[^A-Za-z']", pair[side]) for side in ratings.SIDES)
        (words,) = [(a.lower(), b.lower()) for a, b in zip(chosen, rejected, strict=True) if a != b]
        assert opposites.NEGATIVE[words[0]] == words[1]
    assert opposites._replaced("Won't be GOOD, or good", opposites.NEGATIVE) == "Won't be BAD, or good"
    assert opposites._replaced("So-so.", opposites.NEGATIVE) is None


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_frozen_layers_give_the_same_model(kind, tmp_path):
    """Values and gradients of the layers that are left, whatever the padding, and each text is computed once."""
    freeze = import_module("frozen_layers").freeze_first_layers
    models = [AutoModelForCausalLM.from_pretrained(save_tiny(tmp_path, kind=kind)).double() for _ in range(2)]
    layers, padding = models[0].config.num_hidden_layers, models[0].config.pad_token_id
    kept = {}
    freeze(models[1], layers - 1, kept)
    texts = [[5, 6, 7, 8, padding], [5, 9], [5, 6, 7, 8, 9, 10]]  # the first ends with what is also the padding
    for width in (6, 9):
        ids = torch.tensor([text + [padding] * (width - len(text)) for text in texts])
        mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts])
        outputs = [model(ids, attention_mask=mask).logits[mask.bool()] for model in models]
        torch.testing.assert_close(*outputs)
        for output in outputs:
            output.square().sum().backward()
    torch.testing.assert_close(*(list(model.get_decoder().layers)[-1].mlp.up_proj.weight.grad for model in models))
    assert len(kept) == len(texts)


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
    assert paired._quantile(0.025, 9) == pytest.approx(2.262157, rel=1e-4)
    assert paired._quantile(0.025, 1) == pytest.approx(12.7062, rel=1e-4)
    assert paired.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_the_interval_over_draws_and_pairs_covers_what_both_vary():
    """Of differences that vary by draw and by pair only, the mean's error is that of both; one way alone misses it."""
    two_way_interval = import_module("paired").two_way_interval
    rng, covered, too_short = np.random.default_rng(0), 0, 0
    for _ in range(200):
        differences = rng.normal(size=(20, 1)) + 2 * rng.normal(size=(1, 30)) + 0.1 * rng.normal(size=(20, 30))
        low, high = two_way_interval(differences, replicates=500)
        covered += low < 0 < high
        low, high = two_way_interval(differences.mean(axis=1, keepdims=True), replicates=500)
        too_short += not low < 0 < high
    assert covered >= 176  # 95 % less three standard errors, and a little for 20 draws
    assert too_short > 30
    low, high = two_way_interval(differences)
    covered = 0
    for _ in range(300):  # ten draws that hardly agree: percentiles alone hold .91
        few = 0.3 * rng.normal(size=(10, 1)) + 0.1 * rng.normal(size=(1, 256)) + 0.3 * rng.normal(size=(10, 256))
        interval = two_way_interval(few, replicates=400)
        covered += interval[0] < 0 < interval[1]
    assert covered >= 0.94 * 300
    wide = two_way_interval(differences, comparisons=10)
    assert wide[0] < low and high < wide[1]


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


@pytest.mark.parametrize("size", ["small", "full"])
def test_the_sizes_that_tests_do_not_run_have_cells_and_enough_pairs(size):
    assert all(import_module(name).cells(size) for name in NAMES)
    names = ("ratings", "people_shift", "wording_shift", "displacement")
    ratings, people_shift, wording_shift, displacement = map(import_module, names)
    pairs, per_step = ratings.quickstart_pairs(), ratings.SIZES[size].pairs_per_step
    assert len(ratings.draw(pairs, wording_shift.STEPS[size] * per_step, seed=0))
    assert len(people_shift.training_pairs(pairs, people_shift.STEPS[size] * per_step, seed=0))
    assert len(ratings.held_out(pairs, ratings.SIZES[size].test_pairs)) == 256
    pairs = import_module("opposites").near_identical(pairs)
    assert len(ratings.draw(pairs, displacement.STEPS_PER_EPOCH[size] * per_step, seed=0))
    assert len(ratings.held_out(pairs, displacement.HELD_OUT[size])) == displacement.HELD_OUT[size]


def test_what_is_made_once_is_made_whole_and_once(tmp_path):
    made_once = import_module("made_once").made_once

    def interrupted(directory):
        (directory / "half").touch()
        raise KeyboardInterrupt

    def while_another_is_quicker(directory):
        (directory / "file").write_text("second")
        made_once(tmp_path / "made", lambda other: (other / "file").write_text("first"))

    with pytest.raises(KeyboardInterrupt):
        made_once(tmp_path / "made", interrupted)
    assert list(tmp_path.iterdir()) == []
    made_once(tmp_path / "made", while_another_is_quicker)
    assert (made_once(tmp_path / "made", interrupted) / "file").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


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
        if not (RESULTS / name).exists():
            assert f"{name}.py" in text and "has not been run at size small yet" in text
            continue
        assert f"](results/studies/{name}/figure.png)" in text
        assert (RESULTS / name / "cells.csv").exists()
