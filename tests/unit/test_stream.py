"""The stream of batches: every sample once an epoch, every batch once a run, whatever interrupts it."""

import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbmpi.data.stream import Order, Stream

GOLDEN = [[3, 5, 2, 9, 7, 0, 8, 6, 1, 4], [0, 6, 5, 3, 4, 9, 7, 8, 2, 1]]


@given(
    samples=st.integers(1, 200),
    batch_size=st.integers(1, 250),
    epochs=st.integers(1, 4),
    seed=st.integers(0, 2**63 - 1),
)
def test_an_epoch_holds_every_sample_exactly_once(samples, batch_size, epochs, seed):
    order = Order(samples, batch_size, epochs, seed)
    assert order.batches == epochs * math.ceil(samples / batch_size)
    for epoch in range(epochs):
        first = epoch * order.batches_per_epoch
        batches = [order.indices(number) for number in range(first, first + order.batches_per_epoch)]
        assert [len(batch) for batch in batches] == [order.size(first + place) for place in range(len(batches))]
        assert all(len(batch) == batch_size for batch in batches[:-1])
        assert [order.before(first + place) for place in range(len(batches))] == [
            epoch * samples + sum(map(len, batches[:place])) for place in range(len(batches))
        ]
        assert sorted(np.concatenate(batches).tolist()) == list(range(samples))
        assert all(batch.dtype == np.int64 for batch in batches)


def test_order_depends_on_seed_and_epoch_and_on_nothing_else():
    order = Order(50, 50, 4, seed=7)
    epochs = [order.indices(number) for number in range(4)]
    # Out of turn, and after the cache has forgotten: the same again.
    for number in (3, 0, 2, 1, 0):
        np.testing.assert_array_equal(order.indices(number), epochs[number])
        np.testing.assert_array_equal(Order(50, 50, 9, seed=7).indices(number), epochs[number])
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert tuple(Order(50, 50, 4, seed=8).indices(0)) != tuple(epochs[0])
    # The cut into batches does not change the order.
    small = Order(50, 7, 1, seed=7)
    np.testing.assert_array_equal(np.concatenate([small.indices(n) for n in range(small.batches)]), epochs[0])


def test_order_is_the_one_of_earlier_versions():
    """A resumed run must not reorder its epochs, whatever NumPy is installed: these were written down once."""
    assert Order(10, 10, 2, seed=1).indices(0).tolist() == GOLDEN[0]
    assert Order(10, 10, 2, seed=1).indices(1).tolist() == GOLDEN[1]


def test_positions_are_evenly_shuffled():
    """Each sample comes first about equally often (chi-squared, 9 degrees of freedom, p < 1e-6)."""
    trials = 4000
    order = Order(10, 10, trials, seed=3)
    counts = Counter(int(order.indices(number)[0]) for number in range(trials))
    expected = trials / 10
    assert sum((counts[sample] - expected) ** 2 / expected for sample in range(10)) < 45


@given(per_epoch=st.integers(1, 30), tenths=st.integers(1, 60))
def test_fractional_epochs_are_decimal(per_epoch, tenths):
    order = Order(per_epoch * 4, 4, tenths / 10, seed=0)
    assert order.batches == math.ceil(Fraction(tenths, 10) * per_epoch)


def test_fractional_epoch_takes_its_first_batches():
    whole, part = Order(100, 10, 2, seed=5), Order(100, 10, 1.1, seed=5)
    assert part.batches == 11
    np.testing.assert_array_equal(part.indices(10), whole.indices(10))
    with pytest.raises(IndexError):
        part.indices(11)


@pytest.mark.parametrize(
    "numbers",
    [(0, 1, 1.0, 0), (1, 0, 1.0, 0), (1, 1, 0.0, 0), (1, 1, math.inf, 0), (1, 1, math.nan, 0), (1, 1, 1.0, -1)],
)
def test_impossible_orders_are_refused(numbers):
    with pytest.raises(ValueError, match=r"expected|not in"):
        Order(*numbers)


def test_impossible_streams_are_refused():
    for wrong in [{"frontier": 5}, {"frontier": 2, "holes": (2,)}, {"frontier": 2, "holes": (1, 0)}, {"holes": (-1,)}]:
        with pytest.raises(ValueError, match="holes"):
            Stream(4, **wrong)
    with pytest.raises(IndexError):
        Stream(4).item(4)


@given(data=st.data(), samples=st.integers(1, 60), sizes=st.tuples(st.integers(1, 25), st.integers(1, 25)))
def test_batches_of_another_size_hold_all_that_is_left(data, samples, sizes):
    before, now = (Order(samples, size, 3, 7) for size in sizes)
    frontier = data.draw(st.integers(0, before.batches))
    holes = data.draw(st.sets(st.integers(0, frontier - 1), max_size=3)) if frontier else set()
    left = Stream(before.batches, frontier, tuple(sorted(holes)))
    found = left.recut(before, now)

    def positions(order, stream):
        batches = [stream.item(place) for place in range(len(stream))]
        return {(batch // order.batches_per_epoch, sample) for batch in batches for sample in order.indices(batch)}

    wanted, again = positions(before, left), positions(now, found)
    assert wanted <= again
    assert len(again - wanted) < now.batch_size * (2 * len(holes) + 1)
    assert found.total == now.batches
    assert left.recut(before, before) == left


@given(
    st.integers(1, 300),
    st.integers(1, 40),
    st.integers(0, 2**63 - 1),
    st.integers(1, 50),
    st.integers(1, 9),
)
def test_an_epoch_in_blocks_holds_every_sample_once_and_needs_two_windows_at_a_time(
    samples, batch_size, seed, block, window
):
    order = Order(samples, batch_size, 2, seed, block, window)
    for epoch in range(2):
        numbers = range(epoch * order.batches_per_epoch, (epoch + 1) * order.batches_per_epoch)
        batches = [order.indices(number) for number in numbers]
        assert sorted(np.concatenate(batches).tolist()) == list(range(samples))
        first, last = epoch * order.windows_per_epoch, (epoch + 1) * order.windows_per_epoch
        blocks = [order.blocks(number) for number in range(first, last)]
        assert sorted(np.concatenate(blocks).tolist()) == list(range(-(-samples // block)))
        place = {int(number): at for at, each in enumerate(blocks, first) for number in each}
        places = [place[int(sample) // block] for sample in np.concatenate(batches)]
        assert places == sorted(places)
        for number, batch in zip(numbers, batches, strict=True):
            begins, passed = order.window(number)
            assert 0 <= passed <= 1
            # The last block of the data may be smaller and lie anywhere, so that a batch begins a window earlier.
            assert begins - 1 <= place[int(batch[0]) // block] <= begins + 1
    assert not len(order.blocks(2 * order.windows_per_epoch))


def test_blocks_of_one_sample_in_one_window_are_as_well_shuffled_as_samples():
    order = Order(10_000, 100, 1, 4, 1, 10_000)
    positions = np.concatenate([order.indices(number) for number in range(100)])
    assert abs(np.corrcoef(np.arange(10_000), positions)[0, 1]) < 0.03
