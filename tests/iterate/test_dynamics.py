"""The population dynamics of iterated training: what theory says of them, against iterating them."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest

from trl_rdro.cli import main
from trl_rdro.iterate.dynamics import (
    REGIMES,
    bradley_terry,
    check_preferences,
    cycle,
    disturbed,
    entropy,
    fixed_point,
    margin,
    phase_diagram,
    rate,
    regime,
    softmax,
    trajectory,
)

from ..helpers import is_png, refusal


def random_preferences(rng, n, answers):
    """`n` matrices without any structure but P + P^T = 1."""
    upper = np.triu(rng.uniform(size=(n, answers, answers)), 1)
    return upper + np.tril(1 - upper.swapaxes(1, 2), -1) + np.eye(answers) / 2


def centred(log_pi):
    return log_pi - log_pi.mean(axis=-1, keepdims=True)


def regime_of(*args, **kwargs):
    return REGIMES[regime(*args, **kwargs)["regime"]]


# Oscillation


def test_oscillation_threshold_of_the_cycle_by_iterating():
    """The b at which a small distance from the uniform policy turns from shrinking to growing, found by bisection on
    simulated rounds, solves a^2 + c^2 b^2 lam^2 / 3 = 1."""
    a, c, lam = (x.ravel() for x in np.meshgrid([0.0, 0.5, 0.9], [0.05, 0.3, 0.5], [0.25, 1.0]))
    P = np.stack([cycle(value) for value in c])
    start = softmax(1e-8 * np.array([1.0, -1.0, 0.0]))
    low, high = np.zeros_like(a), np.full_like(a, 300.0)
    for _ in range(40):
        b = (low + high) / 2
        distance = np.linalg.norm(centred(trajectory(P, a, b, lam, start=start, rounds=20)), axis=-1)
        grows = distance[-1] > distance[0]
        low, high = np.where(grows, low, b), np.where(grows, b, high)
    np.testing.assert_allclose(a**2 + (c * low * lam) ** 2 / 3, 1, atol=1e-4)


@pytest.mark.parametrize("a", [0.0, 0.5, 0.9])
def test_either_side_of_the_threshold_from_far_away(a):
    b = np.sqrt(3 * (1 - a**2)) / 0.3
    start = disturbed(np.full(3, 1 / 3))
    below, above = (softmax(trajectory(cycle(0.3), a, b * x, 1.0, start=start, rounds=3000)) for x in (0.98, 1.02))
    assert abs(below[-1] - 1 / 3).max() < 1e-4
    assert (abs(above[-1000:] - 1 / 3).max(axis=-1) > 0.02).all()
    assert np.ptp(above[-1000:], axis=0).min() > 0.04  # it goes round, and does not rest elsewhere
    assert [regime_of(cycle(0.3), a, b * x, 1.0) for x in (0.98, 1.02)] == ["stable", "oscillating"]


def test_rate_is_the_spectral_radius_of_the_round():
    rng = np.random.default_rng(0)
    a, b, lam = rng.uniform(0, 0.95, 50), rng.uniform(0, 8, 50), rng.uniform(0, 1, 50)
    P, reference = random_preferences(rng, 50, 4), rng.dirichlet(np.ones(4), 50)
    fixed = fixed_point(P, a, b, lam, reference)
    rates = rate(P, a, b, lam, fixed)
    for i in range(50):

        def one_round(x, i=i):
            start = softmax(np.log(fixed[i]) + x)
            return centred(trajectory(P[i], a[i], b[i], lam[i], reference[i], start, rounds=1)[-1])

        jacobian = np.stack([(one_round(h) - one_round(-h)) / 2e-5 for h in 1e-5 * np.eye(4)], axis=1)
        assert abs(np.linalg.eigvals(jacobian)).max() == pytest.approx(rates[i], abs=1e-6)


# Contraction


def test_contraction_wherever_the_sufficient_condition_holds():
    """1,000 random P: every round brings any two policies closer by the promised factor, to the one fixed point."""
    rng = np.random.default_rng(1)
    for answers in (2, 3, 5, 10):
        P = random_preferences(rng, 250, answers)
        a, lam, reference = rng.uniform(0, 0.95, 250), rng.uniform(0.05, 1, 250), rng.dirichlet(np.ones(answers), 250)
        norm = np.linalg.norm(P - 0.5, ord=2, axis=(1, 2))
        b = rng.uniform(0, 1, 250) * (1 - a) * 2 / (lam * norm)
        promised = margin(P, a, b, lam)
        assert (promised > 0).all() and promised.min() < 0.01
        one, other = (
            trajectory(P, a, b, lam, reference, start, 2000) for start in rng.dirichlet(np.ones(answers), (2, 250))
        )
        distance = np.linalg.norm(centred(one) - centred(other), axis=-1)
        assert (distance[1:] <= (1 - promised) * distance[:-1] + 1e-12).all()
        sure = promised > 0.02
        np.testing.assert_allclose(softmax(one[-1])[sure], fixed_point(P, a, b, lam, reference)[sure], atol=1e-9)


def test_the_condition_is_not_necessary():
    P = cycle(0.3)
    assert margin(P, 0.5, 4.0, 1.0) < -0.5 and regime_of(P, 0.5, 4.0, 1.0) == "stable"
    end = trajectory(P, 0.5, 4.0, 1.0, start=np.array([0.98, 0.01, 0.01]))[-1]
    assert abs(softmax(end) - 1 / 3).max() < 1e-9


def test_beyond_the_condition_an_attracting_fixed_point_need_not_attract_from_far():
    P = np.array([[0.5, 0.9, 0.7, 0.2], [0.1, 0.5, 0.1, 0.7], [0.3, 0.9, 0.5, 0.5], [0.8, 0.3, 0.5, 0.5]])
    fixed = regime(P, 0.5, 54.0, 1.0)["fixed_point"]
    assert regime_of(P, 0.5, 54.0, 1.0) == "stable"
    near, far = 0.999 * fixed + 0.001 / 4, disturbed(np.full(4, 0.25))
    near, far = (softmax(trajectory(P, 0.5, 54.0, 1.0, start=start, rounds=2000)) for start in (near, far))
    assert abs(near[-1] - fixed).max() < 1e-9
    assert (abs(far[-500:] - fixed).max(axis=-1) > 0.05).all()


@pytest.mark.parametrize("answers", [2, 3, 8])
def test_a_round_leaves_the_fixed_point_as_it_is(answers):
    """Also where it is unstable, the preferences are near certainty, and a is close to 1."""
    rng = np.random.default_rng(2)
    P = random_preferences(rng, 200, answers)
    P[:100] = 0.5 + 0.499 * np.sign(P[:100] - 0.5)
    a, b, lam = 1 - 10 ** rng.uniform(-4, 0, 200), 10 ** rng.uniform(-1, 2, 200), rng.uniform(0, 1, 200)
    reference = rng.dirichlet(np.ones(answers), 200)
    fixed = fixed_point(P, a, b, lam, reference)
    assert rate(P, a, b, lam, fixed).max() > 1 or answers == 2
    after = softmax(trajectory(P, a, b, lam, reference, np.maximum(fixed, 1e-300), rounds=1)[-1])
    np.testing.assert_allclose(after, fixed, atol=1e-9)


# Collapse


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
def test_collapse_at_a_1_under_strong_transitivity(lam):
    P = bradley_terry([1.0, 0.5, 0.0, -1.0])
    left = entropy(softmax(trajectory(P, 1.0, 0.5, lam, rounds=1000)))
    assert (np.diff(left) < 1e-12).all() and left[0] == pytest.approx(np.log(4)) and left[-1] < 1e-6
    assert regime_of(P, 1.0, 0.5, lam) == "collapsing"
    # The slightest pull to pi_0 leaves some
    assert regime(P, 0.9, 0.5, lam)["entropy"] > 0.3


def test_at_a_1_the_loop_collapses_if_one_answer_beats_all_others_and_circles_otherwise():
    P = random_preferences(np.random.default_rng(3), 300, 4)
    beats_all = (P + np.eye(4) > 0.5).all(axis=2).any(axis=1)
    assert 50 < beats_all.sum() < 250
    expected = np.where(beats_all, REGIMES.index("collapsing"), REGIMES.index("oscillating"))
    assert (regime(P, 1.0, 0.7, 1.0)["regime"] == expected).all()
    end = softmax(trajectory(P, 1.0, 0.7, 1.0, rounds=20000))
    assert (entropy(end[-1][beats_all]) < 0.01).all()
    # The winner of the moment changes even late; a cycle stays exponentially longer with each
    winners = end[:, ~beats_all].argmax(axis=-1)
    assert np.mean([len(set(column)) > 1 for column in winners[100:].T]) > 0.9


def test_at_a_1_two_equally_good_answers_share():
    result = regime(bradley_terry([1.0, 1.0, 0.0]), 1.0, 1.0, 1.0, np.array([0.2, 0.4, 0.4]))
    assert REGIMES[result["regime"]] == "stable"
    np.testing.assert_allclose(result["fixed_point"], [1 / 3, 2 / 3, 0], atol=1e-9)


def test_entropy_under_strong_transitivity():
    """For a given lam it is a function of b lam / (1 - a) alone, and falls with it from that of pi_0 to 0."""
    P = bradley_terry([1.0, 0.5, 0.0, -1.0])
    strength = np.array([1e-3, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 64.0, 256.0])
    for lam in (0.2, 1.0):
        by_a = {a: fixed_point(P, a, strength * (1 - a) / lam, lam) for a in (0.0, 0.5, 0.99)}
        for fixed in by_a.values():
            np.testing.assert_allclose(fixed, by_a[0.0], atol=1e-9)
        left = entropy(by_a[0.0])
        assert (np.diff(left) < 0).all() and left[0] == pytest.approx(np.log(4), abs=1e-5) and left[-1] < 1e-9
        # Not only at the fixed point: the loop gets there
        end = trajectory(P, 0.5, strength[:5] * 0.5 / lam, lam, rounds=500)[-1]
        np.testing.assert_allclose(softmax(end), by_a[0.0][:5], atol=1e-9)


def test_across_lam_entropy_is_no_function_of_that_number():
    """Sampling from pi_0 alone makes it 0, and the policy collapses all the same as b/(1-a) grows: the pull of the
    preferences is b P mu, and mu is never empty."""
    P = bradley_terry([1.0, 0.5, 0.0, -1.0])
    at_same_number = [float(entropy(fixed_point(P, 0.5, 2.0 / lam, lam))) for lam in (0.1, 0.5, 1.0)]
    assert at_same_number[0] < 0.2 and at_same_number[2] > 0.9
    assert entropy(fixed_point(P, 0.5, 200.0, 0.0)) < 1e-9


# The diagram


def test_phase_diagram_of_the_cycle():
    a, b_lam = np.linspace(0, 1, 21), np.linspace(0, 8, 33)
    for lam in (0.25, 1.0):
        diagram = phase_diagram(cycle(0.3), a, b_lam, lam)
        expected = np.hypot(a, 0.3 * b_lam[:, None] / np.sqrt(3))
        np.testing.assert_allclose(diagram["rate"], expected, atol=1e-9)
        np.testing.assert_allclose(diagram["margin"], 1 - a - b_lam[:, None] / 2 * 0.3 * np.sqrt(3), atol=1e-9)
        assert (diagram["regime"] == np.where(expected > 1, REGIMES.index("oscillating"), 0)).all()


# The command


def test_command_end_to_end(tmp_path, capsys):
    output, plot = tmp_path / "out.json", tmp_path / "out.png"
    argv = ["dynamics", "--cycle", "0.3", "--a", "0.5", "--b", "6", "--rounds", "50"]
    assert main([*argv, "--output", str(output), "--plot", str(plot)]) == 0
    printed = capsys.readouterr().out
    result = json.loads(output.read_text())
    assert result["regime"] == "oscillating" and "oscillating" in printed
    assert result["rate"] == pytest.approx(np.sqrt(0.25 + 0.09 * 36 / 3)) and f"{result['rate']:.4f}" in printed
    assert result["margin"] == pytest.approx(1 - 0.5 - 3 * 0.3 * np.sqrt(3)) and f"{result['margin']:.4f}" in printed
    np.testing.assert_allclose(result["fixed_point"], 1 / 3)
    expected = softmax(trajectory(cycle(0.3), 0.5, 6.0, 1.0, start=np.array([4, 1, 1]) / 6, rounds=50))
    np.testing.assert_allclose(result["policies"], expected, atol=1e-12)
    np.testing.assert_allclose(result["entropies"], entropy(expected), atol=1e-12)
    assert result["settled_after"] is None and "not within" in printed
    assert is_png(plot) and str(plot) in printed


@pytest.mark.parametrize("kind", ["json", "csv"])
def test_preferences_from_a_file_are_those_of_the_rewards(tmp_path, kind):
    P = bradley_terry([2.0, 1.0, 0.0])
    path = tmp_path / f"P.{kind}"
    if kind == "json":
        path.write_text(json.dumps(P.tolist()))
    else:
        with path.open("w", newline="") as file:
            csv.writer(file).writerows(P.tolist())
    settings = ["--a", "0.8", "--b", "1", "--lam", "0.5", "--reference", "1", "1", "2"]
    results = []
    for i, source in enumerate((["--preferences", str(path)], ["--rewards", "2", "1", "0"])):
        output = tmp_path / f"{i}.json"
        assert main(["dynamics", *source, *settings, "--output", str(output)]) == 0
        results.append(json.loads(output.read_text()))
    assert results[0] == results[1]
    assert results[0]["regime"] == "stable"
    # It has settled when it says so, and not a round before
    after, fixed = results[0]["settled_after"], np.array(results[0]["fixed_point"])
    distances = abs(np.array(results[0]["policies"]) - fixed).sum(axis=1) / 2
    assert after > 0 and distances[after - 1] > 0.01 and (distances[after:] <= 0.01).all()


def test_entropy_floor_decides_what_a_collapse_is(tmp_path):
    found = []
    for floor in ("0.01", "1.3"):
        argv = ["dynamics", "--rewards", "2", "1", "0", "-1", "--a", "0.9", "--b", "1", "--entropy_floor", floor]
        assert main([*argv, "--output", str(tmp_path / "out.json")]) == 0
        found.append(json.loads((tmp_path / "out.json").read_text())["regime"])
    assert found == ["stable", "collapsing"]


CYCLE = ["--cycle", "0.3"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--cycle", "0.6"], ["--cycle", "between 0 and 0.5", "0.6"]),
        (["--rewards", "1"], ["--rewards", "two"]),
        (["--rewards", "1", "nan"], ["--rewards", "finite"]),
        (["--preferences", "P.txt"], [".json", "P.txt"]),
        (["--preferences", "nowhere.json"], ["nowhere.json"]),
        (["--preferences", "broken.json"], ["cannot read", "broken.json"]),
        (["--preferences", "words.csv"], ["words.csv", "better"]),
        (["--preferences", "ragged.csv"], ["ragged.csv", "one length"]),
        (["--preferences", "oblong.json"], ["square", "(2, 3)"]),
        (["--preferences", "rewards.json"], ["between 0 and 1"]),
        (["--preferences", "unequal.json"], ["P[0][1] = 0.7", "P[1][0] = 0.4"]),
        ([*CYCLE, "--a", "1.5"], ["--a", "between 0 and 1", "1.5"]),
        ([*CYCLE, "--b", "-1"], ["--b", "between 0 and 1e+06", "-1"]),
        ([*CYCLE, "--b", "inf"], ["--b", "finite"]),
        ([*CYCLE, "--lam", "nan"], ["--lam"]),
        ([*CYCLE, "--rounds", "0"], ["--rounds", "between 1 and 100000", "0"]),
        ([*CYCLE, "--rounds", "100000000"], ["--rounds", "between 1 and 100000"]),
        ([*CYCLE, "--b", "1e300"], ["--b", "1e+300"]),
        ([*CYCLE, "--reference", "1", "1"], ["--reference", "2 weights for 3 answers"]),
        ([*CYCLE, "--reference", "1", "1", "0"], ["--reference", "above 0"]),
        ([*CYCLE, "--output", "nowhere/out.json"], ["no directory nowhere"]),
        ([*CYCLE, "--plot", "out.jpg"], [".png"]),
        ([*CYCLE, "--plot", "out.png", "--lam", "0"], ["--lam"]),
        ([*CYCLE, "--plot", "out.png", "--b", "0"], ["--plot_max"]),
    ],
)
def test_refusals(tmp_path, monkeypatch, capsys, argv, words):
    monkeypatch.chdir(tmp_path)
    for name, text in {
        "broken.json": "[[",
        "words.csv": "0.5,better\nworse,0.5\n",
        "ragged.csv": "0.5,0.4\n0.6\n",
        "oblong.json": "[[0.5, 0.4, 0.1], [0.6, 0.5, 0.1]]",
        "rewards.json": "[[0.5, 2], [-1, 0.5]]",
        "unequal.json": "[[0.5, 0.7], [0.4, 0.5]]",
    }.items():
        (tmp_path / name).write_text(text)
    message = refusal(capsys, main(["dynamics", "--a", "0.5", "--b", "1", *argv]))
    for word in words:
        assert word in message
    assert not (tmp_path / "out.png").exists()


def test_missing_matplotlib_is_said(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = refusal(capsys, main(["dynamics", *CYCLE, "--a", "0.5", "--b", "1", "--plot", "out.png"]))
    assert "trl-rdro[plot]" in message


def test_check_preferences_passes_what_is_right():
    np.testing.assert_array_equal(check_preferences(cycle(0.2).tolist()), cycle(0.2))


def test_no_torch_is_imported():
    code = (
        "import sys; from trl_rdro.cli import main; "
        "assert main(['dynamics', '--cycle', '0.3', '--a', '0.5', '--b', '1']) == 0; "
        "assert not {'torch', 'trl', 'transformers', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
