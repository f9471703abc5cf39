"""The parts of the loop that need no model: configuration, judges, pairs, references, measures of stability."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from trl_rdro import DPOConfig, KTOConfig
from trl_rdro.iterate import margins, stability
from trl_rdro.iterate.config import IterateConfig
from trl_rdro.iterate.judges import (
    LabelledPairs,
    LabelledScores,
    MissingLabels,
    PreferenceFunction,
    RewardFunctions,
    make_judge,
)
from trl_rdro.iterate.pairs import judge_prompts, select_pairs
from trl_rdro.iterate.references import geometric, linear, needs_distribution
from trl_rdro.iterate.report import best_round
from trl_rdro.iterate.rewards import positivity

from ..tiny import cpu_args
from .worker import vowels


VOWELS = "tests.iterate.worker.vowels"


def config(**changes) -> IterateConfig:
    return IterateConfig(**{"reward_funcs": [VOWELS], **changes})


# Configuration


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"method": "ppo"}, "`method` has no value 'ppo'"),
        ({"pair_selection": "rejecton"}, "Did you mean 'rejection'?"),
        ({"rounds": 0}, "`rounds` must be a whole number >= 1, got 0"),
        ({"max_completion_length": 0}, "`max_completion_length` must be a whole number >= 1"),
        ({"prompts_per_chunk": 0}, "`prompts_per_chunk` must be a whole number >= 1"),
        ({"monitor_prompts": 0}, "`monitor_prompts` must be a whole number >= 1"),
        ({"samples_per_prompt": 1}, "`samples_per_prompt` must be a whole number >= 2, got 1"),
        ({"monitor_samples": True}, "`monitor_samples` must be a whole number >= 2, got True"),
        ({"top_k": -1}, "`top_k` must be a whole number >= 0"),
        ({"prompts_per_round": 0}, "`prompts_per_round` must be a whole number >= 1"),
        ({"keep_rounds": 0}, "`keep_rounds` must be a whole number >= 1"),
        ({"reference_mix": 1.1}, "`reference_mix` must be a number in [0, 1] or None, got 1.1"),
        ({"sampling_mix": -0.1}, "`sampling_mix` must be a number in [0, 1], got -0.1"),
        ({"temperature": 0}, "`temperature` must be a number in [1e-6, 1e6], got 0"),
        ({"top_p": 0}, "`top_p` must be a number in [1e-6, 1], got 0"),
        ({"entropy_floor": 1}, "`entropy_floor` must be a number in [0, 1)"),
        ({"reward_gap": 1.0}, "has no effect with `pair_selection='best_vs_worst'`"),
        ({"pair_selection": "rejection", "reward_gap": -1}, "`reward_gap` must be a number >= 0"),
        ({"reward_funcs": None}, "Set one of `reward_funcs`, `preference_func` and `labelled_file`"),
        ({"preference_func": "a.b"}, "got reward_funcs and preference_func"),
        ({"reward_weights": [1.0, 2.0]}, "a weight for each of the 1 `reward_funcs`, got 2"),
        ({"use_vllm": True}, "`use_vllm=True` needs vLLM"),
    ],
)
def test_bad_field_is_refused(changes, sentence):
    with pytest.raises(ValueError) as error:
        config(**changes)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "training", "sentence"),
    [
        ({"reference_mix": 0.5}, {"loss_type": "rdro"}, "its reference is the sampling distribution"),
        ({"temperature": 0.7, "top_k": 5}, {"loss_type": ["sigmoid", "nca_pair"]}, "`temperature=0.7`, `top_k=5`"),
        ({}, {"ld_alpha": 0.5}, "Set `ld_alpha=None`"),
        ({}, {"eval_strategy": "steps", "eval_steps": 1}, "`eval_strategy='steps'` has no data here"),
        ({"max_completion_length": 64}, {"max_length": 64}, "`max_completion_length=64`, got 64"),
        ({}, {"push_to_hub": True}, "`push_to_hub=True`"),
    ],
)
def test_training_options_that_do_not_go_with_the_loop_are_refused(changes, training, sentence, tmp_path):
    args = DPOConfig(**cpu_args(output_dir=str(tmp_path), **training))
    with pytest.raises(ValueError) as error:
        config(**changes).validate_with(args)
    assert sentence in str(error.value)


def test_kto_is_refused_and_the_other_unpaired_losses_are_not(tmp_path):
    loop = config(method="kto")
    with pytest.raises(ValueError, match="Use `apo_zero_unpaired`, `rdro` or `ddro`"):
        loop.validate_with(KTOConfig(**cpu_args(output_dir=str(tmp_path), loss_type="kto")))
    for loss in ("apo_zero_unpaired", "rdro", "ddro"):
        loop.validate_with(KTOConfig(**cpu_args(output_dir=str(tmp_path), loss_type=loss)))


@pytest.mark.parametrize(
    ("sharded", "name"),
    [({"fsdp": True}, "FSDP"), ({"deepspeed_plugin": SimpleNamespace(zero_stage=3)}, "ZeRO-3")],
)
def test_sharded_models_are_refused(sharded, name, tmp_path):
    args = DPOConfig(**cpu_args(output_dir=str(tmp_path)))
    vars(args).update(sharded)
    with pytest.raises(ValueError, match=f"which {name} shards"):
        config().validate_with(args)
    args.fsdp, args.deepspeed_plugin = False, SimpleNamespace(zero_stage=2)
    config().validate_with(args)


def test_vllm_is_refused_in_several_processes(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    args = SimpleNamespace(**{**vars(DPOConfig(**cpu_args(output_dir=str(tmp_path)))), "world_size": 2})
    with pytest.raises(ValueError, match="samples in one process, got 2"):
        config(use_vllm=True).validate_with(args)


def test_defaults_have_a_margin_with_a_bounded_judge_only(tmp_path):
    from trl_rdro.cli.iterate import make_parser

    argv = ["--output_dir", str(tmp_path), "--use_cpu", "--bf16", "false", "--reward_funcs", VOWELS]
    loop, _, args, _ = make_parser("dpo").parse_args_and_config(argv)
    assert loop.guaranteed_margin(args) is None  # a judge that can be certain
    loop.judge_bound = 0.6
    assert loop.guaranteed_margin(args) > 0.1
    args.beta = 0.1  # TRL's
    assert loop.guaranteed_margin(args) < 0
    args.loss_type = ["rdro"]
    assert loop.guaranteed_margin(args) is None


# Judges


def count_ones(prompts, completions, **kwargs):
    return [float(text.count("1")) for text in completions]


def test_rewards_are_weighted_and_see_columns_and_the_format_of_the_prompt():
    seen = {}

    def spy(prompts, completions, **columns):
        seen.update(columns, prompts=prompts, completions=completions)
        return [10.0] * len(prompts)

    messages = [{"role": "user", "content": "hello"}]
    rows = [{"prompt": messages, "topic": "a"}, {"prompt": messages, "topic": "b"}]
    judge = RewardFunctions(
        [spy, lambda completions, **_: [len(text[0]["content"]) for text in completions]], [0.5, 2.0]
    )
    assert judge.rewards(rows, ["x", "yyy"]) == [7.0, 11.0]
    assert seen["topic"] == ["a", "b"] and seen["prompts"] == [messages, messages]
    assert seen["completions"] == [[{"role": "assistant", "content": text}] for text in ("x", "yyy")]
    assert judge.preferences(rows[:1] * 3, ["x", "yy", "x"], ["yy", "x", "z"]) == [0.0, 1.0, 0.5]


@pytest.mark.parametrize(
    ("values", "sentence"),
    [([1.0], "must return 2 values, one for each, got 1"), ([1.0, None], "got None"), ([1.0, math.nan], "got nan")],
)
def test_bad_rewards_are_refused(values, sentence):
    with pytest.raises(ValueError) as error:
        RewardFunctions([lambda **_: values], None).rewards([{"prompt": "p"}] * 2, ["a", "b"])
    assert sentence in str(error.value)


def test_bad_probabilities_are_refused():
    with pytest.raises(ValueError, match=r"probabilities in \[0, 1\], got 1.5"):
        PreferenceFunction(lambda **_: [1.5]).preferences([{"prompt": "p"}], ["a"], ["b"])


def test_preference_function_is_asked_once_for_each_pair_of_texts():
    asked = []

    def first_letter(prompts, first, second, **columns):
        asked.extend(zip(prompts, first, second, columns["id"], strict=True))
        return [0.9 if a < b else 0.1 for a, b in zip(first, second, strict=True)]

    rows = [{"prompt": "p", "id": 7}, {"prompt": "q", "id": 8}]
    verdicts = judge_prompts(PreferenceFunction(first_letter), rows, [["b", "a", "b", "c"], ["x", "x", "x", "x"]])
    assert asked == [("p", "b", "a", 7), ("p", "b", "c", 7), ("p", "a", "c", 7)]
    assert verdicts[0].distinct == ["b", "a", "c"] and verdicts[0].response == [0, 1, 0, 2]
    np.testing.assert_allclose(verdicts[0].preferences, [[0.5, 0.1, 0.9], [0.9, 0.5, 0.9], [0.1, 0.1, 0.5]])
    # The mean over the prompt's completions, of which two are b
    np.testing.assert_allclose(verdicts[0].scores, [(2 * 0.5 + 0.1 + 0.9) / 4, (2 * 0.9 + 0.5 + 0.9) / 4, 0.8 / 4])
    assert verdicts[1].preferences == [[0.5]] and verdicts[1].scores == [0.5]


def test_labels_are_looked_up_and_missing_ones_named():
    rows = [{"prompt": "p"}] * 2
    scores = LabelledScores(
        [{"prompt": "p", "completion": "a", "score": score} for score in (1, 4)]
        + [{"prompt": "p", "completion": [{"role": "assistant", "content": "b"}], "score": 3}]
    )
    assert scores.rewards(rows, ["a", "b"]) == [2.5, 3.0]
    with pytest.raises(MissingLabels) as error:
        scores.rewards(rows, ["a", "c"])
    assert error.value.rows == [{"prompt": "p", "completion": "c", "score": None}]

    wins = LabelledPairs([{"prompt": "p", "chosen": x, "rejected": y} for x, y in ("ab", "ab", "ba")])
    assert wins.preferences(rows, ["a", "b"], ["b", "a"]) == [pytest.approx(2 / 3), pytest.approx(1 / 3)]
    assert wins.preferences(rows[:1], ["c"], ["c"]) == [0.5]
    with pytest.raises(MissingLabels) as error:
        wins.preferences(rows, ["a", "c"], ["b", "a"])
    assert error.value.rows == [{"prompt": "p", "chosen": "c", "rejected": "a"}]


def test_judge_is_found_by_its_name(tmp_path):
    assert make_judge(config()).functions == [vowels]
    judge = make_judge(config(reward_funcs=None, preference_func="tests.iterate.test_parts.count_ones"))
    assert judge.function is count_ones
    for path in ("nowhere.function", "tests.iterate.worker.consonants", "function"):
        with pytest.raises(ValueError, match="Cannot import the function"):
            make_judge(config(reward_funcs=[path]))
    with pytest.raises(ValueError, match="must be a function, got str"):
        make_judge(config(reward_funcs=["tests.iterate.test_parts.VOWELS"]))

    file = tmp_path / "labels.jsonl"
    with pytest.raises(ValueError, match="is not a file"):
        make_judge(config(reward_funcs=None, labelled_file=str(file)))
    for row, kind in (
        ({"prompt": "p", "completion": "c", "score": 1}, LabelledScores),
        ({"prompt": "p", "chosen": "c", "rejected": "d"}, LabelledPairs),
    ):
        file.write_text(json.dumps(row) + "\n")
        assert type(make_judge(config(reward_funcs=None, labelled_file=str(file)))) is kind
    file.write_text(json.dumps({"prompt": "p", "completion": "c"}) + "\n")
    with pytest.raises(ValueError, match="it has completion, prompt"):
        make_judge(config(reward_funcs=None, labelled_file=str(file)))


def test_positivity_of_texts_and_conversations():
    pytest.importorskip("vaderSentiment")
    texts = ["A wonderful day.", "A horrible day."]
    good, bad = positivity(["p", "p"], texts)
    assert bad < 0 < good
    messages = [[{"role": "assistant", "content": text}] for text in texts]
    assert positivity(["p", "p"], messages) == [good, bad]


# Pairs


ONES = RewardFunctions([count_ones], None)
FOUR = ["10", "111", "", "1"]  # rewards 1, 3, 0, 1


def pairs_of(texts: list[str], judge=ONES, **changes) -> list[tuple[int, int]]:
    (verdict,) = judge_prompts(judge, [{"prompt": "p"}], [texts])
    return select_pairs(verdict, config(**changes), judge.gives_rewards, seed="0")


def test_best_versus_worst():
    assert pairs_of(FOUR) == [(1, 2)]
    assert pairs_of(["1", "01", "1"]) == []


def test_rejection_takes_every_pair_beyond_the_gap():
    found = pairs_of(FOUR, pair_selection="rejection", reward_gap=0.5)
    assert sorted(found) == [(0, 2), (1, 0), (1, 2), (1, 3), (3, 2)]
    assert sorted(pairs_of(FOUR, pair_selection="rejection", reward_gap=1)) == [(1, 0), (1, 2), (1, 3)]
    assert len(pairs_of(FOUR, pair_selection="rejection")) == 5  # equal rewards make no pair


def test_random_pairs_are_disjoint_and_won_by_the_better_one():
    texts = ["1" * i for i in range(9)]
    found = pairs_of(texts, pair_selection="random")
    assert len(found) == 4 and len({i for pair in found for i in pair}) == 8
    assert all(better > worse for better, worse in found)
    assert found == pairs_of(texts, pair_selection="random")
    assert pairs_of(["1", "01", "1"], pair_selection="random") == []


def test_random_pairs_are_won_with_the_judges_probability():
    judge = PreferenceFunction(lambda prompts, first, second, **_: [0.8 if a == "a" else 0.2 for a in first])
    found = pairs_of(["a", "b"] * 4000, judge, pair_selection="random")
    # Half of the pairs are of two equal texts
    assert len(found) == pytest.approx(2000, abs=5 * math.sqrt(1000))
    share = sum(better % 2 == 0 for better, _ in found) / len(found)
    assert share == pytest.approx(0.8, abs=5 * math.sqrt(0.16 / len(found)))


# References


def test_references_are_the_two_mixtures():
    policy, base = np.array([0.7, 0.2, 0.1]), np.array([0.2, 0.2, 0.6])
    mixed = [linear(math.log(p), math.log(q), 0.3) for p, q in zip(policy, base, strict=True)]
    np.testing.assert_allclose(np.exp(mixed), 0.3 * policy + 0.7 * base)
    assert linear(-1000.0, -2.0, 0.0) == -2.0 and linear(-3.0, -1000.0, 1.0) == -3.0
    assert linear(-2000.0, -2000.0, 0.5) == pytest.approx(-2000.0)
    values = [geometric(math.log(p), math.log(q), 0.3) for p, q in zip(policy, base, strict=True)]
    product = policy**0.3 * base**0.7
    np.testing.assert_allclose(np.diff(values), np.diff(np.log(product / product.sum())))


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "hinge", "kldpo", "wdpo", ["sigmoid", "sft"]])
def test_losses_of_differences_take_the_geometric_mixture(loss, tmp_path):
    assert not needs_distribution(DPOConfig(**cpu_args(output_dir=str(tmp_path), loss_type=loss)))


@pytest.mark.parametrize(
    "loss", ["rdro", "ddro", "nca_pair", "bco_pair", "apo_zero", "sppo_hard", ["sigmoid", "rdro"]]
)
def test_losses_of_single_log_ratios_take_the_sampling_distribution(loss, tmp_path):
    assert needs_distribution(DPOConfig(**cpu_args(output_dir=str(tmp_path), loss_type=loss)))


def test_f_divergences_and_unpaired_losses_take_the_sampling_distribution(tmp_path):
    assert needs_distribution(DPOConfig(**cpu_args(output_dir=str(tmp_path), f_divergence_type="js_divergence")))
    assert needs_distribution(KTOConfig(**cpu_args(output_dir=str(tmp_path), loss_type="apo_zero_unpaired")))


# Stability


def population_minimum(loss, preferences: np.ndarray, mu: np.ndarray) -> np.ndarray:
    """The z, less their mean, at which a loss of h is least over pairs from mu that the judge decides."""
    weights = torch.tensor(mu[:, None] * mu[None, :] * preferences)
    z = torch.zeros(len(mu), dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([z], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-15)

    def closure():
        optimiser.zero_grad()
        value = (weights * loss(z[:, None] - z[None, :])).sum()
        value.backward()
        return value

    optimiser.step(closure)
    return (z - z.mean()).detach().numpy()


@pytest.mark.parametrize(("name", "smoothing"), [("ipo", 0.0), ("sigmoid", 0.0), ("sigmoid", 0.2), ("robust", 0.05)])
def test_loss_strength_bounds_what_a_change_of_sampling_moves(name, smoothing, tmp_path):
    """log pi_{t+1} - log pi_ref of two sampling distributions differs by at most b ||P - 1/2|| ||mu - mu'|| (ipo: is
    b P mu), with judges up to the bound, where the slope at indifference, 4 / beta, does not bound it."""
    rng, beta, bound = np.random.default_rng(0), 0.5, 0.9
    softplus = torch.nn.functional.softplus

    def loss(h):
        if name == "ipo":
            return (h - 1 / (2 * beta)) ** 2
        clean, flipped = softplus(-beta * h), softplus(beta * h)
        if name == "robust":
            return ((1 - smoothing) * clean - smoothing * flipped) / (1 - 2 * smoothing)
        return (1 - smoothing) * clean + smoothing * flipped

    args = DPOConfig(**cpu_args(output_dir=str(tmp_path), loss_type=name, beta=beta, label_smoothing=smoothing))
    b = stability.loss_strength(args, 1, bound)
    if name == "ipo":
        skew = rng.uniform(-0.5, 0.5, (5, 5))
        preferences, mu = 0.5 + 0.8 * (skew - skew.T) / 2, rng.dirichlet(np.ones(5))
        expected = b * preferences @ mu
        found = population_minimum(loss, preferences, mu)
        np.testing.assert_allclose(found, expected - expected.mean(), atol=1e-6 * np.abs(expected).max())
        return
    # Two answers: z_1 - z_2 is the logit of the aimed-at probability over beta, whatever mu
    gap = np.ptp(population_minimum(loss, np.array([[0.5, bound], [1 - bound, 0.5]]), np.full(2, 0.5)))
    assert gap == pytest.approx(b * (bound - 0.5), rel=1e-4)
    assert gap > 4 * (1 - 2 * smoothing if name == "sigmoid" else 1) / beta * (bound - 0.5)


def test_loss_strength_of_other_losses(tmp_path):
    def strength(bound=None, **changes):
        args = DPOConfig(**cpu_args(output_dir=str(tmp_path), beta=0.5, **changes))
        return stability.loss_strength(args, 10, bound)

    nine = math.log(9) / 0.4 / 0.5  # 5.5 / beta
    assert strength(loss_type="ipo") == strength(0.9, loss_type="ipo") == 20
    assert strength(0.9, loss_type="sigmoid_norm") == pytest.approx(10 * nine)
    assert strength(0.9, loss_type="kldpo") == pytest.approx(nine) == strength(0.9, loss_type="sigmoid")
    assert strength(loss_type="wdpo", inner_loss_type="ipo") == 20
    # A judge that can be certain: no bound, unless labels are smoothed
    assert strength(loss_type="sigmoid") is strength(loss_type="sigmoid_norm") is strength(loss_type="kldpo") is None
    assert strength(loss_type="sigmoid", label_smoothing=0.1) == pytest.approx(math.log(9) / 0.5 / 0.5)
    assert strength(0.9, loss_type="robust", label_smoothing=0.1) is None
    assert strength(0.9, loss_type="hinge") is None and strength(0.9, loss_type=["sigmoid", "sft"]) is None


def test_no_judge_has_a_larger_norm_than_a_strict_order():
    rng = np.random.default_rng(0)
    for size in (2, 3, 6):
        order = 0.5 + 0.5 * np.sign(np.subtract.outer(np.arange(size), np.arange(size)))
        assert margins.preference_norm(order) == pytest.approx(margins.largest_norm(size))
        for _ in range(100):
            skew = np.triu(rng.choice([-0.5, 0.5], (size, size)), 1)
            assert margins.preference_norm(0.5 + skew - skew.T) <= margins.largest_norm(size) + 1e-12


def test_positive_margin_contracts():
    """Two starts come together under the exact iteration, for random judges of every structure."""
    from .three_answers import exact_step

    rng = np.random.default_rng(0)
    for _ in range(50):
        skew = np.triu(rng.uniform(-0.5, 0.5, (4, 4)), 1)
        preferences, base = 0.5 + skew - skew.T, rng.dirichlet(np.ones(4))
        a, lam = rng.uniform(0, 0.9), rng.uniform(0.1, 1)
        norm = margins.preference_norm(preferences)
        b = 0.9 * (1 - a) * 2 / (lam * norm)
        assert margins.stability_margin(a, b, lam, norm) == pytest.approx(0.1 * (1 - a))
        first, second = rng.dirichlet(np.ones(4), 2)
        for _ in range(300):
            first, second = (exact_step(policy, base, preferences, a, lam, b) for policy in (first, second))
        np.testing.assert_allclose(first, second, atol=1e-3)


def turning(rounds: int, radius: float, growth: float, turns_in: int) -> list[np.ndarray]:
    """Log-probabilities of three completions that go round in a plane."""
    steps = radius * (growth * np.exp(2j * np.pi / turns_in)) ** np.arange(rounds)
    return [np.array([[step.real, step.imag, 0.0]]) for step in steps]


@pytest.mark.parametrize("turns_in", [3, 4, 7])
def test_a_circle_is_a_near_return_after_one_turn(turns_in):
    history = turning(turns_in + 1, radius=2.0, growth=1.0, turns_in=turns_in)
    found = stability.near_return(history)
    assert found["index"] == 0 and found["back"] < 1e-9 and found["out"] > 1
    assert stability.near_return(history[: turns_in // 2 + 1]) is None


def test_settling_and_noise_are_no_near_returns():
    assert stability.near_return(turning(12, radius=2.0, growth=0.6, turns_in=5)) is None
    rng = np.random.default_rng(0)
    assert stability.near_return(list(0.02 * rng.normal(size=(12, 5, 4)))) is None
    assert stability.near_return(turning(2, radius=2.0, growth=1.0, turns_in=2)) is None


def test_distance_is_in_nats_and_blind_to_constants_of_a_prompt():
    first = np.random.default_rng(0).normal(size=(3, 4))
    shift = np.array([[1.0], [-2.0], [5.0]])
    assert stability.distance(first, first + shift) == pytest.approx(0, abs=1e-12)
    wave = np.array([[0.3, -0.3, 0.3, -0.3]])
    assert stability.distance(first, first + shift + wave) == pytest.approx(0.3)


def test_standard_error_is_that_of_the_draws():
    rng = np.random.default_rng(0)
    levels = np.array([[0.0], [100.0]])  # prompts differ, and are fixed
    runs = [stability.mean_and_error(levels + rng.normal(size=(2, 8))) for _ in range(2000)]
    means = np.array([run["mean"] for run in runs])
    assert np.mean([run["standard_error"] ** 2 for run in runs]) == pytest.approx(means.var(), rel=0.1)


def test_best_round_is_above_the_floor():
    def report(number, reward, win_rate, below=False):
        rewards = {"mean": reward} if reward is not None else None
        return {"round": number, "reward": rewards, "win_rate": {"mean": win_rate}, "below_floor": below}

    assert best_round([report(0, 1.0, 0.9), report(1, 2.0, 0.5), report(2, 9.0, 1.0, below=True)]) == 1
    assert best_round([report(0, None, 0.9), report(1, None, 0.5)]) == 0
    assert best_round([report(0, 1.0, 0.9, below=True)]) == 0
