"""The factors of docs/conformance.md, each by another way than the table's own."""

import math
import re

import conformance
import pytest
import torch

from trl_rdro.losses import kldpo_log_weights
from trl_rdro.losses.types import LOSS_TYPES


def cells(name: str) -> list[list[str]]:
    """The rows of a table."""
    lines = conformance.TABLES[name]().splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_every_loss_type_has_its_line_and_paper():
    assert conformance.CONFORMANCE.keys() == LOSS_TYPES.keys()
    for (name, loss), row in zip(LOSS_TYPES.items(), cells("overview"), strict=True):
        assert row[0] == f"`{name}`" and loss.paper["id"] in row[1]


def test_every_factor_has_its_section():
    text = (conformance.ROOT / "docs" / "conformance.md").read_text()
    linked = set(re.findall(r"\[factor\]\(#([\w-]+)\)", conformance.overview()))
    assert {name.split("-")[0] for name in linked} == conformance.TABLES.keys() - {"overview"}
    headings = {
        re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in re.findall("^## (.*)", text, re.M)
    }
    assert linked <= headings


def test_rdro_pooled_is_right_at_one_half_only():
    kl = {float(row[0]): (float(row[2]), float(row[3])) for row in cells("rdro")}
    assert kl[0.5] == (0.0, 0.0) and all(ours == 0 for _, ours in kl.values())
    assert all(pooled > 0.005 for share, (pooled, _) in kl.items() if share != 0.5)


@pytest.mark.parametrize("share", [0.2, 0.8])
def test_the_pooled_optimum_has_no_policy_nearby_that_is_better(share):
    """The optimum's value against other policies, by a plain loop over the answers."""
    found = conformance.rdro_policy(share, (share, 1 - share))
    p_plus, p_minus = conformance.two_distributions()
    answers = len(p_plus)

    def value(log_policy):
        total = 0.0
        for i in range(answers):
            z = log_policy[i].item() - math.log(share * p_plus[i] + (1 - share) * p_minus[i])
            softplus = max(z, 0) + math.log1p(math.exp(-abs(z)))
            total += share * p_plus[i].item() * ((1 + share) * softplus - z)
            total += (1 - share) * p_minus[i].item() * (1 - share) * softplus
        return total

    best, generator = value(found), torch.Generator().manual_seed(0)
    for _ in range(20):
        noise = 0.01 * torch.randn(answers, generator=generator, dtype=torch.float64)
        assert value((found + noise).log_softmax(0)) > best


def test_kldpo_weights_against_a_loop():
    for beta, tau, mean, largest, ours, *_ in ([float(x.strip("%")) for x in row] for row in cells("kldpo")):
        values = [math.log1p(math.exp(-beta * h)) for h in conformance.MARGINS.tolist()]
        centre = sum(values) / len(values)
        weights = [min(math.exp((value - centre) / tau), 10) for value in values]
        assert mean == pytest.approx(sum(weights) / len(weights), abs=0.006) and mean > 1
        assert largest == pytest.approx(max(weights), abs=0.006)
        shares = [math.exp((value - max(values)) / tau) for value in values]
        assert ours == pytest.approx(len(shares) * max(shares) / sum(shares), abs=0.006)
        assert kldpo_log_weights(torch.tensor(values).double(), tau).exp().mean() == pytest.approx(1)


def test_wdpo_differs_by_the_norm_and_by_twice_the_norm():
    for size, penalty, gradient in (map(float, row) for row in cells("wdpo")):
        root_mean_square = size * math.sqrt((0.25 + 1 + 2.25) / 3)
        assert penalty == pytest.approx(root_mean_square, rel=0.05)
        assert gradient == pytest.approx(2 * root_mean_square, rel=0.05)


def test_drdpo_in_micro_batches_of_one_is_dpo_and_whole_is_itself():
    rows = cells("drdpo")
    assert rows[0] == ["1", "0% (DPO)", "100%"] and rows[-1][:2] == ["64", "100%"]
    ways = [float(row[1].split("%")[0]) for row in rows]
    assert ways == sorted(ways) and ways[1] > 10


def test_grdpo_step_in_our_units():
    for number, eta, factor in cells("grdpo"):
        pairs = int(number.replace(",", ""))
        assert float(eta) == pytest.approx(5e-7 * pairs) and float(factor) == pytest.approx(
            2 ** (5e-7 * pairs), abs=6e-5
        )


def test_dpop_slopes_by_finite_differences():
    def inside(z):
        return math.log1p(math.exp(-0.1 * (z + 5 - 50 * max(0, -z))))

    def outside(z):
        return math.log1p(math.exp(-0.1 * (z + 5))) + 50 * max(0, -z)

    for z, *slopes in (map(float, row) for row in cells("dpop")):
        for loss, slope in zip((inside, outside), slopes, strict=True):
            assert slope == pytest.approx((loss(z + 1e-5) - loss(z - 1e-5)) / 2e-5, abs=0.006)


def test_mrpo_at_its_ends_is_one_reference_or_the_other():
    rows = cells("mrpo")
    assert rows[0][1:] == ["+2.00", "-0.50"] and rows[-1][1:] == ["-0.50", "+2.00"]
    middle = next(row for row in rows if row[0] == "0.5")
    harmonic = [-math.log(0.5 * math.exp(-a) + 0.5 * math.exp(-b)) for a, b in ((-20, -21), (-22, -20.5))]
    assert float(middle[1]) == pytest.approx(harmonic[0] - harmonic[1], abs=0.006)
