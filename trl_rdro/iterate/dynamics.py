"""
Iterated preference training without a model: does the loop settle, circle or collapse?

One round of "sample, judge, train with IPO, move the reference" over K answers, with P_ij the probability that answer
i is preferred to answer j, takes the policy pi_t to (https://huggingface.co/papers/2602.12180)

    pi_{t+1} = softmax( a log pi_t + (1 - a) log pi_0 + b P mu_t ),     mu_t = lam pi_t + (1 - lam) pi_0

a: how far the reference follows the policy; lam: the policy's share of the sampled answers; b: the step, 1/tau of IPO.
P may have any structure, cycles included.

What can be said without iterating. Write A = P - 1/2; it is skew-symmetric, since P_ij + P_ji = 1, and A mu and P mu
differ by a constant, which softmax ignores. S = diag(pi) - pi pi^T is the derivative of softmax.

- The round has the derivative a I + b lam A S in log pi. A S has the eigenvalues of S^1/2 A S^1/2, which is
  skew-symmetric, so they are +- i w, and those of the round have the moduli sqrt(a^2 + (b lam w)^2): `rate`, with the
  largest w, is the factor per round of a small distance from the fixed point. Above 1 the policy circles.
- ||S|| <= 1/2, so that every round brings any two log-policies closer by the factor a + (b lam / 2) ||A||, where that
  is below 1: `margin`. This is sufficient, and far from necessary.
- For a < 1 there is one fixed point, log pi = log pi_0 + b/(1-a) P mu + const, whatever P is: with two, d their
  difference, d . (log pi - log pi') > 0 would equal b lam/(1-a) d . A d = 0.

Arrays may have leading dimensions, which broadcast: many P at once, or a grid of a and b.
"""

from typing import Any

import numpy as np

from .margins import preference_norm, stability_margin


STABLE, OSCILLATING, COLLAPSING = REGIMES = ("stable", "oscillating", "collapsing")
PATH_FACTOR = 1.5  # by which the preferences grow from one stage to the next on the way to a fixed point
CLOSE = 0.01  # total variation from the fixed point at which a loop counts as settled
SMALLEST_PULL = 1e-6  # 1 - a of the fixed point that stands for the limit at a = 1


# Preferences


def cycle(c: float) -> np.ndarray:
    """Three answers, each preferred to the next with probability 1/2 + c."""
    return 0.5 + c * np.array([[0, 1, -1], [-1, 0, 1], [1, -1, 0]])


def bradley_terry(rewards: np.ndarray) -> np.ndarray:
    """P_ij = sigma(r_i - r_j): strongly transitive."""
    rewards = np.asarray(rewards, float)
    return (1 + np.tanh((rewards[..., :, None] - rewards[..., None, :]) / 2)) / 2


def check_preferences(P: np.ndarray) -> np.ndarray:
    """P as an array. Raises `ValueError`, with one sentence, if it is no preference matrix."""
    try:
        P = np.asarray(P, float)
    except (TypeError, ValueError):
        raise ValueError("a preference matrix is rows of numbers, all of one length") from None
    if P.ndim != 2 or P.shape[0] != P.shape[1] or len(P) < 2:
        raise ValueError(f"a preference matrix is square, for two answers or more, not of shape {P.shape}")
    if not ((P >= 0) & (P <= 1)).all():
        raise ValueError("preferences are probabilities: each entry must be between 0 and 1")
    wrong = np.argwhere(abs(P + P.T - 1) > 1e-6)
    if len(wrong):
        i, j = wrong[0]
        raise ValueError(
            f"P[i][j] + P[j][i] must be 1, and 1/2 on the diagonal, but P[{i}][{j}] = {P[i, j]:g} and "
            f"P[{j}][{i}] = {P[j, i]:g}"
        )
    return P


# The round


def softmax(logits: np.ndarray) -> np.ndarray:
    exp = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exp / exp.sum(axis=-1, keepdims=True)


def entropy(pi: np.ndarray) -> np.ndarray:
    """In nats."""
    return 0.0 - (pi * np.log(np.where(pi > 0, pi, 1))).sum(axis=-1)


def _last(x: np.ndarray) -> np.ndarray:
    """A parameter of one value per P, broadcast along the answers."""
    return np.asarray(x, float)[..., None]


def _preference(P, lam, pi, reference) -> np.ndarray:
    """A mu: how much each answer is preferred to the sampled ones, beyond one half."""
    mu = _last(lam) * pi + (1 - _last(lam)) * reference
    return ((P - 0.5) @ mu[..., None])[..., 0]


def _uniform(P, reference) -> np.ndarray:
    return np.full(np.shape(P)[-1], 1 / np.shape(P)[-1]) if reference is None else np.asarray(reference, float)


def trajectory(P, a, b, lam, reference=None, start=None, rounds=1000) -> np.ndarray:
    """The log-policies of rounds 0 .. `rounds`, `(rounds + 1, ..., K)`, up to a constant each.

    Logarithms, because a collapsing policy soon has probabilities below the smallest float.

    Args:
        P: preferences, `(..., K, K)`.
        a, b, lam: of the round; numbers, or arrays for the leading dimensions.
        reference: pi_0, `(..., K)`, all entries positive (default: uniform).
        start: the first policy (default: pi_0).
    """
    reference = _uniform(P, reference)
    log_pi = np.log(reference if start is None else start)
    shape = np.broadcast_shapes(np.shape(P)[:-1], log_pi.shape, *(_last(x).shape for x in (a, b, lam)))
    log_pis = [np.broadcast_to(log_pi, shape)]
    for _ in range(rounds):
        pull = _last(b) * _preference(P, lam, softmax(log_pi), reference)
        log_pi = _last(a) * log_pi + (1 - _last(a)) * np.log(reference) + pull
        log_pi = log_pi - log_pi.max(axis=-1, keepdims=True)
        log_pis.append(log_pi)
    return np.stack(log_pis)


# Where it leads


def fixed_point(P, a, b, lam, reference=None) -> np.ndarray:
    """The policy that a round leaves as it is, stable or not; for a = 1 its limit as a goes to 1, where a loop that
    settles comes to rest.

    Follows the solution of log pi = log pi_0 + k A mu as k grows to b/(1-a), by Newton's method in log pi. The
    derivative I - k lam A S is never singular, so the path has no turns.
    """
    reference, A = _uniform(P, reference), np.asarray(P) - 0.5
    goal = np.asarray(b, float) / np.maximum(1 - np.asarray(a, float), SMALLEST_PULL)
    lam = np.asarray(lam, float)
    shape = np.broadcast_shapes(A.shape[:-1], reference.shape, _last(goal).shape, _last(lam).shape)
    log_pi = np.broadcast_to(np.log(reference), shape)
    stages = 1 + int(np.ceil(np.log(max(goal.max(), 1.0)) / np.log(PATH_FACTOR)))
    for factor in PATH_FACTOR ** np.arange(1.0 - stages, 1.0):
        log_pi = _newton(log_pi, P, factor * goal, lam, reference)
    return softmax(log_pi)


def _newton(log_pi, P, k, lam, reference) -> np.ndarray:
    """Solve log pi = log pi_0 + k A mu from close by. Steps that do not lower the residual are shortened."""

    def target(log_pi):
        return np.log(reference) + _last(k) * _preference(P, lam, softmax(log_pi), reference)

    def size(log_pi):
        return np.linalg.norm(log_pi - target(log_pi), axis=-1, keepdims=True)

    # Where pi has settled already its logarithm goes on growing with k: a better start, unless it has not
    start = target(log_pi)
    log_pi = np.where(size(start) < size(log_pi), start, log_pi)
    identity = np.eye(log_pi.shape[-1])
    for _ in range(100):
        error = size(log_pi)
        if (error < 1e-11 * (1 + _last(k))).all():
            return log_pi
        pi = softmax(log_pi)
        S = pi[..., None] * (identity - pi[..., None, :])
        derivative = identity - (k * lam)[..., None, None] * ((np.asarray(P) - 0.5) @ S)
        step = np.linalg.solve(derivative, (log_pi - target(log_pi))[..., None])[..., 0]
        for _ in range(20):
            better = size(log_pi - step) < error
            if better.all():
                break
            step = np.where(better, step, step / 2)
        log_pi = np.where(better, log_pi - step, log_pi)
    raise ArithmeticError("the fixed point was not found: b or 1/(1 - a) is too large")


def rate(P, a, b, lam, fixed: np.ndarray) -> np.ndarray:
    """The factor by which a small distance from the policy `fixed` grows in a round: the spectral radius there."""
    # A S and B A B^T with S = B^T B have the same eigenvalues. B: rows sqrt(pi_i) (e_i - pi)
    B = np.sqrt(fixed)[..., None] * (np.eye(fixed.shape[-1]) - fixed[..., None, :])
    w = np.linalg.norm(B @ (np.asarray(P) - 0.5) @ B.swapaxes(-1, -2), ord=2, axis=(-2, -1))
    return np.hypot(a, np.asarray(b) * lam * w)


def margin(P, a, b, lam) -> np.ndarray:
    """`stability_margin` of P. Positive: the loop converges from anywhere. Negative: it may yet."""
    return stability_margin(a, b, lam, preference_norm(P))


def regime(P, a, b, lam, reference=None, entropy_floor: float | None = None) -> dict[str, np.ndarray]:
    """What becomes of the loop.

    "stable" means that it settles where it comes near the fixed point; from anywhere only where `margin` is positive.

    Args:
        entropy_floor: in nats; a loop that settles below it has collapsed (default: a tenth of log K).

    Returns:
        `regime`, an index into `REGIMES`; `margin`; `rate`; `fixed_point`; `entropy` of that.
    """
    floor = default_entropy_floor(P) if entropy_floor is None else entropy_floor
    fixed = fixed_point(P, a, b, lam, reference)
    growth, left = rate(P, a, b, lam, fixed), entropy(fixed)
    # At a = 1 a loop that comes to rest does so with a rate of 1, up to rounding
    settled = np.where(left < floor, REGIMES.index(COLLAPSING), REGIMES.index(STABLE))
    found = np.where(growth > 1 + 1e-9, REGIMES.index(OSCILLATING), settled)
    return {"regime": found, "margin": margin(P, a, b, lam), "rate": growth, "fixed_point": fixed, "entropy": left}


def default_entropy_floor(P) -> float:
    return 0.1 * float(np.log(np.shape(P)[-1]))


def phase_diagram(P, a, b_lam, lam=1.0, reference=None, entropy_floor: float | None = None) -> dict[str, np.ndarray]:
    """`regime` of each a and b lam: arrays of shape `(len(b_lam), len(a))`, the fixed points' with K behind."""
    a, b_lam = np.meshgrid(a, b_lam)
    return regime(P, a, b_lam / lam, lam, reference, entropy_floor)


def disturbed(policy: np.ndarray) -> np.ndarray:
    """A policy away from the given one, to start from where that may be an unstable fixed point: half of it, and half
    its first answer."""
    return (policy + np.eye(len(policy))[0]) / 2


def study(
    P, a: float, b: float, lam: float = 1.0, reference=None, rounds: int = 100, entropy_floor: float | None = None
) -> dict[str, Any]:
    """
    All that `trl-rdro dynamics` prints and writes of one loop, as plain data.

    Besides what `regime` says: `policies` and `entropies` of rounds 0 .. `rounds` of a simulation from `disturbed`
    pi_0, and `settled_after`, the rounds after which they stay within `CLOSE` of the fixed point (None: they do not).

    Raises:
        `ArithmeticError`: if the fixed point is not found.
    """
    reference = _uniform(P, reference)
    floor = default_entropy_floor(P) if entropy_floor is None else entropy_floor
    point = regime(P, a, b, lam, reference, floor)
    policies = softmax(trajectory(P, a, b, lam, reference, disturbed(reference), rounds))
    distances = abs(policies - point["fixed_point"]).sum(axis=-1) / 2
    away = np.flatnonzero(distances > CLOSE)
    settled = 0 if not len(away) else int(away[-1]) + 1
    return {
        "a": a,
        "b": b,
        "lam": lam,
        "preferences": np.asarray(P).tolist(),
        "reference": reference.tolist(),
        "regime": REGIMES[point["regime"]],
        "margin": float(point["margin"]),
        "rate": float(point["rate"]),
        "fixed_point": point["fixed_point"].tolist(),
        "entropy": float(point["entropy"]),
        "entropy_floor": floor,
        "settled_after": settled if settled <= rounds else None,
        "policies": policies.tolist(),
        "entropies": entropy(policies).tolist(),
    }
