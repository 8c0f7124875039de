"""What two ranks do with each other, timed in small runs: a shard and a replica, or two partitions of a replica."""

from __future__ import annotations

import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dbmpi.config import Dense, NetworkSection, Run
from dbmpi.monitor.history import RunHistory
from dbmpi.monitor.records import read_records
from dbmpi.mpi import waiting
from dbmpi.network.description import Network
from dbmpi.objective import Batch
from dbmpi.replica import placement
from dbmpi.replica.replica import Replica
from dbmpi.runs.training import train

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mpi4py import MPI

    from dbmpi.monitor.lines import Record

_TINY = 8
"""Units, inputs and samples of networks whose arithmetic takes no time."""
_CLASSES = 2
_STEPS = 300
_REPORT_SECONDS = 0.05
_QUICKEST = 0.25
"""Of the reports of a run, those as quick as a quarter of them count: disturbances only make them slower."""


@dataclass(frozen=True)
class PushTimes:
    """A step of a replica with a shard of its own, and where its time goes; seconds."""

    step: float
    """All of it."""
    data: float
    """Of the worker, to make a batch of samples in memory."""
    apply: float
    """Of the shard's update."""
    processor: float
    """Of the first rank, which has the shard: its processor's time in the whole run, not in a step."""
    serve: float
    """Of the shard for a push, beyond the update."""


def parameters_of(side: int) -> int:
    """Return the parameters of the network of :func:`push_times` with so many units on a `side`."""
    return side * (side + 1) + _CLASSES * (side + 1)


def push_times(
    pair: MPI.Intracomm,
    rule: str,
    side: int = _TINY,
    steps: int = _STEPS,
    *,
    samples: int = _TINY,
    partitions: int = 1,
) -> PushTimes:
    """Return the times of a run of a shard and a replica, of the first partition (collective over two ranks).

    Parameters
    ----------
    pair
        The ranks.
    rule
        The update rule.
    side
        Units and inputs of the first layer, beside which another one has few parameters.
    steps
        Of the replica.
    samples
        Of a batch.
    partitions
        1, or 2 of which one has the shard, too.
    """
    # Beside the user's files, which the nodes of a cluster share, unlike /tmp.
    path = str(Path(tempfile.mkdtemp(prefix=".dbmpi-bench-", dir=".")).resolve()) if pair.rank == 0 else ""
    folder = Path(waiting.broadcast_text(pair, path, 0, "the name of a folder"))
    random, batches = np.random.default_rng(1), 16
    inputs = random.standard_normal((samples * batches, side), np.float32)
    targets = random.integers(0, _CLASSES, len(inputs)).astype(np.int32)
    run = Run.model_validate(
        {
            "run": {"directory": folder},
            "network": {"layers": (Dense(units=side), Dense(units=_CLASSES))},
            "topology": {"shards": 1, "replicas": 1, "partitions": partitions, "colocate": partitions > 1},
            "optimizer": {"rule": rule, "learning_rate": 1e-6, "batch_size": samples, "epochs": steps / batches},
            "monitor": {"progress": "none", "report_seconds": _REPORT_SECONDS, "timeline_seconds": 0.0},
        }
    )
    try:
        began = time.process_time()
        train(run, pair, data=(inputs, targets))
        processor = time.process_time() - began
        waiting.barrier(pair, "the other rank to write its records")
        history = RunHistory(read_records(folder))
        waiting.barrier(pair, "the other rank to read the records")
    finally:
        if pair.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
    worker, shard = history.workers[0], history.shards[0]
    return PushTimes(
        _quick(worker, "step", ()),
        _quick(worker, "step", ("data",)),
        _quick(shard, "pushes", ("apply",)),
        processor,
        _quick(shard, "pushes", ("serve",)),
    )


def exchange_seconds(pair: MPI.Intracomm, steps: int = _STEPS) -> float:
    """Return the seconds of one exchange of a few bytes between two partitions (collective).

    It is what a step takes longer than on one rank, shared out among the exchanges of layers and of the loss.

    Parameters
    ----------
    pair
        The ranks.
    steps
        That are timed, of each.
    """
    layers = (*(Dense(units=_TINY, activation="sigmoid") for _ in range(3)), Dense(units=_TINY))
    network = Network(NetworkSection(layers=layers), (_TINY,), 1)
    random = np.random.default_rng(1)
    inputs = random.standard_normal((_TINY, _TINY), np.float32)
    batch = Batch(inputs, random.integers(0, _TINY, _TINY).astype(np.int32))
    seconds = []
    for comm in (None, pair):
        partitions = 1 if comm is None else 2
        with Replica(network, placement.automatic(network.layers, partitions), comm) as replica:
            parameters, gradient = np.zeros(replica.size, np.float32), np.zeros(replica.size, np.float32)
            replica.prepare(_TINY)
            taken = []
            for step in range(steps):
                began = time.perf_counter()
                replica.loss_and_gradient(parameters, batch, gradient, step=step)
                taken.append(time.perf_counter() - began)
        seconds.append(float(np.quantile(taken, _QUICKEST)))
    exchanges = 2 * (len(layers) - 1) + 2
    return max(seconds[1] - seconds[0], 0.0) / exchanges


def _quick(reports: Iterable[Record], count: str, activities: tuple[str, ...]) -> float:
    """Return the seconds of activities, or of all, for each step or push, as quick reports have it."""
    found, before = [], 0
    for report in reports:
        number, before = report[count] - before, report[count]
        if number > 0:
            seconds = report["seconds"]
            found.append(sum(seconds[name] for name in activities or seconds) / number)
    return float(np.quantile(found[1:] or found, _QUICKEST))
