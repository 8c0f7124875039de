"""Where the shards hold each tensor: boxes that agree with a flat vector of positions, and tables that are refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.partition_cases import networks, random_placements, shares
from unit.partition_layers import layout_of

from dbmpi.checkpoint import shard_boxes
from dbmpi.index.layout import Layout, Tensor
from dbmpi.replica.arrangement import Arrangement, aligned, equal
from dbmpi.replica.placement import automatic

SHAPES = st.lists(st.sampled_from([0, 1, 1, 2, 3, 5]), max_size=4).map(tuple)


def has_parameters(layers) -> bool:
    return bool(layout_of(layers).tensors)


@st.composite
def arrangements(draw) -> Arrangement:
    shards = draw(st.integers(1, 7))
    if draw(st.booleans()):
        shapes = draw(st.lists(SHAPES, min_size=1, max_size=4))
        return equal(Layout(tuple(Tensor(f"t{n}", shape) for n, shape in enumerate(shapes))), shards)
    layers = draw(networks().filter(has_parameters))
    weights = draw(shares())
    placement = draw(random_placements(layers)) if draw(st.booleans()) else automatic(layers, len(weights), weights)
    return aligned(layers, layout_of(layers), placement, shards)


def held(arrangement: Arrangement) -> list[np.ndarray]:
    """Return the positions in the whole vector that each shard holds, one by one."""
    found = [np.full(len(each), -1) for each in arrangement.ranges]
    for mine, each in zip(found, arrangement.ranges, strict=True):
        for start, local, length in arrangement.pieces(each):
            mine[local : local + length] = np.arange(start, start + length)
    return found


@settings(max_examples=150)
@given(arrangements())
def test_boxes_are_where_the_shards_hold_the_elements(arrangement):
    layout, shards = arrangement.layout, held(arrangement)
    whole = {tensor.name: np.full(tensor.shape, -1) for tensor in layout.tensors}
    boxes = shard_boxes.of_arrangement(arrangement)
    for tensor, box, shard, local in boxes:
        assert not box.empty
        part = whole[tensor.name][box.slices() or ...]  # a view, of a number without axes too
        assert (part == -1).all()  # each once
        part[...] = shards[shard][local : local + box.size].reshape(box.shape)
    for tensor in layout.tensors:
        first = layout.offsets[tensor.name]
        assert whole[tensor.name].ravel().tolist() == list(range(first, first + tensor.size))
    sizes = [len(each) for each in shards]
    assert shard_boxes.from_table(layout, shard_boxes.to_table(layout, boxes), sizes) == boxes


@given(SHAPES, st.data())
def test_spans_are_few_and_in_order(shape, data):
    size = int(np.prod(shape, dtype=int))
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    numbers = np.arange(size).reshape(shape)
    boxes = list(shard_boxes.spans(shape, start, stop))
    found = [numbers[box.slices() or ...].ravel() for box in boxes]
    assert np.concatenate([*found, np.empty(0, int)]).tolist() == list(range(start, stop))
    assert len(boxes) <= max(2 * len(shape) - 1, 1)


@settings(max_examples=150)
@given(arrangements(), st.data())
def test_a_table_with_any_other_number_is_refused_or_as_good(arrangement, data):
    """As good: the same elements, each once, e.g. where two parts of the same size are exchanged."""
    layout, sizes = arrangement.layout, [len(each) for each in arrangement.ranges]
    table = shard_boxes.to_table(layout, shard_boxes.of_arrangement(arrangement))
    if not table.size:
        return
    for _ in range(data.draw(st.integers(1, 3))):
        row, column = (data.draw(st.integers(0, length - 1)) for length in table.shape)
        near = min(int(table[row, column]), 2**62) + data.draw(st.sampled_from([-1, 1, 2]))
        table[row, column] = data.draw(st.sampled_from([near, near, 0, -1, 2**40, 2**63 - 1, -(2**63)]))
    try:
        boxes = shard_boxes.from_table(layout, table, sizes)
    except ValueError:
        return
    shards = [np.zeros(size, int) for size in sizes]
    tensors = {tensor.name: np.zeros(tensor.shape, int) for tensor in layout.tensors}
    for tensor, box, shard, local in boxes:
        shards[shard][local : local + box.size] += 1
        tensors[tensor.name][box.slices() or ...] += 1
    assert all((counts == 1).all() for counts in (*shards, *tensors.values()))


def test_boxes_that_overlap_are_refused():
    layout = Layout((Tensor("t", (4, 4)),))
    rows = [[0, 0, 0, 0, 0, 3, 3], [0, 0, 9, 2, 2, 4, 3], [0, 0, 11, 0, 3, 4, 4], [0, 0, 15, 3, 0, 4, 1]]
    with pytest.raises(ValueError, match="two parts of t overlap"):
        shard_boxes.from_table(layout, np.array(rows), [16])
