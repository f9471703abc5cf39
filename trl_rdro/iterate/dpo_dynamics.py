"""
The loop of `dynamics.py` with DPO in place of IPO, and what a single round of either makes of the preferences' order.

Over the pairs that mu draws, population DPO minimises sum_ij mu_i mu_j P_ij softplus(-beta (z_i - z_j)) in the
log-ratios z. There it has, for each answer i, sum_j mu_j (sigma(beta (z_i - z_j)) - P_ij) = 0: a Bradley-Terry model
fitted to P on what was sampled. Where P is such a model mu does not matter; where it is not, mu decides what becomes
of the order. Where the judge is certain (P_ij of 0 or 1) z has no bound, and one round may end in a single answer.
Label smoothing e judges by (1 - 2 e) P + e instead, which bounds it (`cdpo`).
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from .dynamics import CLOSE, COLLAPSING, OSCILLATING, STABLE, default_entropy_floor, disturbed, entropy, softmax
from .margins import preference_norm, stability_margin


LARGEST = 40.0  # nats of beta z between neighbours in the order: what stands for no bound
CANDIDATES = 300  # sampling distributions that are tried
Rewards = Callable[[np.ndarray], np.ndarray]  # the z of a round's optimum, of the distribution that was sampled


def smoothed(P: np.ndarray, label_smoothing: float) -> np.ndarray:
    return (1 - 2 * label_smoothing) * P + label_smoothing


def dpo_rewards(P: np.ndarray, mu: np.ndarray, beta: float) -> np.ndarray:
    """z of the population optimum of DPO on pairs from mu, `(K,)`, with the mean 0 under mu.

    By Newton's method on the condition above, whose derivative is a Laplacian; steps are shortened to one nat, and z
    stops growing at `LARGEST` / beta per answer where it has no bound.
    """
    u = np.zeros(len(P))
    for _ in range(2000):
        belief = 0.5 * (1 + np.tanh((u[:, None] - u) / 2))
        gap = (belief - P) @ mu
        weights = np.maximum(belief * (1 - belief), 1e-12) * mu
        # The mean under mu is held, which makes the matrix regular
        laplacian = np.diag(weights.sum(axis=1)) - weights + mu
        step = np.linalg.solve(laplacian, gap - gap @ mu)
        step /= max(1.0, abs(step).max())
        u = u - step
        if abs(step).max() < 1e-10 or abs(u).max() > LARGEST * len(P):
            break
    return (u - u @ mu) / beta


def dpo_trajectory(P: np.ndarray, a: float, beta: float, lam: float, reference, start, rounds: int) -> np.ndarray:
    """The log-policies of rounds 0 .. `rounds`, `(rounds + 1, K)`, up to a constant each, with exact DPO rounds."""
    log_reference = np.log(reference)
    log_policies = [np.log(start)]
    for _ in range(rounds):
        mu = lam * softmax(log_policies[-1]) + (1 - lam) * np.asarray(reference)
        log_policy = a * log_policies[-1] + (1 - a) * log_reference + dpo_rewards(P, mu, beta)
        log_policies.append(log_policy - log_policy.max())
    return np.stack(log_policies)


def dpo_study(
    P: np.ndarray,
    a: float,
    beta: float,
    lam: float,
    reference: np.ndarray,
    rounds: int = 100,
    entropy_floor: float | None = None,
    label_smoothing: float = 0.0,
) -> dict[str, Any]:
    """
    All that `trl-rdro dynamics --loss dpo` prints and writes, as plain data.

    The regime is that of the simulation from `dynamics.disturbed` pi_0, as there is no formula: "oscillating" unless
    the second half of its policies stays within `CLOSE` of the last, "collapsing" if its entropy ends below the floor,
    else "stable". `b` and the `margin` are those of the Lipschitz constant where the smoothed judge is never certain,
    else None.
    """
    judge = smoothed(np.asarray(P, float), label_smoothing)
    floor = default_entropy_floor(P) if entropy_floor is None else entropy_floor
    policies = softmax(dpo_trajectory(judge, a, beta, lam, reference, disturbed(reference), rounds))
    entropies = entropy(policies)
    away = np.flatnonzero(abs(policies - policies[-1]).sum(axis=-1) / 2 > CLOSE)
    settled = 0 if not len(away) else int(away[-1]) + 1
    has_settled = settled <= rounds / 2
    p = float(judge.max())
    b = math.log(p / (1 - p)) / (p - 0.5) / beta if 0.5 < p < 1 else None
    return {
        "loss": "dpo",
        "a": a,
        "beta": beta,
        "lam": lam,
        "label_smoothing": label_smoothing,
        "preferences": np.asarray(P).tolist(),
        "reference": np.asarray(reference).tolist(),
        "regime": OSCILLATING if not has_settled else COLLAPSING if entropies[-1] < floor else STABLE,
        "b": b,
        "margin": None if b is None else float(stability_margin(a, b, lam, preference_norm(judge))),
        "entropy_floor": floor,
        "settled_after": settled if has_settled else None,
        "policies": policies.tolist(),
        "entropies": entropies.tolist(),
    }


# What one round keeps of the order


def smith_set(P: np.ndarray) -> list[int]:
    """The smallest set whose members all beat all others; the Condorcet winner alone where there is one."""
    beats = P > 0.5
    order = np.argsort(-beats.sum(axis=1), kind="stable")
    for size in range(1, len(P)):
        inside, outside = order[:size], order[size:]
        if beats[np.ix_(inside, outside)].all():
            return sorted(int(i) for i in inside)
    return list(range(len(P)))


def constraints(P: np.ndarray) -> dict[str, list[tuple[int, int]]]:
    """What has to be kept: pairs (i, j) of which i is to have the greater z.

    `top`: the members of the Smith set before all others (none if it is everything); `order`: every i before each j
    that it beats, if that has no cycles.
    """
    top = smith_set(P)
    pairs = [(int(i), int(j)) for i, j in np.argwhere(P > 0.5)]
    wins = sorted((P > 0.5).sum(axis=1))
    wanted = {"top": [(i, j) for i in top for j in range(len(P)) if j not in top]}
    if wins == list(range(len(P))):  # a strict order
        wanted["order"] = pairs
    return wanted


def one_shot(P: np.ndarray, mu: np.ndarray, rewards: Rewards) -> dict[str, Any]:
    """
    Whether the optimum of one round on pairs from mu keeps the Condorcet winner or Smith set on top, and the order.

    Args:
        mu: what is sampled, `(K,)`.
        rewards: see `Rewards`.

    Returns:
        `winner` (None without one), `smith_set`, the `rewards`, and for "top" and "order" (of `constraints`, where
        they apply) whether they are `kept`; for those that are not, in `restored_by` a sampling distribution that
        keeps them: the one of some hundreds with the largest smallest gap, or None where none of these does.
    """
    top, wanted = smith_set(P), {name: pairs for name, pairs in constraints(P).items() if pairs}
    z = rewards(mu)
    result: dict[str, Any] = {
        "smith_set": top,
        "winner": top[0] if len(top) == 1 else None,
        "sampling": mu.tolist(),
        "rewards": z.tolist(),
        "kept": {name: bool(_gap(z, pairs) > 0) for name, pairs in wanted.items()},
        "restored_by": {},
    }
    lost = {name: pairs for name, pairs in wanted.items() if not result["kept"][name]}
    if lost:
        tried = [(candidate, rewards(candidate)) for candidate in _candidates(len(P), top)]
        for name, pairs in lost.items():
            best, its_z = max(tried, key=lambda one: _gap(one[1], pairs))
            result["restored_by"][name] = best.tolist() if _gap(its_z, pairs) > 0 else None
    return result


def _gap(z: np.ndarray, pairs: list[tuple[int, int]]) -> float:
    return min(float(z[i] - z[j]) for i, j in pairs)


def _candidates(K: int, top: list[int]) -> list[np.ndarray]:
    """Sampling distributions: uniform, mostly the top, mostly one answer, and random ones."""
    rng, floor = np.random.default_rng(0), 0.05 / K
    of_top = np.array([float(i in top) for i in range(K)])
    shares = [np.full(K, 1 / K), of_top / of_top.sum(), *np.eye(K), *rng.dirichlet(np.full(K, 0.5), CANDIDATES)]
    return [0.95 * share + floor for share in shares]
