"""Exact DPO rounds, and what one round keeps of the preferences' order."""

import json

import numpy as np
import pytest
import torch

from trl_rdro.cli import main
from trl_rdro.cli.iterate import DEFAULT_BETA, DEFAULT_LABEL_SMOOTHING
from trl_rdro.iterate.config import IterateConfig
from trl_rdro.iterate.dpo_dynamics import dpo_rewards, dpo_study, one_shot, smith_set, smoothed
from trl_rdro.iterate.dynamics import bradley_terry, cycle
from trl_rdro.losses import sigmoid_loss

from ..helpers import refusal


# A Condorcet winner that wins narrowly, and a second that crushes the third
NARROW = np.array([[0.5, 0.51, 0.51], [0.49, 0.5, 0.99], [0.49, 0.01, 0.5]])


def strict(K: int) -> np.ndarray:
    return np.triu(np.ones((K, K)), 1) + np.eye(K) / 2


def test_the_optimum_of_a_round_is_the_minimum_of_the_loss():
    rng = np.random.default_rng(0)
    for beta in (0.3, 2.0):
        upper = np.triu(rng.uniform(0.05, 0.95, size=(5, 5)), 1)
        P = upper + np.tril(1 - upper.T, -1) + np.eye(5) / 2
        mu = rng.dirichlet(np.ones(5))
        z = torch.tensor(dpo_rewards(P, mu, beta), requires_grad=True)
        weights = torch.tensor(mu[:, None] * mu * P)
        loss = sum(
            weights[i, j] * sigmoid_loss(z[i : i + 1], z[j : j + 1], beta)[0] for i in range(5) for j in range(5)
        )
        loss.backward()
        assert z.grad.abs().max() < 1e-9


def test_sampling_does_not_matter_for_bradley_terry_and_does_otherwise():
    rewards, mu = np.array([0.0, 0.5, 1.0, -1.0]), np.array([0.85, 0.05, 0.05, 0.05])
    for P, same in ((bradley_terry(rewards), True), (cycle(0.3), False)):
        mu = mu[: len(P)] / mu[: len(P)].sum()
        z = [dpo_rewards(P, m, 1.0) for m in (mu, np.full(len(P), 1 / len(P)))]
        assert np.allclose(np.ptp(z[0] - z[1]), 0, atol=1e-8) == same
    assert np.allclose(np.diff(dpo_rewards(bradley_terry(rewards), np.full(4, 0.25), 2.0)), np.diff(rewards) / 2)


@pytest.mark.parametrize("K", [2, 3, 4, 8, 32])
def test_the_loops_defaults_keep_their_entropy_with_a_strict_order(K):
    """The loss that `trl-rdro iterate` trains unless told otherwise, with a judge that is always certain; plain DPO
    has its optimum at infinity there."""
    loop = IterateConfig(reward_funcs=["set.below"])
    share = np.full(K, 1 / K)
    settings = {"a": loop.a, "beta": DEFAULT_BETA, "lam": loop.sampling_mix, "reference": share, "rounds": 60}
    kept = dpo_study(strict(K), label_smoothing=DEFAULT_LABEL_SMOOTHING, **settings)
    assert min(kept["entropies"][1:]) > 2 * loop.entropy_floor * np.log(K)
    assert kept["regime"] == "stable" and kept["settled_after"] < 10
    assert (kept["margin"] > 0) == (K <= 4)
    lost = dpo_study(strict(K), **settings)
    assert lost["entropies"][6] < 1e-6 and lost["regime"] == "collapsing" and lost["margin"] is None


def test_circles_oscillate_beyond_a_step_and_settle_below_it():
    share = np.array([0.5, 0.3, 0.2])
    regimes = [dpo_study(cycle(0.4), 0.25, beta, 1.0, share)["regime"] for beta in (0.5, 4.0)]
    assert regimes == ["oscillating", "stable"]


def test_smith_sets():
    assert smith_set(strict(4)) == [0] and smith_set(cycle(0.2)) == [0, 1, 2]
    P = np.full((4, 4), 0.5)
    P[:3, :3], P[:3, 3], P[3, :3] = cycle(0.2), 0.9, 0.1
    assert smith_set(P) == [0, 1, 2]


@pytest.mark.parametrize("loss", ["ipo", "dpo"])
def test_what_a_round_keeps_and_the_sampling_that_restores_it(loss):
    rewards = (lambda mu: NARROW @ mu) if loss == "ipo" else (lambda mu: dpo_rewards(NARROW, mu, 1.0))
    lost = one_shot(NARROW, np.full(3, 1 / 3), rewards)
    assert lost["winner"] == 0 and lost["kept"] == {"top": False, "order": False}
    for sampling in lost["restored_by"].values():
        again = one_shot(NARROW, np.array(sampling), rewards)
        assert again["kept"]["top"]
    assert one_shot(NARROW, np.array(lost["restored_by"]["order"]), rewards)["kept"]["order"]
    everything = one_shot(cycle(0.3), np.full(3, 1 / 3), lambda mu: cycle(0.3) @ mu)
    assert everything["kept"] == {} and everything["winner"] is None


def test_command(tmp_path, capsys):
    file, output = tmp_path / "p.json", tmp_path / "out.json"
    file.write_text(json.dumps(NARROW.tolist()))
    argv = ["dynamics", "--preferences", str(file), "--a", "0.25", "--lam", "0.25", "--output", str(output)]
    assert main([*argv, "--loss", "dpo", "--beta", "1", "--rounds", "20"]) == 0
    printed = capsys.readouterr().out
    assert "stable, by simulation" in printed
    assert "does not keep answer 1, which beats all others, on top; pairs drawn with" in printed
    result = json.loads(output.read_text())
    assert len(result["policies"]) == 21 and result["one_shot"]["kept"]["top"] is False
    assert main([*argv, "--loss", "ipo", "--b", "1", "--sampling", "98", "1", "1"]) == 0
    assert "keeps answer 1, which beats all others, on top" in capsys.readouterr().out
    np.testing.assert_allclose(smoothed(strict(2), 0.1), [[0.5, 0.9], [0.1, 0.5]])


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--loss", "dpo"], "--loss dpo needs --beta"),
        ([], "--loss ipo needs --b"),
        (["--loss", "dpo", "--beta", "1", "--b", "1"], "--b is no option of --loss dpo"),
        (["--b", "1", "--label_smoothing", "0.1"], "--label_smoothing is no option of --loss ipo"),
        (["--loss", "dpo", "--beta", "1", "--label_smoothing", "0.5"], "--label_smoothing must be"),
        (["--loss", "dpo", "--beta", "0"], "--beta must be"),
        (["--loss", "dpo", "--beta", "1", "--rounds", "2000"], "--rounds must be at most 1000"),
        (["--loss", "dpo", "--beta", "1", "--plot", "x.png"], "leave it out"),
        (["--b", "1", "--sampling", "1", "2"], "--sampling has 2 weights for 3 answers"),
    ],
)
def test_refusals(argv, sentence, capsys):
    assert sentence in refusal(capsys, main(["dynamics", "--cycle", "0.2", "--a", "0.5", *argv]))
