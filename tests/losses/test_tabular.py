"""What the density-ratio losses are for: a policy over 40 outcomes, fitted by the losses alone, becomes p+.

p+ and p- are known, expectations are exact sums (no sampling), and the reference is the mixture that the method
assumes, pi_ref = t p+ + (1-t) p-. The minimiser over all policies is then p+, whatever the two are, so long as ddro's
cap lies above max t r* with r* = p+/pi_ref; and for unpaired data only under class weights, since a pooled mean
estimates pi E_{p+} + (1-pi) E_{p-} instead of E_{p+} + E_{p-}.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch

from trl_rdro.losses import class_weights, ddro_beyond_cap, ddro_loss, rdro_loss


OUTCOMES = 40
FRACTIONS = [0.2, 0.39, 0.5, 0.8]
PREFERRED = torch.arange(2 * OUTCOMES) < OUTCOMES  # every outcome once as a preferred and once as a non-preferred one


def distributions(spread: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = spread * torch.randn(2, OUTCOMES, generator=generator, dtype=torch.float64)
    p_plus, p_minus = logits.softmax(dim=1)
    return p_plus, p_minus


def kl(p: torch.Tensor, log_q: torch.Tensor) -> float:
    return (p * (p.log() - log_q)).sum().item()


def fit(reference: torch.Tensor, mass: torch.Tensor, terms: Callable) -> torch.Tensor:
    """log pi of the policy that minimises sum(mass * terms(z)), z being listed twice, as for `PREFERRED`."""
    logits = reference.log().clone().requires_grad_()  # start: policy = reference
    optimizer = torch.optim.LBFGS(
        [logits],
        max_iter=4000,
        history_size=50,
        tolerance_grad=1e-12,
        tolerance_change=1e-16,
        line_search_fn="strong_wolfe",
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        z = logits.log_softmax(dim=0) - reference.log()
        objective = (mass * terms(z.repeat(2))).sum()
        objective.backward()
        return objective

    optimizer.step(closure)
    return logits.detach().log_softmax(dim=0)


def fit_expectations(loss: Callable, p_plus: torch.Tensor, p_minus: torch.Tensor, share: float) -> torch.Tensor:
    """Minimise E_{p+}[preferred term] + E_{p-}[non-preferred term]."""
    reference = share * p_plus + (1 - share) * p_minus
    return fit(reference, torch.cat([p_plus, p_minus]), lambda z: loss(z, PREFERRED, share))


@pytest.mark.parametrize("share", FRACTIONS)
@pytest.mark.parametrize("loss", [ddro_loss, rdro_loss])
def test_the_fit_returns_p_plus(loss, share):
    p_plus, p_minus = distributions(spread=0.6)
    reference = share * p_plus + (1 - share) * p_minus
    assert (share * p_plus / reference).max() < 0.99  # ddro's default cap lies above max t r*
    assert kl(p_plus, reference.log()) > 0.01  # there is something to find
    assert kl(p_plus, fit_expectations(loss, p_plus, p_minus, share)) < 1e-6


@pytest.mark.parametrize("share", [0.5, 0.8])
def test_rdro_needs_no_cap(share):
    p_plus, p_minus = distributions(spread=1.5)
    reference = share * p_plus + (1 - share) * p_minus
    assert (share * p_plus / reference).max() > 0.99  # so far apart that ddro's default cap is too low
    assert kl(p_plus, fit_expectations(rdro_loss, p_plus, p_minus, share)) < 1e-6
    assert kl(p_plus, fit_expectations(ddro_loss, p_plus, p_minus, share)) > 1e-3


@pytest.mark.parametrize(("share", "cap"), [(0.2, 0.7), (0.39, 0.8), (0.5, 0.9), (0.8, 0.95)])
def test_a_ddro_cap_below_the_largest_ratio_biases_and_is_flagged(share, cap):
    p_plus, p_minus = distributions(spread=0.9)
    reference = share * p_plus + (1 - share) * p_minus
    ratio = share * p_plus / reference  # t r*
    assert cap < ratio.max() < 0.99

    unbiased = fit_expectations(ddro_loss, p_plus, p_minus, share)  # cap 0.99
    assert kl(p_plus, unbiased) < 1e-6
    assert not ddro_beyond_cap(unbiased - reference.log(), share).any()

    biased = fit_expectations(partial(ddro_loss, cap=cap), p_plus, p_minus, share)
    assert kl(p_plus, biased) > 5e-3
    # Preferred completions beyond the cap are the sign: outcomes whose true ratio the cap cuts off.
    beyond = ddro_beyond_cap(biased - reference.log(), share, cap)
    assert (p_plus * beyond).sum() > 0.05
    assert (ratio[beyond] > cap).all() and beyond[ratio.argmax()]


# Lower bounds on KL(p+ || fit) of the pooled mean. That of rdro was found to be 0.58, 0.019 and 0.010 on another toy.
POOLED = {
    (ddro_loss, 0.2): 0.01,
    (ddro_loss, 0.39): 1e-4,
    (ddro_loss, 0.8): 1e-3,
    (rdro_loss, 0.2): 0.1,
    (rdro_loss, 0.39): 0.01,
    (rdro_loss, 0.8): 1e-3,
}


@pytest.mark.parametrize("fraction", FRACTIONS)
@pytest.mark.parametrize("loss", [ddro_loss, rdro_loss])
def test_class_weights_return_p_plus_where_a_pooled_mean_does_not(loss, fraction):
    # Unpaired data, a fraction pi of it preferred: a sample is preferred outcome y with probability pi p+(y), and
    # non-preferred outcome y with (1-pi) p-(y). The reference is the mixture of the data (t = alpha = pi).
    p_plus, p_minus = distributions(spread=0.6)
    reference = fraction * p_plus + (1 - fraction) * p_minus
    data = torch.cat([fraction * p_plus, (1 - fraction) * p_minus])
    weights = class_weights(PREFERRED, fraction).double()

    weighted = fit(reference, data, lambda z: weights * loss(z, PREFERRED, fraction))
    assert kl(p_plus, weighted) < 1e-6

    pooled = fit(reference, data, lambda z: loss(z, PREFERRED, fraction))
    if fraction == 0.5:  # every weight is 2: the same objective
        assert kl(p_plus, pooled) < 1e-6
    else:
        assert kl(p_plus, pooled) > POOLED[loss, fraction]
