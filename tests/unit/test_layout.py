"""Tensors in a flat vector, and the cut of a vector into shards: exact cover, whatever the sizes."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbmpi.index.layout import Layout, Tensor, cut

shapes = st.lists(st.lists(st.integers(0, 5), max_size=3).map(tuple), max_size=6)


def layout_of(given_shapes: list[tuple[int, ...]]) -> Layout:
    return Layout(tuple(Tensor(f"tensor{place}", shape) for place, shape in enumerate(given_shapes)))


@given(size=st.integers(0, 300), parts=st.integers(1, 400))
def test_a_cut_covers_exactly_and_evenly(size: int, parts: int) -> None:
    """Also with more parts than elements."""
    ranges = cut(size, parts)
    assert [position for part in ranges for position in part] == list(range(size))
    lengths = [len(part) for part in ranges]
    assert len(lengths) == parts
    assert max(lengths) - min(lengths) <= 1
    assert lengths == sorted(lengths, reverse=True)  # shard 0, the lead, has something to hold wherever there is any


@given(size=st.integers(0, 2**62), parts=st.integers(1, 50))
def test_large_vectors_are_cut_without_rounding(size: int, parts: int) -> None:
    ranges = cut(size, parts)
    assert ranges[0].start == 0
    assert ranges[-1].stop == size
    assert all(left.stop == right.start for left, right in itertools.pairwise(ranges))


@pytest.mark.parametrize("parts", [0, -1])
def test_a_vector_is_cut_into_one_part_at_least(parts: int) -> None:
    with pytest.raises(ValueError, match="cannot be cut"):
        cut(3, parts)


@given(shapes)
def test_views_are_the_vector_itself_in_order(given_shapes: list[tuple[int, ...]]) -> None:
    layout = layout_of(given_shapes)
    vector = np.arange(layout.size, dtype=np.float32)
    views = layout.views(vector)
    assert [view.shape for view in views.values()] == given_shapes
    joined = [value for view in views.values() for value in view.ravel()]
    assert joined == vector.tolist()
    for view in views.values():
        view[...] = -1
    assert layout.size == sum(math.prod(shape) for shape in given_shapes)
    assert (vector == -1).all()


@given(shapes, st.integers(1, 9))
def test_the_pieces_of_all_shards_make_up_every_tensor_once(given_shapes: list[tuple[int, ...]], shards: int) -> None:
    layout = layout_of(given_shapes)
    seen: dict[str, list[int]] = {tensor.name: [] for tensor in layout.tensors}
    for held in cut(layout.size, shards):
        length = 0
        for tensor, first, last in layout.pieces(held.start, held.stop):
            assert 0 <= first < last <= tensor.size
            seen[tensor.name] += range(first, last)
            assert layout.offsets[tensor.name] + first == held.start + length
            length += last - first
        assert length == len(held)
    assert seen == {tensor.name: list(range(tensor.size)) for tensor in layout.tensors}


def test_names_must_differ_and_vectors_must_fit() -> None:
    with pytest.raises(ValueError, match="occur more than once"):
        Layout((Tensor("a", (1,)), Tensor("a", (2,))))
    with pytest.raises(ValueError, match=r"the layout needs \(3,\)"):
        layout_of([(3,)]).views(np.zeros(4))
