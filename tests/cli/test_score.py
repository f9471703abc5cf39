"""`trl-rdro score`: its figures against loops over single tokens, and every way to name a model and a reference."""

import itertools
import json
import math
import shutil
import statistics

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from trl_rdro import DPOConfig, DPOTrainer
from trl_rdro.cli import main
from trl_rdro.tools import scoring

from ..helpers import refusal
from ..tiny import cpu_args, save_tiny, tiny_preferences, tiny_tokenizer


TOKENIZER = tiny_tokenizer()
ROWS = [
    {**row, "topic": "even" if number % 2 == 0 else "odd", "judge": number % 3}
    for number, row in enumerate(tiny_preferences(11).to_list())
]
UNPAIRED = [
    {"prompt": row["prompt"], "completion": row["chosen" if number % 3 else "rejected"], "label": number % 3 > 0}
    for number, row in enumerate(ROWS)
]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    """A policy, a reference, and an adapter on the reference with weights that matter."""
    root = tmp_path_factory.mktemp("models")
    names = {name: save_tiny(root / name, seed=seed) for seed, name in enumerate(("policy", "reference"))}
    torch.manual_seed(0)
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(names["reference"], dtype=torch.float32),
        LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    adapted.save_pretrained(root / "adapter")  # without a tokenizer
    return {**names, "adapter": str(root / "adapter")}


@pytest.fixture
def score(tmp_path, capsys):
    """Run the command on these rows and return its JSON, with what it printed under "printed"; or the refusal."""

    def run(rows: list[dict], *argv: str):
        path = tmp_path / "rows.jsonl"
        Dataset.from_list(rows).to_json(path)
        code = main(["score", "--dataset", str(path), "--output", str(tmp_path / "s.json"), *map(str, argv)])
        if code:
            return refusal(capsys, code)
        return {**json.loads((tmp_path / "s.json").read_text()), "printed": capsys.readouterr().out}

    return run


def naive_logp(model, row: dict, completion: str, max_length: int = 10**6) -> float:
    """One forward without padding, and a loop over the tokens of the completion."""
    prompt = TOKENIZER(row["prompt"]).input_ids
    ids = TOKENIZER(row["prompt"] + completion + "<|im_end|>").input_ids
    assert ids[: len(prompt)] == prompt
    ids = ids[:max_length]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double()
    total = 0.0
    for position in range(len(prompt), len(ids)):
        scores = logits[position - 1].tolist()
        total += scores[ids[position]] - math.log(sum(map(math.exp, scores)))
    return total


def load(name: str):
    return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()


def naive_ratios(policy, reference, column: str, rows=ROWS) -> list[float]:
    return [naive_logp(policy, row, row[column]) - naive_logp(reference, row, row[column]) for row in rows]


def assert_figures(figures: dict, chosen: list[float], rejected: list[float]) -> None:
    n = len(chosen)
    margins = [good - bad for good, bad in zip(chosen, rejected, strict=True)]
    correct = [float(margin > 0) for margin in margins]
    assert figures["n"] == n
    for name, values in (("accuracy", correct), ("margin", margins), ("chosen", chosen), ("rejected", rejected)):
        assert figures[name]["mean"] == pytest.approx(statistics.mean(values), abs=1e-4), name
        error = statistics.stdev(values) / math.sqrt(n)
        assert figures[name]["standard_error"] == pytest.approx(error, abs=1e-4), name


@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_pairs_against_a_loop_over_tokens(score, models, batch_size):
    argv = ["--model", models["policy"], "--ref", models["reference"], "--batch_size", batch_size]
    result = score(ROWS, *argv, "--group", "topic", "judge")
    policy, reference = load(models["policy"]), load(models["reference"])
    chosen, rejected = (naive_ratios(policy, reference, column) for column in ("chosen", "rejected"))
    for row, good, bad in zip(result["scores"], chosen, rejected, strict=True):
        assert (row["chosen"], row["rejected"]) == pytest.approx((good, bad), abs=2e-4)
    assert_figures(result["overall"], chosen, rejected)
    assert list(result["groups"]) == ["topic", "judge"]
    assert list(result["groups"]["judge"]) == ["0", "1", "2"]
    for start, value in enumerate(("even", "odd")):
        assert_figures(result["groups"]["topic"][value], chosen[start::2], rejected[start::2])
    assert result["score"] == "log-ratio" and result["reference"] == models["reference"]


def test_adapter_is_compared_with_its_model_without_it(score, models):
    result = score(ROWS, "--model", models["adapter"])
    from peft import PeftModel

    policy, reference = PeftModel.from_pretrained(load(models["reference"]), models["adapter"]), None
    reference = load(models["reference"])
    chosen, rejected = (naive_ratios(policy, reference, column) for column in ("chosen", "rejected"))
    assert max(map(abs, chosen)) > 0.1
    assert_figures(result["overall"], chosen, rejected)
    assert result["reference"] == f"{models['reference']} (adapter off)"
    # The same by naming the reference, and against itself nothing
    named = score(ROWS, "--model", models["adapter"], "--ref", models["reference"])
    for row, other in zip(result["scores"], named["scores"], strict=True):
        assert (row["chosen"], row["rejected"]) == pytest.approx((other["chosen"], other["rejected"]), abs=1e-5)
    itself = score(ROWS, "--model", models["adapter"], "--ref", models["adapter"])
    assert itself["overall"]["margin"] == {"mean": 0.0, "standard_error": 0.0}
    assert itself["overall"]["accuracy"] == {"mean": 0.5, "standard_error": 0.0}  # ties


def test_without_a_reference_log_probabilities_are_reported_and_said(score, models):
    result = score(ROWS, "--model", models["policy"])
    policy = load(models["policy"])
    chosen, rejected = ([naive_logp(policy, row, row[column]) for row in ROWS] for column in ("chosen", "rejected"))
    assert_figures(result["overall"], chosen, rejected)
    assert result["score"] == "log-probability" and result["reference"] is None
    assert "without --ref there is no reward" in result["printed"]


def test_unpaired_against_a_loop_over_tokens(score, models):
    result = score(UNPAIRED, "--model", models["policy"], "--ref", models["reference"], "--group", "label")
    ratios = naive_ratios(load(models["policy"]), load(models["reference"]), "completion", UNPAIRED)
    classes = {
        label: [z for z, row in zip(ratios, UNPAIRED, strict=True) if row["label"] is label]
        for label in (1 > 0, 1 < 0)
    }
    above, below = classes[True], classes[False]
    overall = result["overall"]
    for name, values in (("preferred", above), ("non_preferred", below)):
        assert overall[name]["n"] == len(values)
        assert overall[name]["mean"] == pytest.approx(statistics.mean(values), abs=1e-4)
        error = statistics.stdev(values) / math.sqrt(len(values))
        assert overall[name]["standard_error"] == pytest.approx(error, abs=1e-4)
    wins = [good > bad for good, bad in itertools.product(above, below)]
    assert overall["auc"]["mean"] == pytest.approx(statistics.mean(wins), abs=1e-9)
    assert result["groups"]["label"]["True"]["auc"]["mean"] is None  # one class only
    assert [row["label"] for row in result["scores"]] == [row["label"] for row in UNPAIRED]


def test_auc_counts_ties_one_half_and_its_error_is_that_of_repetitions():
    assert scoring.area_under_curve(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.0]))["mean"] == 0.875
    generator = torch.Generator().manual_seed(0)
    results = [
        scoring.area_under_curve(
            torch.randn(60, generator=generator, dtype=torch.float64) + 1,
            torch.randn(90, generator=generator, dtype=torch.float64),
        )
        for _ in range(400)
    ]
    spread = statistics.stdev(result["mean"] for result in results)
    assert statistics.mean(result["standard_error"] for result in results) == pytest.approx(spread, rel=0.1)
    # P(N(1, 1) > N(0, 1))
    assert statistics.mean(result["mean"] for result in results) == pytest.approx(0.7602, abs=0.01)


def test_scores_are_the_log_ratios_that_the_trainer_logs(score, models, tmp_path):
    rows = Dataset.from_list([{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in ROWS])
    args = DPOConfig(**cpu_args(output_dir=str(tmp_path), loss_type="rdro", per_device_eval_batch_size=11))
    reference = load(models["reference"])
    trainer = DPOTrainer(models["policy"], reference, args, train_dataset=rows, eval_dataset=rows)
    metrics = trainer.evaluate()
    overall = score(ROWS, "--model", models["policy"], "--ref", models["reference"])["overall"]
    assert overall["chosen"]["mean"] == pytest.approx(metrics["eval_logratios/chosen"], abs=1e-4)
    assert overall["rejected"]["mean"] == pytest.approx(metrics["eval_logratios/rejected"], abs=1e-4)
    assert overall["accuracy"]["mean"] == pytest.approx(metrics["eval_rewards/accuracies"], abs=1e-6)
    assert overall["margin"]["mean"] * args.beta == pytest.approx(metrics["eval_rewards/margins"], abs=1e-4)


def test_truncation_and_dropped_rows(score, models):
    rows = [
        {**ROWS[0], "prompt": "so " * 40},
        {**ROWS[1], "chosen": " so" * 60},
        *ROWS[2:],
    ]
    result = score(rows, "--model", models["policy"], "--max_length", "50")
    assert (result["rows"], result["dropped"], result["truncated"]) == (11, 1, 1)
    assert [row["row"] for row in result["scores"]] == list(range(1, 11))
    expected = naive_logp(load(models["policy"]), rows[1], rows[1]["chosen"], max_length=50)
    assert result["scores"][0]["chosen"] == pytest.approx(expected, abs=1e-3)
    assert "1 truncated to 50 tokens; 1 dropped" in result["printed"]
    whole = score(rows, "--model", models["policy"], "--max_length", "0")
    assert (whole["dropped"], whole["truncated"], whole["max_length"]) == (0, 0, None)


def test_bfloat16_is_near_float32(score, models):
    exact = score(ROWS, "--model", models["adapter"])
    rough = score(ROWS, "--model", models["adapter"], "--dtype", "bfloat16")
    assert (exact["dtype"], rough["dtype"]) == ("float32", "bfloat16")
    assert rough["overall"]["chosen"]["mean"] == pytest.approx(exact["overall"]["chosen"]["mean"], abs=0.3)
    assert rough["scores"] != exact["scores"]


def test_conversations_limit_and_table(score, models):
    rows = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
            "topic": row["topic"],
        }
        for row in ROWS
    ]
    result = score(rows, "--model", models["policy"], "--limit", "3", "--group", "topic")
    assert result["overall"]["n"] == 3 and len(result["scores"]) == 3
    assert result["groups"]["topic"]["odd"]["margin"]["standard_error"] is None  # a single row
    lines = result["printed"].split("\n\n")[1].splitlines()
    assert lines[-4].split() == ["rows", "accuracy", "margin", "chosen", "rejected"]
    assert lines[-3].startswith("all") and f"{result['overall']['margin']['mean']:.2f} ± " in lines[-3]
    assert lines[-2].startswith("topic = even") and lines[-1].startswith("topic = odd")


def test_groups_of_the_data_are_shown_without_asking(score, models):
    rows = [{**row, "group": row["topic"]} for row in ROWS]
    result = score(rows, "--model", models["policy"])
    assert result["groups"]["group"].keys() == {"even", "odd"} and "group = even" in result["printed"]
    assert list(score(rows, "--model", models["policy"], "--group", "judge")["groups"]) == ["judge"]


def test_split_of_a_directory(score, models, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    for split, rows in (("train", ROWS), ("test", ROWS[:2])):
        Dataset.from_list(rows).to_json(tmp_path / "data" / f"{split}.jsonl")
    argv = ["--model", models["policy"], "--dataset", tmp_path / "data"]
    assert score(ROWS, *argv)["overall"]["n"] == 2
    assert score(ROWS, *argv, "--split", "train")["overall"]["n"] == 11
    assert "test, train" in score(ROWS, *argv, "--split", "dev").replace("train, test", "test, train")


def test_adapter_on_the_head_is_refused(score, models, tmp_path):
    adapted = get_peft_model(load(models["reference"]), LoraConfig(r=2, target_modules=["lm_head"]))
    adapted.save_pretrained(tmp_path / "head")
    assert "output head" in score(ROWS, "--model", tmp_path / "head")


def test_another_vocabulary_is_refused(score, models, tmp_path):
    other = save_tiny(tmp_path, vocab_size=400)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(other)
    assert "another vocabulary" in score(ROWS, "--model", models["policy"], "--ref", other)


def test_a_tokenizer_without_an_end_is_refused(score, models, tmp_path):
    policy = shutil.copytree(models["policy"], tmp_path / "endless")
    settings = json.loads((policy / "tokenizer_config.json").read_text())
    (policy / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": None}))
    for rows in (ROWS, UNPAIRED):
        assert "has no end token" in score(rows, "--model", policy, "--ref", models["reference"])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--model", "/no/model"], ["cannot load the model /no/model", "not a local directory"]),
        (["--ref", "/no/model"], ["cannot load the model /no/model"]),
        (["--dataset", "/no/data"], ["/no/data"]),
        (["--dataset", "no/data.jsonl"], ["no/data.jsonl"]),
        (["--split", "nope"], ["nope", "train"]),
        (["--group", "colour"], ["colour", "topic"]),
        (["--batch_size", "0"], ["--batch_size", "0"]),
        (["--max_length", "3"], ["max_length 3"]),
        (["--output", "no/where/s.json"], ["no/where"]),
    ],
)
def test_refusals(score, models, argv, words):
    printed = score(ROWS, *(["--model", models["policy"]] if "--model" not in argv else []), *argv)
    for word in words:
        assert word in printed


def test_wrong_columns_are_refused(score, models):
    assert "chosen" in score([{"question": "a"}], "--model", models["policy"])
    assert "label" in score([{"prompt": "a", "completion": "b", "label": 3}], "--model", models["policy"])
