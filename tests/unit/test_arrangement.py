"""The shards' order of the parameters: every element once, every worker's own in as few pieces as can be."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.partition_cases import Seat, networks, random_placements, shares
from unit.partition_layers import Dense, Filter, SplitDense, layout_of

from dbmpi.config import ServerSection
from dbmpi.errors import UserError
from dbmpi.index.layout import pieces
from dbmpi.replica.arrangement import aligned, equal, from_config
from dbmpi.replica.parameters import LocalParameters
from dbmpi.replica.placement import automatic


def local_parameters(layers, placement, worker):
    return LocalParameters(layers, layout_of(layers), placement, Seat(worker), np.dtype(np.float32))


def served(arrangement, whole):
    """Return a vector in the shards' order."""
    out = np.full_like(whole, -1)
    for held in arrangement.ranges:
        for start, local, length in arrangement.pieces(held):
            out[held.start + local : held.start + local + length] = whole[start : start + length]
    return out


@settings(max_examples=60)
@given(networks(), st.data())
def test_workers_find_their_own_in_the_shards_order(layers, data):
    if data.draw(st.booleans()):
        placement = data.draw(random_placements(layers))
    else:
        weights = data.draw(shares())
        placement = automatic(layers, len(weights), weights)
    shards = data.draw(st.integers(1, 9))
    layout = layout_of(layers)
    whole = np.arange(layout.size)
    pushes = np.zeros(layout.size, int)
    arrangement = aligned(layers, layout, placement, shards)
    assert [held.start for held in arrangement.ranges] == [0, *(held.stop for held in arrangement.ranges[:-1])]
    assert len(arrangement.ranges) == shards
    there = served(arrangement, whole)
    np.testing.assert_array_equal(np.sort(there), whole)  # also the pieces of any other cut:
    for start in range(0, layout.size, 37):
        for first, local, length in arrangement.pieces(range(start, min(start + 37, layout.size))):
            np.testing.assert_array_equal(there[start + local : start + local + length], whole[first : first + length])
    for worker in range(placement.partitions):
        parameters = local_parameters(layers, placement, worker)
        mine = parameters.take(whole)
        runs = parameters.runs_in(arrangement)
        assert sum(run.length for run in runs) == parameters.size
        for run in runs:
            np.testing.assert_array_equal(
                mine[run.local : run.local + run.length], there[run.start : run.start + run.length]
            )
            pushes[run.start : run.start + run.length] += run.pushed
        pushed = sum(run.length for run in parameters.runs if run.pushed)
        assert pushed == sum(run.length for run in runs if run.pushed)
        if shards <= placement.partitions:
            # What a worker pushes lies on one shard, in one piece.
            assert sum(any(run.pushed for run in its) for its in pieces(runs, arrangement.ranges)) <= 1
    assert (pushes <= 1).all()


@pytest.mark.parametrize("shards", [1, 2, 3, 4, 5, 8, 12])
def test_untied_models_are_one_piece_a_shard_and_less_than_in_the_layouts_order(shards):
    layers = [Filter("local", (3, 16, 16), 4, (3, 3)), Dense("wide", (4, 14, 14), 40), SplitDense("narrow", (40,), 24)]
    layout, placement = layout_of(layers), automatic(layers, 4)
    arrangement = aligned(layers, layout, placement, shards)
    sizes = [len(held) for held in arrangement.ranges]
    if shards in (1, 2, 4, 8, 12):
        assert max(sizes) < 1.1 * min(sizes)
    for worker in range(4):
        parameters = local_parameters(layers, placement, worker)
        found = [its for its in pieces(parameters.runs_in(arrangement), arrangement.ranges) if its]
        assert [len(its) for its in found] == [1] * len(found)
        assert len(found) <= max(1, -(-shards // 4))
        scattered = sum(map(len, pieces(parameters.runs, equal(layout, shards).ranges)))
        assert scattered > 10 * len(found)


def test_weights_that_lie_with_one_of_several_cannot_be_computed_on_in_place():
    layers = [Filter("tied", (1, 9, 9), 2, (3, 3), tied=True), Filter("untied", (2, 7, 7), 2, (3, 3))]
    section = ServerSection(align="partition", fetch="shared")
    with pytest.raises(UserError, match=r'tied/weights.*set server\.fetch = "copied"'):
        from_config(section, layers, layout_of(layers), automatic(layers, 4), 2)
    from_config(section, layers[1:], layout_of(layers[1:]), automatic(layers[1:], 4), 2)
