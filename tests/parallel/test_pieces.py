"""Transfers in pieces give what those in one give, however small the largest piece is."""

from __future__ import annotations

import numpy as np
import pytest
from mpi4py import MPI
from parallel import tiny
from parallel.test_sandblaster import serial

from dbmpi.index.boxes import Box
from dbmpi.mpi import pieces, waiting
from dbmpi.mpi.window import Window
from dbmpi.network.losses import Loss
from dbmpi.replica.group import Group
from dbmpi.replica.loss import LossExchange
from dbmpi.runs.training import train

SIZES = [1 << 30, 40, 8]
"""Bytes of a piece: all in one, and some numbers or one at a time."""
WAYS = {"rma": {"transport": "rma"}, "p2p": {"transport": "p2p"}}


@pytest.fixture(params=SIZES)
def largest(request, monkeypatch) -> int:
    monkeypatch.setattr(pieces, "LARGEST", request.param)
    return request.param


def numbers(rank: int, size: int) -> np.ndarray:
    """Return integers, of which sums are exact."""
    return np.random.default_rng(rank).integers(-1000, 1000, size).astype(np.float64)


@pytest.mark.parallel([1, 3])
def test_collectives_in_pieces_are_those_in_one(comm, largest) -> None:
    everybodys = [numbers(rank, 23) for rank in range(comm.size)]
    mine = everybodys[comm.rank]
    found = waiting.allreduce(comm, mine, MPI.SUM, "the others")
    np.testing.assert_array_equal(found, sum(everybodys))
    square = waiting.allreduce(comm, np.full((5, 3), comm.rank), MPI.MAX, "the others")
    np.testing.assert_array_equal(square, np.full((5, 3), comm.size - 1))
    sent = mine.copy()
    waiting.broadcast(comm, sent, comm.size - 1, "the last")
    np.testing.assert_array_equal(sent, everybodys[-1])
    text = "täglich " * 40
    assert waiting.broadcast_text(comm, text if comm.rank == 0 else "", 0, "the first") == text
    # Parts of different sizes, one of none.
    counts = [0, 11, 12][-comm.size :] if comm.size > 1 else [23]
    starts = np.cumsum([0, *counts])
    whole, held = np.empty(23), slice(starts[comm.rank], starts[comm.rank + 1])
    waiting.complete(pieces.iallgatherv(comm, everybodys[0][held].copy(), whole, counts), "the others")
    np.testing.assert_array_equal(whole, everybodys[0])
    part = np.full(counts[comm.rank], np.nan)
    waiting.complete(pieces.ireduce_scatter(comm, mine, part, counts), "the others")
    np.testing.assert_array_equal(part, sum(everybodys)[held])


@pytest.mark.parallel([2, 3])
def test_messages_in_pieces_keep_their_order(comm, largest) -> None:
    """Several with one tag between the same two ranks, received in the order in which they were sent."""
    after, before = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    sent = [numbers(10 * comm.rank + turn, 7 + turn) for turn in range(4)]
    going = [pieces.isend(comm, values, after, 3) for values in sent]
    came = [np.empty(7 + turn) for turn in range(4)]
    for request in [*(pieces.irecv(comm, values, before, 3) for values in came), *going]:
        waiting.complete(request, "the neighbours")
    for turn, values in enumerate(came):
        np.testing.assert_array_equal(values, numbers(10 * before + turn, 7 + turn))


@pytest.mark.parallel([2, 3])
@pytest.mark.parametrize("way", WAYS)
def test_windows_move_what_is_larger_than_a_piece(comm, largest, way) -> None:
    """Fetched and put by all ranks at a time; a flag comes after all pieces."""
    size = 31
    with Window.allocate(comm, 64 + 16 * size, shared=False, **WAYS[way]) as window:
        window.local[64:][: 8 * size].view(np.float64)[:] = numbers(comm.rank, size)
        window.sync()
        waiting.barrier(comm, "the numbers", serve=lambda: bool(window.sync()))
        other = (comm.rank + 1) % comm.size
        found = np.empty(size)
        window.get(other, 64, found)
        np.testing.assert_array_equal(found, numbers(other, size))
        sent = numbers(100 + comm.rank, size)
        window.put(other, 64 + 8 * size, sent)
        window.store(other, 0, 1)
        flag = window.local[:8].view(np.int64)

        def arrived() -> bool:
            window.sync()
            return bool(flag[0] == 1)

        waiting.until(arrived, "the flag")
        came = window.local[64 + 8 * size :][: 8 * size].view(np.float64)
        np.testing.assert_array_equal(came, numbers(100 + (comm.rank - 1) % comm.size, size))
        waiting.barrier(comm, "all to look", serve=lambda: bool(window.sync()))


@pytest.mark.parallel([3])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)], ids=["in order", "permuted"])
def test_outputs_that_turn_to_samples_in_pieces(comm, largest, order) -> None:
    """The loss and its gradient over units that are cut, as in one process; whoever owns which of them."""
    bounds = [(0, 2), (2, 3), (3, 7)]
    owned = [Box((bounds[place][0],), (bounds[place][1],)) for place in order]
    values = np.random.default_rng(5).normal(size=(7, 5)).astype(np.float32)
    targets = np.arange(5, dtype=np.int32)
    expected = values.copy()
    loss = Loss("softmax", "classes")
    total, correct = loss.apply(expected, targets)
    box = owned[comm.rank]
    mine = np.ascontiguousarray(values[box.starts[0] : box.stops[0]])
    found = LossExchange(Group(comm, shared=False), owned).apply(loss, mine, targets)
    assert found == (pytest.approx(float(total)), correct)
    np.testing.assert_allclose(mine, expected[box.starts[0] : box.stops[0]], rtol=1e-6)


@pytest.mark.parallel([3])
@pytest.mark.parametrize("transport", ["rma", "p2p"])
@pytest.mark.parametrize("method", ["downpour", "sandblaster"])
def test_a_run_between_hosts_in_pieces_is_that_in_one_process(
    comm, shared_path, monkeypatch, transport, method
) -> None:
    """Fetches, pushes, bundles, texts and vectors of a checkpoint in pieces of three numbers: all bits are the same."""
    monkeypatch.setattr(pieces, "LARGEST", 24)
    if comm.rank == 0:
        tiny.write_data(shared_path)
    waiting.barrier(comm, "the data")
    optimizer = {"learning_rate": 0.1, "batch_size": 6, "epochs": 3}
    if method == "sandblaster":
        optimizer = {"method": method, "batch_size": 6, "epochs": 4}
    run = tiny.describe(
        shared_path,
        topology={"shards": 2, "replicas": 1},
        server={"transport": transport},
        optimizer=optimizer,
        sandblaster={"deterministic": True, "gtol": 0, "ftol": 0},
    )
    found = tiny.vectors(train(run, tiny.Hosts(comm)).checkpoint)["parameters"]
    expected = tiny.Twin(run).learn() if method == "downpour" else serial(run, 4)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parallel([3])
def test_sums_of_some_partitions_in_pieces(comm, largest) -> None:
    group = Group(comm, shared=False)
    shelf = group.shelf(fixed=13)
    values = numbers(comm.rank, 13)
    found = group.sum(shelf, values, [0, 2], "the others")
    expected = numbers(0, 13) + numbers(2, 13) if comm.rank != 1 else np.zeros(13)
    np.testing.assert_array_equal(found, expected)
