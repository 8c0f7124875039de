"""Where the gradients of layers lie that share their room."""

from __future__ import annotations

from itertools import accumulate, pairwise

from hypothesis import given
from hypothesis import strategies as st

from dbmpi.config import ServerSection
from dbmpi.downpour import room


@given(st.lists(st.integers(0, 50), min_size=1, max_size=12), st.integers(0, 100))
def test_every_layer_fits_and_those_in_a_row_share_nothing(sizes: list[int], more: int) -> None:
    parts = [range(start, stop) for start, stop in pairwise(accumulate(sizes, initial=0))]
    size = max(sizes) + more
    found = room.places(parts, size)
    assert [len(place) for place in found] == sizes
    assert all(place.stop <= size for place in found)
    if size >= sum(sizes):  # nothing is used twice in a step
        ordered = sorted((place for place in found if place), key=lambda place: place.start)
        assert all(a.stop <= b.start for a, b in pairwise(ordered))


def test_small_gradients_have_room_as_a_whole_and_large_ones_that_of_a_layer() -> None:
    small, large = [range(100), range(100, 130)], [range(5 << 26), range(5 << 26, 9 << 26), range(9 << 26, 13 << 26)]
    assert room.gradient_size(ServerSection(gradients="layers"), small) == 130
    assert room.gradient_size(ServerSection(gradients="layers"), large) == 5 << 26
    assert room.gradient_size(ServerSection(), large) == 13 << 26
