"""
A language model in the loop does what the exact dynamics of the same a, lam and b do.

The judge goes in circles (A beats B beats C beats A) or in a straight line. Each round's policy is compared with the
exact step from the policy before it. What they may differ by is the noise of some 500 judged pairs: an answer's
log-odds rest on about 110 pairs against each of the other two, each of which says +-b/2 at random.
"""

import numpy as np
import pytest

from .three_answers import exact_step, run_loop, run_rounds_of_rdro


C = 0.4
CYCLE = 0.5 + C * np.array([[0, 1, -1], [-1, 0, 1], [1, -1, 0]])
ORDER = 0.5 + C * np.array([[0, 1, 1], [-1, 0, 1], [-1, -1, 0]])


def log_odds(policies: np.ndarray) -> np.ndarray:
    logits = np.log(policies)
    return logits - logits.mean(axis=-1, keepdims=True)


def check_steps(policies: np.ndarray, preferences: np.ndarray, a: float, lam: float, b: float) -> None:
    for before, after in zip(policies[:-1], policies[1:], strict=True):
        expected = exact_step(before, policies[0], preferences, a, lam, b)
        mu = lam * before + (1 - lam) * policies[0]
        # Three standard errors of the answer that was seen least
        noise = 3 * b / 2 / np.sqrt(512 * 2 * mu.min() * (1 - mu.min()))
        assert np.abs(log_odds(after) - log_odds(expected)).max() < noise
    assert np.abs(log_odds(policies[1]) - log_odds(policies[0])).max() > 0.1


@pytest.mark.slow
def test_circling_judge_oscillates_beyond_the_threshold(tmp_path):
    a, lam, b = 0.5, 1.0, 5.0
    assert a**2 + C**2 * b**2 * lam**2 / 3 > 1
    report, policies = run_loop(tmp_path, CYCLE, a, lam, b, rounds=6)
    check_steps(policies, CYCLE, a, lam, b)
    # It moves on by the angle of the unstable mode each round, and never settles
    steps = np.linalg.norm(np.diff(log_odds(policies), axis=0), axis=1)
    assert steps.min() > 0.5
    assert all(round["margin"] < 0 and "margin is -" in round["warnings"][0] for round in report["rounds"])
    assert any("The policy circles" in warning for round in report["rounds"] for warning in round["warnings"])


@pytest.mark.slow
def test_circling_judge_settles_where_the_condition_holds(tmp_path):
    a, lam, b = 0.25, 0.5, 2.0
    assert a + b * lam / 2 * C * np.sqrt(3) < 1
    report, policies = run_loop(tmp_path, CYCLE, a, lam, b, rounds=5)
    check_steps(policies, CYCLE, a, lam, b)
    settled = policies[0]
    for _ in range(200):
        settled = exact_step(settled, policies[0], CYCLE, a, lam, b)
    # All later rounds are at the fixed point, but for the noise of a round or two
    noise = 3 * 1.1 * b / 2 / np.sqrt(512 * 2 * settled.min() * (1 - settled.min()))
    assert np.abs(log_odds(policies[3:]) - log_odds(settled)).max() < noise
    for round in report["rounds"]:
        assert round["margin"] == pytest.approx(1 - (a + b * lam / 2 * C * np.sqrt(3)), abs=1e-6)
        assert not round["warnings"]


@pytest.mark.slow
def test_a_straight_judge_with_a_1_collapses_and_the_run_stops_itself(tmp_path):
    report, policies = run_loop(tmp_path, ORDER, a=1.0, lam=1.0, b=5.0, rounds=8, entropy_floor=0.3)
    exact = -(policies * np.log(policies)).sum(axis=1)
    for round, entropy in zip([report["base"], *report["rounds"]], exact, strict=True):
        estimate = round["entropy"]
        assert abs(estimate["mean"] - entropy) < 5 * estimate["standard_error"]
    assert exact[-1] < 0.3 * exact[0] < exact[-2]
    assert report["stopped"] and 1 < len(report["rounds"]) < 8
    assert "the run stops" in report["rounds"][-1]["warnings"][-1]
    # Of the rounds above the floor the last wins most, and is what is kept
    assert report["best_round"] == report["final_round"] == len(report["rounds"]) - 2
    final, kept = (tmp_path / "out" / name for name in ("final", f"round_{report['best_round']:03d}/model"))
    assert (final / "model.safetensors").read_bytes() == (kept / "model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_pass_or_fail_with_tossed_ties_goes_to_the_answers_that_pass(tmp_path, method):
    """rdro on what the policy drew itself. A round takes the pass rate s to s (2 - s), the share of the winners of
    random pairs, so that the failures' share is squared; with ties dropped the reference would be no mixture."""
    policies = run_rounds_of_rdro(tmp_path, method, shares=(0.2, 0.3, 0.5), rounds=4)
    passing = policies[:, 0]
    for before, after in zip(passing, passing[1:], strict=False):
        assert after == pytest.approx(before * (2 - before), abs=0.06)
    assert passing[0] == pytest.approx(0.2, abs=1e-3) and passing[-1] > 0.9
