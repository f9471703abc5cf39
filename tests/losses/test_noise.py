"""cDPO, Hölder-DPO, ROPO and RE-PO: worked examples, limits, and how they let go of contradicted pairs."""

import math

import pytest
import torch

from trl_rdro.losses import cdpo_loss, holder_loss, repo_loss, repo_posterior, repo_update, ropo_loss, sigmoid_loss


LOG3 = math.log(3)
MARGINS = torch.linspace(-40, 40, 161, dtype=torch.float64)


def at(u, function, *args, **kwargs):
    """The loss and its slope at scaled margins u (beta = 1)."""
    u = torch.as_tensor(u, dtype=torch.float64).clone().requires_grad_()
    values = function(u, torch.zeros_like(u), *args, beta=1.0, **kwargs)
    return values.detach(), torch.autograd.grad(values.sum(), u)[0]


def dpo_slope(u):
    return -torch.sigmoid(-torch.as_tensor(u, dtype=torch.float64))


def test_worked_examples():
    # u = log 3: s = 3/4
    u = [LOG3]
    assert at(u, cdpo_loss, label_smoothing=0.25)[0].item() == pytest.approx(math.log(4 / 3) + LOG3 / 4)
    # gamma 1: s^2 - 2 s = 9/16 - 3/2, slope -2 s (1 - s)^2 = -2 * 3/4 * 1/16
    value, slope = at(u, holder_loss, gamma=1.0)
    assert (value.item(), slope.item()) == pytest.approx((-15 / 16, -3 / 32))
    # a = 1: log(4/3) + 1/4, slope -(1 - s) (1 + s) = -7/16
    value, slope = at(u, ropo_loss, alpha=1.0)
    assert (value.item(), slope.item()) == pytest.approx((math.log(4 / 3) + 1 / 4, -7 / 16))
    # eta = 9/10: 27/40 + 1/40 = 7/10 is the likelihood, 27/28 the posterior, slope 3/4 - 27/28
    value, slope = at(u, repo_loss, 0.9)
    assert (value.item(), slope.item()) == pytest.approx((-math.log(0.7), 3 / 4 - 27 / 28))
    z = torch.tensor([10 * LOG3], dtype=torch.float64, requires_grad=True)
    posterior = repo_posterior(z, torch.zeros(1), 0.9, beta=0.1)
    assert posterior.item() == pytest.approx(27 / 28) and not posterior.requires_grad


@pytest.mark.parametrize(
    ("function", "args"), [(cdpo_loss, {"label_smoothing": 0.0}), (repo_loss, {"eta": 1.0})], ids=["cdpo", "repo"]
)
def test_certain_labels_are_dpo(function, args):
    value, slope = at(MARGINS, function, **args)
    expected, expected_slope = at(MARGINS, sigmoid_loss)
    torch.testing.assert_close(value, expected, rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(slope, expected_slope, rtol=1e-14, atol=1e-15)


def test_ropo_is_proportional_to_dpo_at_a_small_alpha():
    value, slope = at(MARGINS, ropo_loss, alpha=1e-9)
    torch.testing.assert_close(value / 4e-9, at(MARGINS, sigmoid_loss)[0], rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(slope / 4e-9, dpo_slope(MARGINS), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0, 8.0])
def test_holders_slope_is_its_formula_and_redescends(gamma):
    s = torch.sigmoid(MARGINS)
    slope = at(MARGINS, holder_loss, gamma=gamma)[1]
    torch.testing.assert_close(
        slope, -gamma * (1 + gamma) * s**gamma * torch.sigmoid(-MARGINS) ** 2, rtol=1e-9, atol=1e-13
    )
    # s^gamma (1 - s)^2 is largest at s = gamma / (2 + gamma) and vanishes on both sides
    steepest = math.log(gamma / 2)
    below = at(torch.linspace(steepest - 60 / gamma, steepest, 200), holder_loss, gamma=gamma)[1]
    assert (below.diff() <= 0).all() and abs(below[0]) < 1e-9
    assert (at(torch.linspace(steepest, 40, 200), holder_loss, gamma=gamma)[1].diff() >= -1e-12).all()


@pytest.mark.parametrize("alpha", [1.0, 14.0, 100.0])
def test_ropos_slope_is_its_formula_with_maximum_one(alpha):
    s = torch.sigmoid(MARGINS)
    scale = 4 * alpha / (1 + alpha) ** 2
    slope = at(MARGINS, ropo_loss, alpha=alpha)[1]
    torch.testing.assert_close(slope, -scale * torch.sigmoid(-MARGINS) * (1 + alpha * s), rtol=1e-12, atol=1e-15)
    assert slope.min() >= -1 - 1e-12
    if alpha > 1:
        s = (alpha - 1) / (2 * alpha)
        assert at([math.log(s / (1 - s))], ropo_loss, alpha=alpha)[1].item() == pytest.approx(-1)
    assert at([-1e3], ropo_loss, alpha=alpha)[1].item() == pytest.approx(-scale)


@pytest.mark.parametrize("eta", [0.6, 0.9, 0.999])
def test_repos_slope_is_s_minus_the_posterior_and_redescends(eta):
    s = torch.sigmoid(MARGINS)
    w = repo_posterior(MARGINS, torch.zeros_like(MARGINS), eta, beta=1.0)
    torch.testing.assert_close(w, eta * s / (eta * s + (1 - eta) * (1 - s)))
    slope = at(MARGINS, repo_loss, eta)[1]
    torch.testing.assert_close(slope, s - w, rtol=0, atol=1e-15)
    assert abs(slope[0]) < 1e-13 < abs(slope[len(slope) // 2])
    assert abs(at([-1e4], repo_loss, eta)[1].item()) == 0


def test_an_eta_for_each_pair():
    eta = torch.tensor([0.6, 0.9, 1.0])
    z = torch.tensor([3.0, -2.0, 1.0])
    values = repo_loss(z, -z, eta, beta=0.5)
    expected = [repo_loss(z[i : i + 1], -z[i : i + 1], e, beta=0.5).item() for i, e in enumerate(eta.tolist())]
    assert values.tolist() == pytest.approx(expected, rel=1e-6)


def test_eta_moves_to_the_mean_posterior_of_the_step():
    eta, posteriors = torch.tensor([0.9]), torch.tensor([0.8, 0.4, 0.6])
    assert repo_update(eta, posteriors, torch.zeros(3, dtype=torch.long), 0.1).item() == pytest.approx(0.87)
    assert repo_update(eta, posteriors, torch.zeros(3, dtype=torch.long), 0.0).item() == pytest.approx(0.9)


def test_each_annotator_has_an_eta_of_their_own():
    eta = torch.tensor([0.9, 0.5, 0.7])
    updated = repo_update(eta, torch.tensor([1.0, 0.0, 0.5]), torch.tensor([1, 0, 1]), 0.2)
    # 0.9 + 0.2 (0 - 0.9), 0.5 + 0.2 (0.75 - 0.5), and no pair for the last
    assert updated.tolist() == pytest.approx([0.72, 0.55, 0.7])
    assert torch.equal(repo_update(eta, torch.zeros(0), torch.zeros(0, dtype=torch.long), 0.2), eta)


def test_em_finds_the_share_of_right_labels_under_a_calibrated_policy():
    """The paper's statement: with the true beliefs in hand, eta goes to the share of labels that are right."""
    generator = torch.Generator().manual_seed(0)
    u = 4 * torch.randn(40_000, generator=generator, dtype=torch.float64)
    preferred = torch.rand(len(u), generator=generator) < torch.sigmoid(u)  # by people who agree with the policy
    right = torch.rand(len(u), generator=generator) < 0.8
    labels = torch.where(preferred == right, 1.0, -1.0)  # the recorded winner, from the first completion's view
    eta, everybody = torch.tensor([0.95], dtype=torch.float64), torch.zeros(len(u), dtype=torch.long)
    for _ in range(60):
        posterior = repo_posterior(labels * u, torch.zeros_like(u), eta.expand(len(u)), beta=1.0)
        eta = repo_update(eta, posterior, everybody, 0.5)
    assert eta.item() == pytest.approx(0.8, abs=0.015)
