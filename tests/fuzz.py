"""
What the tests that draw their inputs at random share. A test of this kind is marked `fuzz`, and draws the same
examples each time; `make fuzz` has each draw `RDRO_FUZZ` times as many, others each time, and prints what fails.
"""

import math
import os

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st


FACTOR = int(os.environ.get("RDRO_FUZZ", 1))


def fuzz(examples: int):
    """Draw so many examples in continuous integration."""
    limits = settings(
        max_examples=examples * FACTOR,
        deadline=None,
        derandomize=FACTOR == 1,
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=FACTOR > 1,
    )
    return lambda test: pytest.mark.fuzz(limits(test))


# Values for options: of every kind that YAML knows

NUMBERS = st.one_of(
    st.sampled_from([0, 1, -1, 0.5, 1e39, -1e39, 1e-39, 1 - 1e-12, math.nan, math.inf, -math.inf, 10**400]),
    st.integers(-10, 10**6),
    st.floats(-10, 10),
)
SCALARS = st.one_of(
    st.none(), st.booleans(), NUMBERS, st.text(max_size=5), st.sampled_from(["1e-3x", "no", "{", "1,2", "a=b", "[1"])
)
VALUES = st.one_of(SCALARS, st.lists(SCALARS, max_size=3), st.dictionaries(st.text(max_size=2), SCALARS, max_size=2))
