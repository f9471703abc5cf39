"""`trl-rdro inspect`: the printed row is what the trainer's collator makes, and each warning is provoked."""

import json
import re

import pytest
import yaml
from datasets import Dataset
from tokenizers import processors

import trl_rdro
import trl_rdro.quickstart
from trl_rdro.cli import main

from ..helpers import ROOT, refusal
from ..tiny import cpu_args, tiny_preferences, tiny_tokenizer


USER = "<|im_start|>user\n{}<|im_end|>\n"


def message(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def conversation(question: str, good: str = "it is good", bad: str = "it is bad") -> dict:
    return {
        "prompt": [message("user", question)],
        "chosen": [message("assistant", good)],
        "rejected": [message("assistant", bad)],
    }


@pytest.fixture
def with_bos(tmp_path) -> str:
    """A tokenizer that puts <|endoftext|> before every text, and no weights beside it."""
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.bos_token_id)]
    )
    tokenizer.save_pretrained(tmp_path / "with_bos")
    (tmp_path / "with_bos" / "config.json").write_text('{"model_type": "qwen2", "vocab_size": 384}')
    return str(tmp_path / "with_bos")


@pytest.fixture
def inspect(tmp_path, model, capsys):
    """Run the command on these rows; keyword arguments are keys of the YAML file. Returns what was printed."""

    def run(rows: list[dict], *argv: str, method: str = "", **settings) -> str:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        defaults = cpu_args(model_name_or_path=model, dataset_name=str(path), loss_type="rdro", max_length=64)
        (tmp_path / "c.yaml").write_text(yaml.safe_dump({**defaults, "output_dir": str(tmp_path), **settings}))
        capsys.readouterr()
        code = main(["inspect", *([method] if method else []), "--config", str(tmp_path / "c.yaml"), *argv])
        if code:
            return refusal(capsys, code)
        return capsys.readouterr().out

    return run


def warnings(printed: str) -> list[str]:
    """The words in capitals before the colon of each warning."""
    return re.findall(r"^! ([A-Z ]+):", printed, re.MULTILINE)


PAIRS = tiny_preferences(10).to_list()


# The row


def test_mask_and_text_are_the_trainers(inspect, tmp_path, model):
    rows = [*PAIRS[:2], {**PAIRS[2], "chosen": PAIRS[2]["chosen"] * 12}]
    args = trl_rdro.DPOConfig(**cpu_args(output_dir=str(tmp_path), loss_type="rdro", max_length=64))
    trainer = trl_rdro.DPOTrainer(model, args=args, train_dataset=Dataset.from_list(rows))
    tokenizer = trainer.processing_class
    for number in range(3):
        printed = inspect(rows, "--row", str(number), "--color")
        batch = trainer.data_collator([trainer.train_dataset[number]])
        blocks = re.split(r"^(?:chosen|rejected): .*\n", printed, flags=re.MULTILINE)[1:]
        for side, block in enumerate(blocks):
            block = block.partition("\n\n")[0]
            for kind, code, mask_value in (("prompt", "36", 0), ("completion", "32", 1)):
                # The text in this colour, and special tokens (in theirs) on the lines of this kind
                shown = "".join(
                    re.sub(r"\033\[[\d;]*m", "", line.partition(" | ")[2])
                    for line in block.splitlines()
                    if line.strip().startswith(kind)
                )
                assert f"\033[{code}m" in block
                kept = (batch["completion_mask"][side] == mask_value) & (batch["attention_mask"][side] == 1)
                assert shown == tokenizer.decode(batch["input_ids"][side][kept])


def test_no_weights_are_needed(inspect, with_bos):
    printed = inspect(PAIRS, model_name_or_path=with_bos)
    assert "prompt     | <|endoftext|>tell me about" in printed
    assert "Nothing looks wrong." in printed


def test_special_tokens_have_their_colour(inspect):
    printed = inspect([conversation("how is it")], "--color")
    assert "\033[1;33m<|im_end|>\033[0m" in printed
    assert "conversational" in printed
    assert "\033" not in inspect([conversation("how is it")])


def test_what_is_cut_off_is_shown(inspect, tmp_path):
    long = [{**PAIRS[0], "rejected": " it was" + " very" * 40 + " bad"}]
    printed = inspect(long)
    headings = re.findall(r"^(?:chosen|rejected): .*$", printed, re.MULTILINE)
    assert [heading.endswith("TRUNCATED") for heading in headings] == [False, True]
    tail = next(line for line in printed.splitlines() if line.strip().startswith("cut off"))
    assert tail.endswith("very bad<|im_end|>")
    kept_end = inspect(long, truncation_mode="keep_end")
    head = next(line for line in kept_end.splitlines() if line.strip().startswith("cut off"))
    assert head.partition(" | ")[2].startswith("tell me")


# All rows


def test_counts_and_lengths(inspect, tmp_path, model):
    printed = inspect(PAIRS)
    tokenizer = tiny_tokenizer()
    lengths = sorted(len(tokenizer(row["prompt"]).input_ids) for row in PAIRS)
    assert "Pairs: 10" in printed
    cells = re.search(r"^prompt +([\d ]+)$", printed, re.MULTILINE)[1].split()
    assert list(map(int, cells)) == [lengths[0], lengths[0], lengths[5], lengths[9], lengths[9], lengths[9]]
    assert "0 of 10 (0.0%) truncated, 0 of 10 (0.0%) dropped" in printed


def test_padding_and_repeated_prompts_are_counted(inspect):
    """In one batch of all rows, which has no order."""
    tokenizer = tiny_tokenizer()
    rows = [{**row, "chosen": row["chosen"] * (1 + i)} for i, row in enumerate(PAIRS[:4])]
    tokens = [
        [len(tokenizer(row[name]).input_ids) + (name != "prompt") for name in ("prompt", "chosen", "rejected")]
        for row in rows
    ]
    positions = 8 * max(prompt + max(chosen, rejected) for prompt, chosen, rejected in tokens)
    forwarded = sum(2 * prompt + chosen + rejected for prompt, chosen, rejected in tokens)
    repeated = sum(prompt - 1 for prompt, _, _ in tokens)
    settings = {"per_device_train_batch_size": 4, "max_length": None}
    printed = inspect(rows, **settings)
    assert (
        f"Batches of 4 pairs in random order: {1 - forwarded / positions:.0%} of positions are padding, "
        f"{repeated / forwarded:.0%} of tokens are a prompt for the second time" in printed
    )
    fewer = f"{positions / (forwarded - repeated):.2f} times fewer with shared prompts"
    assert f"padding_free would forward {fewer}" in printed
    assert f"padding_free forwards {fewer}" in inspect(rows, padding_free=True, **settings)
    assert f"padding_free would forward {positions / forwarded:.2f} times fewer:" in inspect(
        rows, share_prompt=False, **settings
    )


def test_classes_are_counted(inspect):
    rows = [
        {"prompt": row["prompt"], "completion": row["chosen"], "label": number < 3} for number, row in enumerate(PAIRS)
    ]
    printed = inspect(rows, "--row", "5")
    assert "Method:    kto (seen from the columns of the data" in printed
    assert "3 of 10 (30.0%) preferred, 7 not" in printed
    assert "completion, label False: " in printed
    assert re.search(r"completions in random order: \d+% of positions are padding$", printed, re.MULTILINE)
    paired = inspect(PAIRS, method="kto")
    assert "10 of 20 (50.0%) preferred" in paired and "seen from" not in paired


def test_an_option_of_one_method_only_decides(inspect):
    assert "kto (seen from its options" in inspect(PAIRS, desirable_weight=2.0)
    assert "dpo (seen from its options" in inspect(PAIRS, kldpo_tau=0.5)


def test_limit_and_streaming(inspect):
    assert "the first 4 of 10" in inspect(PAIRS, "--limit", "4")
    printed = inspect(PAIRS, "--limit", "4", dataset_streaming=True)
    assert "the first 4\n" in printed and "Pairs: 4" in printed


def test_columns_that_the_loss_reads_are_shown(inspect):
    rows = [{**row, "weight": float(i), "group": f"g{i % 3}", "annotator": i} for i, row in enumerate(PAIRS)]
    printed = inspect(rows, loss_type="grdpo", inner_loss_type="repo")
    assert "weight: mean 4.5, min 0, 5 % 0, 50 % 5, 95 % 9, max 9, 1 are 0\n" in printed
    assert "group: 3 in all: g0 4 (40.0%), g1 3 (30.0%), g2 3 (30.0%)\n" in printed
    assert "annotator: 10 in all: 0 1 (10.0%), 1 1 (10.0%), " in printed
    soft = [{**row, "preference_probability": 0.5 + i / 20} for i, row in enumerate(PAIRS)]
    assert "preference_probability: mean 0.725, min 0.5," in inspect(soft, loss_type="dpopro")
    plain = inspect(rows)  # rdro has no groups
    assert "weight: mean" in plain and "group:" not in plain


def test_columns_that_the_loss_needs_are_asked_for(inspect):
    assert "lacks the column preference_probability" in inspect(PAIRS, loss_type="gdpo")
    assert "`weight` must be a finite number of at least 0" in inspect([{**row, "weight": -1.0} for row in PAIRS])


def test_another_split(inspect, tmp_path):
    rows = [{"prompt": row["prompt"], "completion": row["chosen"], "label": True} for row in PAIRS]
    (tmp_path / "data").mkdir()
    for split, count in (("train", 10), ("dev", 3)):
        Dataset.from_list(rows[:count]).to_json(tmp_path / "data" / f"{split}.jsonl")
    # datasets calls it validation
    printed = inspect(rows, "--split", "validation", dataset_name=str(tmp_path / "data"))
    assert "split validation\n" in printed and "3 of 3 (100.0%) preferred" in printed


def test_options_of_the_training_command_override_the_file(inspect):
    assert "max_length 20 (keep_end)" in inspect(PAIRS, "--max_length", "20", "--truncation_mode", "keep_end")


def test_a_recipe_for_a_gpu_can_be_inspected_without_one(inspect):
    assert "Nothing looks wrong." in inspect(PAIRS, use_cpu=False, bf16=True, tf32=True)


# Warnings


def test_nothing_is_wrong_with_good_rows(inspect):
    assert "Nothing looks wrong." in inspect(PAIRS)
    assert "Nothing looks wrong." in inspect([conversation("how is it")])


def test_truncated_and_dropped(inspect):
    rows = [
        PAIRS[0],
        {**PAIRS[1], "chosen": " so" * 80},
        {**PAIRS[2], "rejected": " so" * 90},
        {**PAIRS[3], "prompt": "so " * 70},
    ]
    printed = inspect(rows)
    assert warnings(printed) == ["TRUNCATED", "DROPPED"]
    assert "2 of 3 (66.7%) truncated, 1 of 4 (25.0%) dropped" in printed
    assert "2 of 3 rows, e.g. --row 1" in printed and "dropped" in printed
    assert "all 1 rows are dropped" in inspect(rows[3:])


def test_bos_twice(inspect, with_bos):
    rows = [{**row, "prompt": "<|endoftext|>" + row["prompt"]} for row in PAIRS[:2]] + PAIRS[2:]
    printed = inspect(rows, model_name_or_path=with_bos)
    assert warnings(printed) == ["BOS TWICE"]
    assert "2 of 10 rows, e.g. --row 0" in printed


@pytest.mark.parametrize("kind", ["rendered text in messages", "rendered text rendered again"])
def test_template_twice(inspect, kind):
    rendered = USER.format("how is it") + "<|im_start|>assistant\n"
    if kind == "rendered text in messages":
        bad = conversation(USER.format("how is it"))
    else:
        bad = {"prompt": USER.format(rendered), "chosen": "good", "rejected": "bad"}
    good = {"prompt": rendered, "chosen": "good", "rejected": "bad"}  # applied once, by hand
    good = conversation("how is it") if kind == "rendered text in messages" else good
    printed = inspect([good, bad])
    assert warnings(printed) == ["CHAT TEMPLATE TWICE"]
    assert "1 of 2 rows, e.g. --row 1" in printed


def test_no_eos(inspect, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"  # as base models have it, beside a chat template that ends turns otherwise
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "config.json").write_text('{"model_type": "qwen2", "vocab_size": 384}')
    printed = inspect([conversation("how is it")], model_name_or_path=str(tmp_path / "base"))
    assert warnings(printed) == ["NO EOS", "NO EOS"]
    assert "but with <|im_end|>, at which generation has to be told to stop" in printed
    assert "NO EOS" not in inspect(PAIRS, model_name_or_path=str(tmp_path / "base"))  # TRL adds it to plain text


def test_empty_and_equal(inspect):
    rows = [PAIRS[0], {**PAIRS[1], "rejected": ""}, {**PAIRS[2], "rejected": PAIRS[2]["chosen"]}]
    assert warnings(inspect(rows)) == ["EMPTY", "EQUAL"]
    assert warnings(inspect([conversation("how is it", bad="")])) == ["EMPTY"]


# Refusals


@pytest.mark.parametrize(
    ("argv", "settings", "words"),
    [
        (["--row", "10"], {}, ["no row 10", "10 rows"]),
        (["--row", "-1"], {}, ["no row -1"]),
        (["--row", "x"], {}, ["--row", "x"]),
        (["--limit", "0"], {}, ["--limit"]),
        (["--split", "nope"], {}, ["nope", "only: train"]),
        (["--rwo", "1"], {}, ["--rwo"]),
        ([], {"rdro_alhpa": 0.4}, ["rdro_alhpa", "did you mean"]),
        ([], {"wdpo_rho": -1.0}, ["wdpo_rho", "-1"]),
        ([], {"preferred_fraction": 2.0}, ["preferred_fraction", "2.0"]),
        ([], {"model_name_or_path": "/no/model"}, ["/no/model", "not a local directory"]),
        ([], {"dataset_name": "/no/data"}, ["/no/data"]),
    ],
)
def test_refusals(inspect, argv, settings, words):
    printed = inspect(PAIRS, *argv, **settings)
    for word in words:
        assert word in printed


def test_wrong_columns_are_refused(inspect):
    assert "chosen" in inspect([{"question": "a", "answer": "b"}])
    assert "label" in inspect([{"prompt": "a", "completion": "b", "label": 1}], method="kto")
    assert "images" in inspect([{**PAIRS[0], "images": []}])


def test_help(capsys):
    assert main(["inspect", "--help"]) == 0
    assert "--row" in capsys.readouterr().out


def test_the_quickstart_recipe(model, capsys):
    path = str(ROOT / "recipes" / "quickstart.yaml")
    argv = ["inspect", "--config", path, "--model_name_or_path", model, "--limit", "20"]
    assert main([*argv, "--dataset_name", trl_rdro.quickstart.QUICKSTART_DIR]) == 0
    assert "Pairs: 20" in capsys.readouterr().out


@pytest.mark.slow
def test_reference(inspect):
    printed = inspect(list(tiny_preferences(60)), "--reference")
    assert "held-out completions" in printed and "KL(data || reference) is at least" in printed
    assert "needs 40 rows, got 6" in inspect(list(tiny_preferences(60)), "--reference", "--limit", "6")
