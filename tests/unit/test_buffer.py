"""Where the gradients of layers lie that share a buffer."""

from __future__ import annotations

from itertools import accumulate, pairwise

from hypothesis import given
from hypothesis import strategies as st

from dbmpi.config import OptimizerSection, ServerSection
from dbmpi.downpour import buffer
from dbmpi.downpour.datapath import Flow


@given(st.lists(st.integers(0, 50), min_size=1, max_size=12), st.integers(0, 100))
def test_every_layer_fits_and_all_lie_where_they_do_in_the_vector_if_there_is_space(
    sizes: list[int], more: int
) -> None:
    parts = [range(start, stop) for start, stop in pairwise(accumulate(sizes, initial=0))]
    size = max(sizes) + more
    found = buffer.offsets(parts, size)
    assert [len(mine) for mine in found] == sizes
    assert all(0 <= mine.start <= mine.stop <= size for mine in found)
    if size >= sum(sizes):  # nothing is used twice in a step
        ordered = sorted((mine for mine in found if mine), key=lambda mine: mine.start)
        assert all(a.stop <= b.start for a, b in pairwise(ordered))
    assert buffer.offsets(parts, sum(sizes)) == parts


def test_small_gradients_have_a_buffer_as_a_whole_and_large_ones_that_of_a_layer() -> None:
    small, large = (range(100), range(100, 130)), (range(5 << 26), range(5 << 26, 9 << 26), range(9 << 26, 13 << 26))
    by_layers = ServerSection(gradients="layers")
    assert Flow.from_config(by_layers, OptimizerSection(), small).buffer_size == 130
    assert Flow.from_config(by_layers, OptimizerSection(), large).buffer_size == 5 << 26
    assert Flow.from_config(ServerSection(), OptimizerSection(), large).buffer_size == 13 << 26
