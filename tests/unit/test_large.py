"""More than 2^31 parameters, and more than 2 GiB at a time: counted, with memory that is asked for and never used."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from dbmpi.index.layout import Stretch, cut
from dbmpi.kernels import sums, vectors
from dbmpi.mpi import pieces
from dbmpi.mpi.window import Window, _OneSided
from dbmpi.network.initial import fill_uniform
from dbmpi.paramserver.client import Client
from dbmpi.paramserver.memory import Memory
from dbmpi.paramserver.protocol import LAST, Header, ShardMap

MANY = 2**31 + 11
"""Elements; of float32, 8 GiB."""


class Done:
    def Test(self) -> bool:  # noqa: N802
        return True


class Counting:
    """A communicator of which every operation notes the arrays that it is given, and that are complete at once."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.moved: list[np.ndarray] = []

    def __getattr__(self, name: str) -> Any:
        def operation(*arguments: Any) -> Done:
            arrays = [it[0] if isinstance(it, list) else it for it in arguments]
            self.moved += [it for it in arrays if isinstance(it, np.ndarray)]
            return Done()

        return operation


def offsets(values: np.ndarray, moved: list[np.ndarray]) -> list[tuple[int, int]]:
    """Return where pieces lie within an array, in bytes, in order."""
    start = values.ctypes.data
    return sorted(
        (it.ctypes.data - start, it.nbytes) for it in moved if start <= it.ctypes.data < start + values.nbytes
    )


def assert_covers(values: np.ndarray, moved: list[np.ndarray]) -> None:
    """All of an array is moved once, in pieces that every MPI can carry."""
    position = 0
    for offset, nbytes in offsets(values, moved):
        assert offset == position
        assert 0 < nbytes <= 2**30
        position += nbytes
    assert position == values.nbytes


def empty(size: int, dtype: str = "f4") -> np.ndarray:
    """Return memory that is only asked for."""
    try:
        return np.empty(size, dtype)
    except MemoryError:
        pytest.skip("this system does not promise memory that is not used")


def test_transfers_are_cut_where_they_are_too_large_for_an_mpi():
    values = empty(MANY)
    one = Counting(1, 3)
    for begin in (
        lambda: pieces.isend(one, values, 0, 1),
        lambda: pieces.irecv(one, values, 0, 1),
        lambda: pieces.ibcast(one, values, 0),
    ):
        one.moved.clear()
        assert begin().Test()
        assert_covers(values, one.moved)
    one.moved.clear()
    result = empty(MANY)
    pieces.iallreduce(one, values, result, MPI.SUM)
    assert_covers(values, one.moved)
    assert_covers(result, one.moved)
    one.moved.clear()
    counts = [MANY - 11, 4, 7]  # the part that is copied is small
    pieces.iallgatherv(one, np.zeros(4, np.float32), values, counts)
    assert_covers(values, one.moved)
    one.moved.clear()
    part = empty(4)
    pieces.ireduce_scatter(one, values, part, counts)
    assert_covers(values, one.moved)
    assert_covers(part, one.moved)
    one.moved.clear()
    ranges = [range(0, 2**31), range(2**31, 2**31 + 4), range(2**31 + 4, MANY)]
    pieces.ialltoallv(one, (values, ranges), (result, ranges), 3 * MANY, 1)
    assert_covers(values, one.moved)
    assert_covers(result, one.moved)


@pytest.mark.parametrize("transport", ["rma", "p2p"])
def test_windows_move_a_shard_of_8_gib(transport):
    """At offsets beyond 2^33, each piece where it belongs."""
    asked: list[tuple[int, int, int]] = []

    def get(*arguments: Any) -> Done:
        out, rank, target = arguments if transport == "rma" else (arguments[2], arguments[0], arguments[1])
        values, offset = (out[0], target[0]) if transport == "rma" else (out, target)
        assert rank == 1
        asked.append((offset, values.ctypes.data, values.nbytes))
        return Done()

    window = Window.__new__(Window)
    window._comm, window._near, window._gets = Counting(0, 2), {}, {}
    if transport == "p2p":
        window._remote = SimpleNamespace(get=get, put=get, complete=lambda *_: None)
    else:
        window._remote = _OneSided.__new__(_OneSided)
        window._remote._comm, window._remote._puts = window._comm, {}
        window._remote._win = SimpleNamespace(Rget=get, Rput=get)
    values, start = empty(MANY), 2**33 + 64
    for move in (window.get, window.put):
        asked.clear()
        move(1, start, values)
        position = 0
        for offset, address, nbytes in asked:
            assert (offset - start, address - values.ctypes.data) == (position, position)
            assert 0 < nbytes <= 2**30
            position += nbytes
        assert position == values.nbytes


def test_a_client_of_many_parameters_knows_where_they_lie():
    """Pieces of a worker's own vector on three shards, with offsets that 32 bits do not hold."""
    ranges = cut(3 * MANY, 3)
    memories = [Memory(3, 2, len(held), 4, 1 << 18) for held in ranges]
    moved: list[tuple[int, int, int]] = []
    window = SimpleNamespace(
        local=np.zeros(64, np.uint8),
        near=lambda rank: None,
        transport="p2p",
        load=lambda rank, offset: 2**40,
        begin_get=lambda rank, offset, out: moved.append((rank, offset, out.size)),
        complete_gets=lambda: None,
    )
    # The last elements of each shard, and the first.
    runs = [Stretch(held.stop - 3, 3 * shard, 3, True) for shard, held in enumerate(ranges)]
    runs.append(Stretch(0, 9, 2, True))
    client = Client(ShardMap(window=window, memories=memories, ranks=(4, 5, 6), ranges=ranges), 0, stretches=runs)
    assert client.copy(np.zeros(11, np.float32)) == [2**40] * 3
    expected = [(4 + shard, memories[shard].parameters + 4 * (MANY - 3), 3) for shard in range(3)]
    assert sorted(moved) == sorted([*expected, (4, memories[0].parameters, 2)])
    assert memories[0].data(1, 3) > 2**33
    header = Header(MANY, 2**33, LAST, 2**40, 2**41, 2**41, 2.5, 2**42, 2**43, 1, 2**44)
    assert Header.unpack(header.pack()) == header


def test_initial_values_of_many_parameters_are_those_of_their_place():
    start = 2**33 + 3
    whole, part = np.empty(100, np.float32), np.empty(17, np.float32)
    fill_uniform(whole, 5, 2, start, 1.0)
    fill_uniform(part, 5, 2, start + 41, 1.0)
    np.testing.assert_array_equal(part, whole[41:58])
    near = np.empty(100, np.float32)
    fill_uniform(near, 5, 2, start - 2**33, 1.0)  # what a counter of 32 bits would come to
    assert not np.array_equal(near, whole)


def test_kernels_read_vectors_of_more_than_2_to_the_31_elements():
    """Memory that has only been asked for reads as zeros, and takes no room; the few others lie beyond 2^31."""
    vector = empty(MANY)
    # Fresh from the system, or else this would say nothing.
    if not (vector[:: 2**20] == 0).all():
        pytest.skip("the memory has been used before")
    vector[2**31 + 5], vector[2**31 - 1] = -3.0, 2.0
    assert vectors.largest_magnitude(vector) == 3.0
    limbs = sums.sum_products([vector], [(0, 0)], [2], sums.COARSE)
    assert sums.values(limbs, [(2, 2)]) == [13.0]
    assert sums.values(sums.sum_magnitudes(vector, 2), [(2, 0)]) == [5.0]
