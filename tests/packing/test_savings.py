"""What packed rows would save, counted by hand and on real batches."""

import pytest

from trl_rdro.packing.savings import savings


def test_worked_example():
    # Rows of 5 and 7, and of 11 and 13 tokens: 2 x 7 + 2 x 13 positions one by one, 4 x 13 together
    lengths = [(4, (1, 3)), (10, (1, 3))]
    one = savings(lengths, 1, None)
    assert one.padding == pytest.approx(1 - 36 / 40) and one.packed == pytest.approx(40 / 36)
    assert one.repeated == pytest.approx((3 + 9) / 36) and one.shared == pytest.approx(40 / 24)
    assert one[-3:] == (26, 24, 15)
    two = savings(lengths, 2, None)
    assert two[-3:] == (52, 36, 24)
    assert two.padding == pytest.approx(1 - 36 / 52) and two.shared == pytest.approx(52 / 24)


def test_truncation():
    assert savings([(4, (1, 3))], 1, 6).packed == pytest.approx(12 / 11)
    assert savings([(4, (1, 3))], 1, 6).shared == pytest.approx(12 / 8)
    assert savings([(4, (1, 3))], 1, 6, keep_end=True).repeated == 0


def test_unpaired():
    found = savings([(4, (1,)), (4, (3,))], 2, None)
    assert found.repeated == 0 and found.packed == found.shared == pytest.approx(14 / 12)
