"""A whole run moves no byte more than its pushes and fetches need, whoever is cut into whatever."""

from __future__ import annotations

import pytest
from parallel import tiny

from dbmpi.config import Run
from dbmpi.monitor.records import read_records
from dbmpi.mpi import waiting
from dbmpi.network.description import Network
from dbmpi.replica.placement import automatic
from dbmpi.replica.tensors import tensor_boxes
from dbmpi.runs.training import train

PARTITIONS_AND_SHARDS = {2: (1, 1), 3: (2, 1), 4: (1, 3), 5: (2, 3)}
"""By the number of ranks."""
ITEMSIZE = 4


def own_sizes(run: Run, partitions: int) -> tuple[list[int], int]:
    """Return the parameters of each partition, and of the whole network."""
    network = Network(run.network, (tiny.FEATURES,), run.run.seed)
    placed = automatic(network.layers, partitions)
    boxes = [tensor_boxes(network.layers, placed, worker) for worker in range(partitions)]
    return [sum(box.size for box in held.values()) for held in boxes], network.layout.size


@pytest.mark.parallel([2, 3, 4, 5])
@pytest.mark.parametrize("overlap", ["none", "threads"])
@pytest.mark.parametrize(("n_push", "n_fetch", "fetch"), [(1, 1, "copied"), (3, 2, "copied"), (2, 1, "shared")])
def test_recorded_bytes_are_those_of_the_own_partition(comm, place, overlap, n_push, n_fetch, fetch) -> None:
    partitions, shards = PARTITIONS_AND_SHARDS[comm.size]
    run = tiny.describe(
        place,
        topology={"shards": shards, "partitions": partitions},
        optimizer={"learning_rate": 0.05, "batch_size": 6, "epochs": 2, "n_push": n_push, "n_fetch": n_fetch},
        server={"overlap": overlap, "fetch": fetch, "align": "partition"},
    )
    steps = train(run, comm).steps
    sizes, whole = own_sizes(run, partitions)
    pushes, fetches = 1 + -(-(steps - 1) // n_push), -(-steps // n_fetch)
    moved = {worker: [0, 0] for worker in range(partitions)}
    for record in read_records(run.run.directory):
        if record["kind"] == "worker":
            moved[record["number"]][0] += record["pushed_bytes"]
            moved[record["number"]][1] += record["fetched_bytes"]
    for worker, size in enumerate(sizes):
        assert moved[worker] == [pushes * size * ITEMSIZE, 0 if fetch == "shared" else fetches * size * ITEMSIZE]
    assert sum(pushed for pushed, _ in moved.values()) == pushes * whole * ITEMSIZE  # no weight twice
    waiting.barrier(comm, "the others to have read the records")
