"""Windows by themselves: what a rank waits for arrives, whatever else goes on."""

from __future__ import annotations

import numpy as np
import pytest
from mpi4py import MPI
from parallel import tiny

from dbmpi.mpi import transport as mpi_transport
from dbmpi.mpi import waiting
from dbmpi.mpi.window import Window

FLAG, DATA = 0, 64
WAYS = {
    "shared memory": {"shared": True},
    "rma": {"shared": False, "transport": "rma"},
    "p2p": {"shared": False, "transport": "p2p"},
}


@pytest.mark.parallel([2, 3])
@pytest.mark.parametrize("way", ["shared memory", "rma", "p2p"])
def test_flags_arrive_while_a_message_waits_to_be_received(comm, way) -> None:
    """A probe that finds a message may return without having served the others' transfers."""
    words = np.arange(4.0)
    with Window.allocate(comm, 1024, **WAYS[way]) as window:
        if comm.rank == 0:
            requests = [comm.Isend(words, rank, 1) for rank in range(1, comm.size)]
            waiting.barrier(comm, "the messages to arrive")
            for rank in range(1, comm.size):
                window.put(rank, DATA, words)
                window.store(rank, FLAG, 7)
            for request in requests:
                waiting.complete(request, "a message to be received")
        else:
            waiting.until(lambda: comm.Iprobe(0, 1), "the message")
            waiting.barrier(comm, "the messages to arrive")
            flag = window.local[FLAG : FLAG + 8].view(np.int64)

            def arrived() -> bool:
                window.sync()
                return bool(flag[0] == 7)

            waiting.until(arrived, "the flag")
            np.testing.assert_array_equal(window.local[DATA : DATA + words.nbytes].view(np.float64), words)
            comm.Recv(np.empty_like(words), 0, 1)


@pytest.mark.parallel([2, 3])
@pytest.mark.parametrize("way", ["shared memory", "rma", "p2p"])
def test_what_two_ranks_put_and_get_from_one_another_does_not_cross(comm, way) -> None:
    """Both count their transfers for themselves: a fetch and a push between them may bear the same number."""
    target, source = 256, 512
    other = comm.size - 1 - comm.rank
    with Window.allocate(comm, 1024, **WAYS[way]) as window:
        window.local[source : source + 32].view(np.float64)[:] = comm.rank + 1
        window.sync()
        waiting.barrier(comm, "the others to fill their memory")
        for step in range(3):
            fetched = np.zeros(4)
            if other != comm.rank:
                pushed = np.full(4, 10.0 * (step + 1) + comm.rank)
                if comm.rank < other:
                    window.begin_get(other, source, fetched)
                window.put(other, target, pushed)
                window.store(other, FLAG, step + 1)
                if comm.rank > other:
                    window.begin_get(other, source, fetched)
                window.complete_gets()
                np.testing.assert_array_equal(fetched, np.full(4, other + 1))
                flag = window.local[FLAG : FLAG + 8].view(np.int64)

                def arrived() -> bool:
                    window.sync()
                    return bool(flag[0] == step + 1)  # noqa: B023

                waiting.until(arrived, "the flag")
                held = window.local[target : target + 32].view(np.float64)
                np.testing.assert_array_equal(held, np.full(4, 10.0 * (step + 1) + other))
            waiting.barrier(comm, "the others to see theirs")


@pytest.mark.parallel([2, 4])
@pytest.mark.parametrize("way", ["shared memory", "rma", "p2p"])
def test_a_flag_is_stored_while_its_owner_does_something_else(comm, way) -> None:
    """A shard must not stand still because a worker computes; and the last of several values is the one that stays."""
    with Window.allocate(comm, 1024, **WAYS[way]) as window:
        if comm.rank == 0:
            for value in range(1, 101):
                for rank in range(1, comm.size):
                    window.store(rank, FLAG, value)
            # The owners do not look before this message arrives.
            requests = [comm.Isend(np.zeros(1), rank, 2) for rank in range(1, comm.size)]
            for request in requests:
                waiting.complete(request, "the owners to look")
        else:
            comm.Recv(np.empty(1), 0, 2)
            flag = window.local[FLAG : FLAG + 8].view(np.int64)
            seen = []

            def arrived() -> bool:
                window.sync()
                seen.append(int(flag[0]))
                return seen[-1] == 100

            waiting.until(arrived, "the last value")
            assert seen == sorted(seen)
        waiting.barrier(comm, "the flags to arrive", serve=lambda: bool(window.sync()))
        for rank in range(1, comm.size):
            assert window.load(rank, FLAG) == 100
        waiting.barrier(comm, "the others to look", serve=lambda: bool(window.sync()))


@pytest.mark.parallel([2, 3])
@pytest.mark.parametrize("way", ["shared memory", "rma", "p2p"])
def test_many_gets_are_on_the_way_at_a_time(comm, way) -> None:
    """Some before their owners look at all; and of more than may be on the way, none is lost."""
    length = 100
    with Window.allocate(comm, DATA + 8 * length, **WAYS[way]) as window:
        window.local[DATA:][: 8 * length].view(np.int64)[:] = 1000 * comm.rank + np.arange(length)
        window.sync()
        waiting.barrier(comm, "the numbers", serve=lambda: bool(window.sync()))
        if comm.rank == 0:
            found = np.zeros((comm.size, length), np.int64)
            for count in (20, length):
                found[:] = 0
                for place in range(count):
                    for rank in range(1, comm.size):
                        window.begin_get(rank, DATA + 8 * place, found[rank, place : place + 1])
                if count < length:
                    # The owners do not look before this message arrives.
                    for rank in range(1, comm.size):
                        comm.Send(np.zeros(1), rank, 2)
                window.complete_gets()
                expected = 1000 * np.arange(1, comm.size)[:, None] + np.arange(count)
                np.testing.assert_array_equal(found[1:, :count], expected)
        else:
            comm.Recv(np.empty(1), 0, 2)
        waiting.barrier(comm, "all to be fetched", serve=lambda: bool(window.sync()))


@pytest.mark.parallel([2, 3])
def test_the_probe_measures_both_transports_and_takes_the_faster(comm, monkeypatch) -> None:
    hosts = np.array([0, *[1] * (comm.size - 1)])  # as if rank 0 were alone on its host
    chosen, line = mpi_transport.choose(comm, hosts)
    assert comm.allgather((chosen, line)) == [(chosen, line)] * comm.size
    assert f"transport = {chosen!r} (ranks 0 and 1: rma: get " in line

    def measured(comm, transport, target, origin) -> mpi_transport.Speed:
        assert (target, origin) == (0, 1)
        return mpi_transport.Speed(1e9, 1e9 if transport == faster else 1e6, 1e-5, True, False)

    monkeypatch.setattr(mpi_transport, "measure", measured)
    for faster in mpi_transport.TRANSPORTS:
        assert mpi_transport.choose(comm, hosts)[0] == faster


@pytest.mark.parallel([1, 2, 4])
@pytest.mark.parametrize("hosts", [False, True], ids=["", "some share memory"])
@pytest.mark.parametrize("way", WAYS)
def test_of_all_that_compare_and_swap_one_wins(comm, way, hosts) -> None:
    """Every rank counts up by compare-and-swap, and no count is lost; rank 0 goes on serving others when it is done."""
    turns, won = 60, []
    settings = WAYS[way] | {"shared": True} if hosts else WAYS[way]
    with Window.allocate(tiny.Hosts(comm) if hosts else comm, 1024, **settings) as window:
        while len(won) < turns:
            before = window.load(0, FLAG)
            if window.compare_and_swap(0, FLAG, before, before + 1) == before:
                won.append(before)
        waiting.barrier(comm, "the others to count", serve=lambda: bool(window.sync()))
        assert window.load(0, FLAG) == turns * comm.size
    counts = np.zeros(turns * comm.size, np.int64)
    counts[won] = 1
    np.testing.assert_array_equal(waiting.allreduce(comm, counts, MPI.SUM, "the others"), 1)
