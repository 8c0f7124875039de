"""Boxes agree with sets of indices, and with NumPy's slices."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.partition_layers import indices

from dbmpi.index.boxes import Box
from dbmpi.index.lookup import Index
from dbmpi.replica.cut import Grid, cut_axes, proportional


@st.composite
def shape_and_boxes(draw, count=2):
    shape = tuple(draw(st.lists(st.sampled_from([1, 2, 4, 5, 6]), min_size=1, max_size=3)))
    # Sampled, because drawn integers are mostly small and equal, and boxes then mostly empty.
    intervals = [[(a, b) for a in range(n + 1) for b in range(a, n + 1) if a < b or a % 3 == 0] for n in shape]
    boxes = []
    for _ in range(count):
        ends = [draw(st.sampled_from(axis)) for axis in intervals]
        boxes.append(Box(tuple(a for a, _ in ends), tuple(b for _, b in ends)))
    return shape, boxes


@given(shape_and_boxes())
def test_boxes_agree_with_sets(drawn):
    _, (a, b) = drawn
    inside, other = set(indices(a)), set(indices(b))
    assert a.size == len(inside)
    assert a.empty == (not inside)
    assert set(indices(a.meet(b))) == inside & other
    assert a.common(b) == len(inside & other)
    assert a.meets(b) == bool(inside & other)
    assert a.holds(b) == (other <= inside)
    hull = a.join(b)
    assert set(indices(hull)) >= inside | other
    for axis, ends in enumerate(zip(hull.starts, hull.stops, strict=True)):
        if inside | other:
            places = {index[axis] for index in inside | other}
            assert ends == (min(places), max(places) + 1)


def test_what_is_left_of_a_box_is_cut_into_few_disjoint_boxes():
    """All pairs of boxes in a square, and in a cube with two of a kind."""
    intervals = [(a, b) for a in range(4) for b in range(a, 4)]
    some = [(0, 3), (1, 2), (0, 2), (2, 2)]
    for axes in [(intervals,) * 2, (some,) * 3]:
        boxes = [Box(*zip(*ends, strict=True)) for ends in product(*axes)]
        for a, b in product(boxes, repeat=2):
            parts = a.minus(b)
            assert len(parts) <= 2 * len(axes)
            assert not any(part.empty for part in parts)
            found = [index for part in parts for index in indices(part)]
            assert len(found) == len(set(found))
            assert set(found) == set(indices(a)) - set(indices(b))


@given(shape_and_boxes())
def test_runs_and_slices_are_what_numpy_selects(drawn):
    shape, (box, origin) = drawn
    numbers = np.arange(np.prod(shape)).reshape(shape)
    runs = list(box.runs(shape))
    assert [i for run in runs for i in run] == numbers[box.slices()].ravel().tolist()
    if box.starts[1:] == (0,) * (len(shape) - 1) and box.stops[1:] == shape[1:]:
        assert len(runs) == (not box.empty)
    common = box.meet(origin)
    assert np.array_equal(numbers[origin.slices()][common.slices(origin)], numbers[common.slices()])


def test_a_box_has_as_many_starts_as_stops():
    with pytest.raises(ValueError, match="as many starts as stops"):
        Box((0,), (1, 2))


@pytest.mark.parametrize("method", [Box.meet, Box.meets, Box.common, Box.holds])
def test_boxes_of_different_arrays_are_not_compared(method):
    with pytest.raises(ValueError, match=r"axes|longer"):
        method(Box((0,), (1,)), Box((0, 0), (1, 1)))


@given(shape_and_boxes(count=12), st.data())
def test_an_index_finds_what_a_search_of_all_boxes_finds(drawn, data):
    _, boxes = drawn
    boxes = boxes[: data.draw(st.integers(0, len(boxes)))]
    _, (wanted, *_) = drawn
    index = Index(boxes)
    assert index.meeting(wanted) == [n for n, box in enumerate(boxes) if not box.meet(wanted).empty]
    missing = [i for part in index.missing(wanted) for i in indices(part)]
    assert len(missing) == len(set(missing))
    assert set(missing) == set(indices(wanted)) - {i for box in boxes for i in indices(box)}


def test_an_index_looks_at_few_of_many_boxes(monkeypatch):
    """A look-up on a grid of 10,000 boxes compares only with neighbours, also if the grid's columns do not line up."""
    compared, meets = [], Box.meets
    monkeypatch.setattr(Box, "meets", lambda self, other: compared.append(other) or meets(self, other))
    for bands in (100, 93):
        grid = Grid((4, 1000, 1000), (1,) * 10_000, bands, 1)
        index = Index(grid.boxes)
        for box in grid.boxes[::997]:
            halo = Box((0, *(max(n - 4, 0) for n in box.starts[1:])), (4, *(min(n + 4, 1000) for n in box.stops[1:])))
            compared.clear()
            found = index.meeting(halo)
            assert 0 < len(compared) <= 12
            assert found == [n for n, other in enumerate(grid.boxes) if not other.meet(halo).empty]
            assert len(found) <= 12


weights = st.lists(st.sampled_from([1, 1, 1, 2, 0.5, 3.7]), min_size=1, max_size=12)


@given(st.integers(0, 50), weights)
def test_positions_are_in_proportion_to_weights(size, shares):
    positions = proportional(size, shares)
    assert len(positions) == len(shares) + 1
    assert (positions[0], positions[-1]) == (0, size)
    for number, position in enumerate(positions):
        assert abs(position - size * sum(shares[:number]) / sum(shares)) <= 0.5 + 1e-9


def counted(shape, boxes):
    times = np.zeros(shape, int)
    for box in boxes:
        times[box.slices()] += 1
    return times


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple), weights)
def test_axes_are_cut_exactly_once(shape, shares):
    boxes = cut_axes(shape, shares)
    assert len(boxes) == len(shares)
    assert (counted(shape, boxes) == 1).all()


@given(
    st.tuples(st.integers(1, 4), st.integers(1, 12), st.integers(1, 12)), weights, st.integers(1, 12), st.integers(1, 5)
)
def test_grids_cover_exactly_once(shape, shares, bands, depth):
    grid = Grid(shape, shares, min(bands, len(shares)), depth)
    assert len(grid.boxes) == len(shares)
    assert (counted(shape, grid.boxes) == 1).all()


@given(weights, st.integers(1, 12))
def test_a_grids_boxes_are_in_proportion_to_weights(shares, bands):
    """Uneven on purpose: a machine of twice the weight computes twice the outputs, but for half a row and column."""
    shape = (1, 400, 400)
    for box, share in zip(Grid(shape, shares, min(bands, len(shares)), 1).boxes, shares, strict=True):
        exact = 400 * 400 * share / sum(shares)
        _, height, width = box.shape
        assert abs(box.size - exact) <= height + width + 2
