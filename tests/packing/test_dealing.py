"""The samples of a step dealt over its micro-batches."""

import random

import pytest

from trl_rdro.packing.dealing import DealtSampler, deal, forwarded_tokens


def totals(lengths, order, batch_size):
    return [sum(lengths[i] for i in order[start : start + batch_size]) for start in range(0, len(order), batch_size)]


def test_worked_example():
    assert deal([1, 2, 3, 10], 2) == [3, 0, 2, 1]  # 11 and 5: the longest with the shortest
    assert deal([5, 5, 5, 5], 2) == [0, 2, 1, 3]


@pytest.mark.parametrize("batch_size", [1, 2, 4, 8])
def test_even_totals(batch_size):
    rng = random.Random(0)
    largest_before = largest_after = means = 0
    for _ in range(50):
        lengths = [round(rng.lognormvariate(6, 0.8)) for _ in range(8 * batch_size)]
        order = deal(lengths, batch_size)
        assert sorted(order) == list(range(len(lengths)))
        dealt, before = totals(lengths, order, batch_size), totals(lengths, range(len(lengths)), batch_size)
        largest_after, largest_before = largest_after + max(dealt), largest_before + max(before)
        means += sum(lengths) / 8
    assert largest_after <= largest_before
    if batch_size > 1:
        assert largest_after - means < 0.7 * (largest_before - means)


def test_sampler_keeps_the_steps():
    lengths = [(i * 37) % 101 for i in range(50)]

    class Order(list):
        def set_epoch(self, epoch):
            self[:] = random.Random(epoch).sample(range(50), 50)

    order = Order(range(50))
    sampler = DealtSampler(order, lengths, batch_size=2, batches=4)
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        dealt = list(sampler)
        assert len(dealt) == len(sampler) == 50
        for start in range(0, 48, 8):
            assert sorted(dealt[start : start + 8]) == sorted(order[start : start + 8])
        assert dealt[48:] == order[48:]
        assert dealt != order


def test_forwarded_tokens():
    assert forwarded_tokens(10, (5, 7), None, share=False) == 15 + 17
    assert forwarded_tokens(10, (5, 7), None, share=True) == 15 + 8  # 9 prompt tokens once
    assert forwarded_tokens(10, (5, 7), 16, share=True) == 15 + 16 - 9
    assert forwarded_tokens(10, (5, 7), 16, share=True, keep_end=True) == 15 + 16  # rows that begin at other tokens
    assert forwarded_tokens(10, (5,), None, share=True) == 15
    assert forwarded_tokens(0, (5, 7), None, share=True) == 12
