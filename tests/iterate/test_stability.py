"""Measures of stability: the strength of a loss, margins, returns, distances, errors."""

import math

import numpy as np
import pytest
import torch

from trl_rdro import DPOConfig
from trl_rdro.iterate import margins, stability
from trl_rdro.iterate.report import best_round

from ..tiny import cpu_args


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


@pytest.mark.parametrize(("name", "smoothing"), [("ipo", 0.0), ("sigmoid", 0.0), ("cdpo", 0.2), ("robust", 0.05)])
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
    assert gap > 4 * (1 - 2 * smoothing if name == "cdpo" else 1) / beta * (bound - 0.5)


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
    for smoothed in ({"loss_type": "cdpo"}, {"loss_type": "kldpo"}, {"loss_type": "wdpo", "inner_loss_type": "cdpo"}):
        assert strength(label_smoothing=0.1, **smoothed) == pytest.approx(math.log(9) / 0.5 / 0.5)
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
