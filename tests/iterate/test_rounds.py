"""The loop with tiny models in this process."""

import gc
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedModel

from trl_rdro.iterate import rounds, sampling
from trl_rdro.iterate.judges import LabelledScores, RewardFunctions
from trl_rdro.iterate.policies import Policies
from trl_rdro.iterate.references import geometric, linear
from trl_rdro.iterate.rewards import positivity
from trl_rdro.run import files

from ..helpers import is_png
from ..tiny import save_tiny, tiny_preferences
from .worker import make_loop, rows_of, vowels, weights


# Sampling


def test_a_completion_ends_with_its_end_token():
    assert sampling.until_end([5, 6, 2, 7, 2], {2, 9}) == [5, 6, 2]
    assert sampling.until_end([5, 9, 2], {2, 9}) == [5, 9]
    assert sampling.until_end([5, 6], {2, 9}) == [5, 6]


def test_log_probabilities_are_those_of_sampling(model):
    """Draws of one token from one prompt come as often as their log-probability says."""
    loop = make_loop(model, "unused")
    prompt = loop.prompts[0].ids
    with loop.policies.use(None) as policy:
        completions = sampling.draw(policy, [prompt] * 4000, sampling.Generation(1), {2}, 0, seed=1)
        vocabulary = [[token] for token in range(policy.config.vocab_size)]
        logps = np.array(sampling.completion_logps(policy, [(prompt, token) for token in vocabulary], 0))
        again = sampling.draw(policy, [prompt] * 4000, sampling.Generation(1), {2}, 0, seed=1)
        one = sampling.draw(policy, [prompt] * 50, sampling.Generation(1, top_k=1), {2}, 0, seed=1)
        cold = sampling.draw(policy, [prompt] * 50, sampling.Generation(1, temperature=0.001), {2}, 0, seed=1)
        nucleus = sampling.draw(policy, [prompt] * 50, sampling.Generation(1, top_p=0.001), {2}, 0, seed=1)
    assert again == completions
    assert np.exp(logps).sum() == pytest.approx(1, abs=1e-4)
    counts = np.bincount([ids[0] for ids in completions], minlength=len(vocabulary))
    expected = 4000 * np.exp(logps)
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi_squared - len(vocabulary)) < 5 * math.sqrt(2 * len(vocabulary))
    assert one == cold == nucleus == [[int(logps.argmax())]] * 50


def test_scores_do_not_depend_on_padding(model):
    loop = make_loop(model, "unused")
    pairs = [(prompt.ids, prompt.ids[: 2 + i]) for i, prompt in enumerate(loop.prompts[:4])]
    with loop.policies.use(None) as policy:
        together = sampling.completion_logps(policy, pairs, pad_token=0)
        alone = [sampling.completion_logps(policy, [pair], pad_token=0)[0] for pair in pairs]
    np.testing.assert_allclose(together, alone, atol=1e-4)


# Rounds


@pytest.fixture(scope="module")
def two_rounds(model, tmp_path_factory) -> Path:
    """A run with a = 1, so that the reference is the policy that the round starts from."""
    output = tmp_path_factory.mktemp("two")
    make_loop(model, output, reference_mix=1.0, keep_rounds=2).run()
    return output


def test_samples_come_from_both_policies(two_rounds):
    first, second = (rows_of(two_rounds / f"round_{i:03d}" / "samples.jsonl") for i in range(2))
    assert not any(coin for row in first for coin in row["from_policy"])
    share = np.mean([row["from_policy"] for row in second])
    assert abs(share - 0.5) < 5 * math.sqrt(0.25 / 40)
    assert all(row["policy_logps"] == row["base_logps"] for row in first)
    differences = np.array([np.subtract(row["policy_logps"], row["base_logps"]) for row in second])
    coins = np.array([row["from_policy"] for row in second])
    # Each completion is likelier where it came from
    assert differences[coins].mean() > 0 > differences[~coins].mean()


def first_and_last_losses(output: Path) -> list[tuple[float, float]]:
    """Of each round."""
    found = []
    for path in sorted(output.glob("round_*/model/trainer_state.json")):
        steps = [step["loss"] for step in json.loads(path.read_text())["log_history"] if "loss" in step]
        found.append((steps[0], steps[-1]))
    return found


def test_references_are_the_log_probabilities_that_training_sees(two_rounds):
    """With a = 1 every log-ratio starts at zero, in the second round also: the loss of its first step is log 2."""
    losses = first_and_last_losses(two_rounds)
    assert len(losses) == 2
    for first, last in losses:
        assert first == pytest.approx(math.log(2), abs=1e-5)
        assert last < math.log(2) - 0.01


@pytest.mark.parametrize("options", [{"load_in_4bit": True}, {"bf16": True}], ids=["qlora", "bf16"])
def test_also_with_4_bit_weights_and_in_mixed_precision(options, tmp_path):
    if "load_in_4bit" in options:
        pytest.importorskip("bitsandbytes")
    model = save_tiny(tmp_path, hidden_size=64, intermediate_size=128)  # whole blocks of 64 weights
    make_loop(model, tmp_path / "out", reference_mix=1.0, **options).run()
    losses = first_and_last_losses(tmp_path / "out")
    assert len(losses) == 2
    # TRL rounds the adapters of 4-bit models
    assert [first for first, _ in losses] == pytest.approx([math.log(2)] * 2, abs=2e-3)


def test_report_is_what_the_samples_say(two_rounds):
    report = json.loads((two_rounds / "report.json").read_text())
    base = rows_of(two_rounds / "base.jsonl")
    probes = [json.loads((two_rounds / f"round_{i:03d}" / "probe.json").read_text()) for i in range(2)]
    for number, figures in enumerate(report["rounds"]):
        monitor = rows_of(two_rounds / f"round_{number:03d}" / "monitor.jsonl")
        assert figures["entropy"]["mean"] == pytest.approx(-np.mean([row["policy_logps"] for row in monitor]))
        rewards, before = (np.array([vowels(None, row["completions"]) for row in rows]) for rows in (monitor, base))
        assert figures["reward"]["mean"] == pytest.approx(rewards.mean())
        assert figures["reward_change"]["mean"] == pytest.approx(rewards.mean() - before.mean())
        assert figures["win_rate"]["mean"] == pytest.approx((rewards > before).mean() + (rewards == before).mean() / 2)
    last = report["rounds"][-1]
    moved = np.subtract(*probes)
    expected = math.sqrt(((moved - moved.mean(axis=1, keepdims=True)) ** 2).mean())
    assert last["distance_to_previous"] == pytest.approx(expected)
    assert last["distance_to_two_rounds_ago"] == last["distance_to_base"] > last["distance_to_previous"] * 0.1
    verdicts = rows_of(two_rounds / "round_001" / "judged.jsonl")
    norms = [np.linalg.norm(np.array(row["preferences"]) - 0.5, 2) for row in verdicts]
    assert last["preference_norm"]["largest"] == pytest.approx(max(norms))
    assert last["b"] is None and last["margin"] is None  # vowels are counted: a judge that is certain
    assert is_png(two_rounds / "iterate.png")


def test_a_run_is_continued_with_more_rounds_and_no_other_change(model, two_rounds, tmp_path):
    make_loop(model, tmp_path, reference_mix=1.0, rounds=1).run()
    assert weights(tmp_path) != weights(two_rounds)
    make_loop(model, tmp_path, reference_mix=1.0).run()
    assert weights(tmp_path) == weights(two_rounds)


CHANGES = {
    "sampling_mix": 0.4,
    "reference_mix": 0.5,
    "learning_rate": 1.0,
    "inner_loss_type": "hinge",
    "loss_type": "kldpo",
    "label_smoothing": 0.1,
    "optim": "sgd",
    "lr_scheduler_type": "cosine",
    "max_grad_norm": 0.5,
    "kldpo_tau": 2.0,
    "wdpo_rho": 0.1,
    "weight_decay": 0.1,
    "warmup_steps": 2,
    "disable_dropout": False,
    "bf16": True,
    "per_device_train_batch_size": 2,
    "seed": 7,
    "lora_alpha": 64,
    "dtype": "float16",
}


def test_a_begun_run_is_refused_with_any_other_setting(model, tmp_path, caplog):
    """Without running it: what a loop is begun with is known when it is made."""
    settings = make_loop(model, tmp_path, reference_mix=1.0).settings
    files.write_json(tmp_path / "settings.json", settings)
    make_loop(model, tmp_path, reference_mix=1.0, logging_steps=5, save_strategy="steps", save_steps=7, rounds=9)
    for name, value in CHANGES.items():
        with pytest.raises(ValueError, match=rf"was begun with `{name}` .*\(now .*Set that again, .*with_changes"):
            make_loop(model, tmp_path, **{"reference_mix": 1.0, name: value})
    with pytest.raises(ValueError, match="was begun with `prompts` '10 prompts, "):
        make_loop(model, tmp_path, reference_mix=1.0, rows=list(tiny_preferences(10, seed=1)))
    with pytest.raises(ValueError, match="was begun with `judge` '"):
        make_loop(model, tmp_path, judge=RewardFunctions([positivity], None), reference_mix=1.0)
    elsewhere = save_tiny(tmp_path / "elsewhere")
    make_loop(elsewhere, tmp_path, reference_mix=1.0)  # the same weights in another place
    another = save_tiny(tmp_path / "another", seed=1)
    with pytest.raises(ValueError, match="was begun with `model` 'qwen2 "):
        make_loop(another, tmp_path, reference_mix=1.0)
    rejecting = {"reference_mix": 1.0, "pair_selection": "rejection"}
    files.write_json(tmp_path / "settings.json", make_loop(model, tmp_path / "other", **rejecting).settings)
    with pytest.raises(ValueError, match=r"was begun with `rejection_beta` 0.5 \(now 1.0\)"):
        make_loop(model, tmp_path, **rejecting, rejection_beta=1.0)
    files.write_json(tmp_path / "settings.json", {**settings, "processes": 2})
    with pytest.raises(ValueError, match=r"was begun with `processes` 2 \(now 1\)"):
        make_loop(model, tmp_path, reference_mix=1.0)
    make_loop(model, tmp_path, reference_mix=1.0, beta=3.0, resume_with_changes=True)
    assert any("goes on with the new settings" in record.getMessage() for record in caplog.records)


def test_fewer_rounds_than_there_are_need_the_model_of_the_last(model, tmp_path):
    # Rewards by length fall from call to call, so that the first round is the best one and kept beside the last
    times = itertools.count()
    judge = RewardFunctions([lambda completions, **_: [len(c) - 100.0 * next(times) for c in completions]], None)
    make_loop(model, tmp_path, judge=judge, rounds=3, keep_rounds=1).run()
    with pytest.raises(ValueError, match="`rounds=2`, but .* has 3, and the model of round 2 was dropped"):
        make_loop(model, tmp_path, judge=judge, rounds=2, keep_rounds=1)
    make_loop(model, tmp_path, judge=judge, rounds=1, keep_rounds=1).run()
    assert weights(tmp_path) == weights(tmp_path, "round_000/model")


def test_disk_use_is_bounded(model, tmp_path):
    # A judge who is harder to please each time, so that the first round is the best
    times = itertools.count()

    def judge(completions, **kwargs):
        level = -100.0 * next(times)
        return [level + len(text) for text in completions]

    loop = make_loop(model, tmp_path, judge=RewardFunctions([judge], None), rounds=4, keep_rounds=1)
    report = loop.run()
    assert (report["best_round"], report["final_round"]) == (0, 3)
    kept = {path.parent.name for path in tmp_path.glob("round_*/model")}
    assert kept == {"round_000", "round_003"}
    assert {path.parent.name for path in tmp_path.glob("round_*/samples.jsonl")} == kept
    assert len(list(tmp_path.glob("round_*/report.json"))) == 4
    assert not list(tmp_path.glob("round_*/trainer"))
    assert weights(tmp_path) == weights(tmp_path, "round_003/model")
    # Nothing is made again
    before = (tmp_path / "report.json").read_text()
    make_loop(model, tmp_path, judge=RewardFunctions([judge], None), rounds=4, keep_rounds=1).run()
    assert (tmp_path / "report.json").read_text() == before


def test_rounds_take_turns_with_the_prompts(model, tmp_path):
    loop = make_loop(model, tmp_path, prompts_per_round=4)
    taken = [[loop.prompts.index(prompt) for prompt in loop._round_prompts(number)] for number in range(3)]
    assert taken == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 1]]


@pytest.mark.parametrize(
    ("method", "loss"), [("dpo", "sigmoid"), ("dpo", "rdro"), ("kto", "rdro"), ("kto", "apo_zero_unpaired")]
)
def test_reference_columns_are_those_of_the_loss(method, loss, model, tmp_path):
    options = {} if loss == "sigmoid" else {"beta": 0.1}
    report = make_loop(model, tmp_path, method=method, loss_type=loss, **options).run()
    folder = tmp_path / "round_001"
    samples, rows = rows_of(folder / "samples.jsonl"), rows_of(folder / "train.jsonl")
    known = {}
    for row in samples:
        for ids, policy, base in zip(row["completion_ids"], row["policy_logps"], row["base_logps"], strict=True):
            reference = geometric(policy, base, 0.25) if loss == "sigmoid" else linear(policy, base, 0.5)
            known.setdefault(tuple(ids), []).append(reference)
    columns = (
        [("completion_ids", "ref_logps")]
        if method == "kto"
        else [("chosen_ids", "ref_chosen_logps"), ("rejected_ids", "ref_rejected_logps")]
    )
    for row in rows:
        for ids, reference in columns:
            assert any(row[reference] == pytest.approx(value) for value in known[tuple(row[ids])])
    assert report["rounds"][-1]["margin"] is None  # sigmoid too, without a bound on the judge
    if method == "kto":
        assert [row["label"] for row in rows] == [True, False] * (len(rows) // 2)


def test_full_fine_tuning_never_holds_two_models(model, tmp_path, monkeypatch):
    loaded, load, train = [], Policies._load, rounds.train_round

    def live_models() -> int:
        gc.collect()
        return sum(
            isinstance(value, PreTrainedModel) and "ForCausalLM" in type(value).__name__ for value in gc.get_objects()
        )

    others = live_models()  # of other tests

    def watched_load(self, name):
        loaded.append(Path(name).parent.name)
        assert live_models() == others
        return load(self, name)

    def watched_train(*args):
        assert live_models() == others
        return train(*args)

    monkeypatch.setattr(Policies, "_load", watched_load)
    monkeypatch.setattr(rounds, "train_round", watched_train)
    make_loop(model, tmp_path, peft=False, learning_rate=1e-3).run()
    start = Path(model).parent.name
    assert loaded == [start, "round_000", start, "round_000", start, "round_001"]
    assert (tmp_path / "final" / "model.safetensors").is_file()


def test_conversations_are_rendered_and_judged_as_such(model, tmp_path):
    rows = [
        {"prompt": [{"role": "user", "content": row["prompt"]}], "n": i} for i, row in enumerate(tiny_preferences(6))
    ]
    seen = []

    def judge(prompts, completions, n, **kwargs):
        seen.append((prompts[0], completions[0], n[0]))
        return [float(len(completion[0]["content"])) for completion in completions]

    loop = make_loop(model, tmp_path, judge=RewardFunctions([judge], None), rows=rows, rounds=1)
    assert loop.sampler.tokenizer.decode(loop.prompts[0].ids).endswith("<|im_start|>assistant\n")
    loop.run()
    prompt, completion, n = seen[0]
    assert prompt == rows[0]["prompt"] and n == 0
    assert completion[0]["role"] == "assistant"


def test_long_prompts_are_left_out(model, tmp_path):
    rows = list(tiny_preferences(4))
    lengths = [len(prompt.ids) for prompt in make_loop(model, tmp_path, rows=rows).prompts]
    rows.append({"prompt": rows[0]["prompt"] * 3})
    loop = make_loop(model, tmp_path, rows=rows, max_length=max(lengths) + 8)
    assert [len(prompt.ids) for prompt in loop.prompts] == lengths
    with pytest.raises(ValueError, match="No prompt fits"):
        make_loop(model, tmp_path, rows=rows, max_length=9)


def test_a_judge_without_an_opinion_ends_the_run_with_a_sentence(model, tmp_path):
    indifferent = RewardFunctions([lambda completions, **_: [0.0] * len(completions)], None)
    with pytest.raises(ValueError, match="nothing to train on"):
        make_loop(model, tmp_path, judge=indifferent).run()


def test_labels_are_asked_for_and_the_run_goes_on_with_them(model, tmp_path):
    labels = [{"prompt": "p", "completion": "c", "score": 0.0}]
    with pytest.raises(ValueError, match="label them, add them to the file, and start the same command again"):
        make_loop(model, tmp_path, judge=LabelledScores(labels), rounds=1).run()
    wanted = rows_of(tmp_path / "round_000" / "to_label.jsonl")
    distinct = {
        (row["prompt"], text)
        for row in rows_of(tmp_path / "round_000" / "samples.jsonl")
        for text in row["completions"]
    }
    assert {(row["prompt"], row["completion"]) for row in wanted} == distinct
    labels += [{**row, "score": vowels(None, [row["completion"]])[0]} for row in wanted]
    report = make_loop(model, tmp_path, judge=LabelledScores(labels), rounds=1).run()
    # The new policy's completions have no labels
    assert report["rounds"][0]["reward"] is report["rounds"][0]["win_rate"] is None
    assert report["final_round"] == report["best_round"] == 0
