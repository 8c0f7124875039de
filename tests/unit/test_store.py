"""The plan of the shards' memory: nothing overlaps, and what cannot be is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbmpi.errors import UserError
from dbmpi.mpi.topology import Plan
from dbmpi.paramserver.memory import Memory
from dbmpi.paramserver.protocol import HEADER_WORDS
from dbmpi.paramserver.store import check_common


@given(st.data())
def test_nothing_in_a_shards_window_overlaps(data: st.DataObject) -> None:
    clients, shards = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    in_place = tuple(sorted(data.draw(st.sets(st.integers(0, clients - 1)))))
    memory = Memory(
        shards,
        clients,
        elements=data.draw(st.integers(0, 100)),
        itemsize=4,
        chunk=data.draw(st.integers(0, 50)),
        partitions=data.draw(st.integers(1, 3)),
        in_place=in_place,
        vectors=data.draw(st.integers(1, 2)),
    )
    regions = [(memory.applied(shard), 8) for shard in range(shards)]
    regions += [(memory.version(partition), 8) for partition in range(memory.partitions)]
    regions += [(memory.posted(client), 8) for client in range(clients)]
    regions += [(memory.active(client, activity), 8) for client in range(clients) for activity in (0, 1)]
    regions += [(memory.wanted(client), 8) for client in range(clients)]
    regions.append((memory.sequence, 8))
    regions.append((memory.parameters, memory.elements * 4))
    for client in range(clients):
        for count in range(memory.slots(client)):
            regions.append((memory.header(client, count), HEADER_WORDS * 8))
            if client not in in_place:
                for vector in range(memory.vectors):
                    regions.append((memory.data(client, count, vector), memory.chunk * 4))
    used = np.zeros(memory.nbytes, int)
    for start, nbytes in regions:
        assert start + nbytes <= memory.nbytes
        used[start : start + nbytes] += 1
    assert used.max(initial=0) <= 1


def test_the_inbox_does_not_grow_with_clients_that_are_read_in_place() -> None:
    sizes = [Memory(1, n, 10**6, 4, 10**6, in_place=tuple(range(n))).nbytes for n in (1, 512)]
    assert sizes[1] - sizes[0] < 6 * 2**20


def test_only_what_lies_on_one_host_in_one_piece_is_computed_on_in_place() -> None:
    check_common(Plan(1, 3), np.zeros(4, np.int64), "equal")
    check_common(Plan(1, 1, 2), np.zeros(3, np.int64), "partition")
    with pytest.raises(
        UserError, match=r'run on 2 hosts.*set server\.fetch = "copied", or start all ranks on one host'
    ):
        check_common(Plan(1, 3), np.array([0, 0, 2, 2]), "equal")
    with pytest.raises(UserError, match=r'2 partitions.*set server\.align = "partition"'):
        check_common(Plan(1, 1, 2), np.zeros(3, np.int64), "equal")
