"""Measures the constants of a machine that plans are made of: by itself, or on all ranks of a launcher at once."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dbmpi.network.description import layer_of
from dbmpi.paramserver.bottleneck import moved_bytes
from dbmpi.plan.constants import MachineConstants, reference
from dbmpi.plan.throughput import polls
from dbmpi.runs import layer_speeds
from dbmpi.runs.layer_speeds import undisturbed_seconds

if TYPE_CHECKING:
    from mpi4py import MPI

Say = Callable[[str], object]
_STEPS = 600
_RULES = {"0": "sgd", "1": "adagrad", "2": "adam"}
"""A rule with so many arrays of state."""
_SIDES = ((256, 300), (724, 100), (2048, 30))
"""Units and inputs of a layer whose parameters move, and steps."""
_LONG = (256, 1000, 40, 160)
"""Samples, inputs, and few and many steps, of a run in which making batches and waiting take some time."""
_MOST_VALUES = len(_RULES) * len(_SIDES)
_ITEM = 4
_DEVIATION = 1.349
"""Between the quartiles of a normal distribution, in standard deviations."""
_LATENCIES = 6
"""As in `plan.throughput`."""
_PATIENCE = 600.0
"""Seconds for which ranks wait for those that measure."""


def calibrate(comm: MPI.Intracomm | None, say: Say) -> MachineConstants:
    """Measure the constants of this machine (collective).

    All ranks compute at the same time, as they do in a run.  What two ranks of one host, or of two, do with each other
    is measured by the first such ranks while the others wait; what cannot be measured with the ranks that were started
    is that of the reference machine.

    Parameters
    ----------
    comm
        The ranks; None for this process alone.
    say
        Called with a line about what is measured.

    Returns
    -------
    MachineConstants
        The same on every rank.
    """
    base = reference()
    found: dict[str, Any] = base.model_dump() | {"processor": processor(), "ranks": 1, "hosts": 1}
    found["rank_bytes"] = _mean(comm, [float(_resident())])[0]
    measured = ["rank_bytes"]
    say("layers, by one thread of each rank")
    with layer_speeds.one_thread() as threads:
        speeds = _speeds(comm)
    found |= speeds
    measured += [*speeds]
    gain = layer_speeds.thread_gain(threads)
    if gain is not None:
        found["thread_gain"] = _mean(comm, [gain])[0]
        measured.append("thread_gain")
    if comm is not None:
        between = _between_ranks(comm, say, base)
        found |= between
        measured += [name for name in between if name not in ("ranks", "hosts", *measured)]
    return MachineConstants.model_validate(found | {"measured": tuple(measured)})


def processor() -> str:
    """Return the name of this machine's processor, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (names[0] if names else os.uname().machine)[:200]


def _speeds(comm: MPI.Intracomm | None) -> dict[str, Any]:
    """Return what a rank computes in a second, in the mean of all ranks, and how much that differs."""
    rates: dict[str, list[tuple[float, ...]]] = {}
    keys, seconds = [], []
    for kind, size, operations, samples, work in layer_speeds.layers():
        _meet(comm)
        keys.append((kind, size, operations * samples, float(samples)))
        seconds.append(undisturbed_seconds(work))
    for (kind, size, operations, number), taken in zip(keys, _mean(comm, seconds), strict=True):
        rates.setdefault(kind, []).append((size, number, operations / taken))
    lengths, seconds = [], []
    for nbytes, work in layer_speeds.copies():
        _meet(comm)
        lengths.append(float(nbytes))
        seconds.append(undisturbed_seconds(work))
    copies = [(nbytes, nbytes / taken) for nbytes, taken in zip(lengths, _mean(comm, seconds), strict=True)]
    _meet(comm)
    section, shape = layer_speeds.SPREAD_LAYER
    times = layer_speeds.repeated_seconds(layer_speeds.passes(layer_of(section, "measured", shape), 128), 40)
    low, middle, high = np.quantile(times, (0.25, 0.5, 0.75)).tolist()
    within = (high - low) / _DEVIATION / middle
    means = _each(comm, middle)
    # Between ranks the deviation of few medians is itself uncertain; the larger of the two counts.
    spread = max(_mean(comm, [within])[0], float(np.std(means) / np.mean(means)))
    batch, loss = _mean(comm, [layer_speeds.batch_bandwidth(), layer_speeds.loss_seconds()])
    return {"rates": rates, "copies": copies, "spread": spread, "batch_bandwidth": batch, "loss_seconds": loss}


def _between_ranks(comm: MPI.Intracomm, say: Say, base: MachineConstants) -> dict[str, Any]:
    """Return what ranks take to exchange, push and fetch: those of one host, and those of two."""
    from dbmpi.mpi import transport, window

    hosts = window.hosts(comm)
    distinct = sorted(set(hosts.tolist()))
    found: dict[str, Any] = {"ranks": comm.size, "hosts": len(distinct)}
    neighbours = [rank for rank in range(comm.size) if hosts[rank] == hosts[0]]
    step = base.step_seconds
    if len(neighbours) > 1:
        say("pushes, fetches and exchanges of two ranks of one host")
        found |= _on_host(comm, (0, neighbours[1]))
        step = found["step_seconds"]
    if len(distinct) > 1:
        say("pushes, fetches and exchanges of two ranks of two hosts")
        speeds = [transport.measure(comm, way, 0, distinct[1]) for way in transport.TRANSPORTS]
        fastest = max(speeds, key=lambda speed: speed.get_bytes)
        latency = min(speed.flag_seconds for speed in speeds) / 2
        exchange, whole, serve, *_ = _of_pair(comm, (0, distinct[1]), _tiny_times)
        found |= {
            "latency": latency,
            "bandwidth": min(fastest.get_bytes, fastest.put_bytes),
            "far_step_seconds": max(whole - step - serve - _LATENCIES * latency, 0.0),
            "far_exchange_seconds": max(exchange - latency - base.message_seconds, 0.0),
        }
        if len(neighbours) == 1:
            found["service_seconds"] = serve
    return found


def _on_host(comm: MPI.Intracomm, ranks: tuple[int, int]) -> dict[str, Any]:
    """Return what two ranks of one host take: by the size of what moves, where that matters."""
    from dbmpi.runs.pair_times import parameters_of

    exchange, whole, serve, together, bandwidth, poll, *_ = _of_pair(comm, ranks, _tiny_times)
    numbers = iter(_of_pair(comm, ranks, _vector_times))
    updates: dict[str, list[tuple[float, float]]] = {}
    for states in _RULES:
        for side, _ in _SIDES:
            size = parameters_of(side)
            moved = moved_bytes(_ITEM * size, int(states))
            updates.setdefault(states, []).append((float(size), moved / next(numbers)))
    return {
        "step_seconds": max(whole - serve, 0.0),
        "service_seconds": serve,
        "exchange_seconds": exchange,
        "partition_seconds": together,
        "poll_seconds": poll,
        "batch_bandwidth": bandwidth,
        "updates": updates,
    }


def _tiny_times(pair: MPI.Intracomm) -> list[float]:
    """Return seconds of an exchange, a step, a shard for a push, and what partitions decide, next to nothing computed.

    And of a longer step, the bandwidth at which batches are made, and the seconds of a poll.
    """
    from dbmpi.runs.pair_times import exchange_seconds, push_times

    tiny = push_times(pair, "sgd", steps=_STEPS)
    exchange = exchange_seconds(pair)
    # One moving layer, and the loss; the rest is what partitions decide together.
    cut = push_times(pair, "sgd", steps=_STEPS, partitions=2).step
    samples, inputs, few, many = _LONG
    short, long = (push_times(pair, "sgd", inputs, steps, samples=samples) for steps in (few, many))
    bandwidth = _ITEM * samples * inputs / max(long.data - tiny.data, 1e-9)
    # What a start takes is in both.
    waits = (long.processor - short.processor) / (many - few) - long.apply - long.serve
    poll = max(waits, 0.0) / float(polls(np.array(long.step - long.apply - long.serve)))
    together = max(cut - tiny.step - 4 * exchange, 0.0)
    return [exchange, tiny.step, tiny.serve + tiny.apply, together, bandwidth, poll]


def _vector_times(pair: MPI.Intracomm) -> list[float]:
    """Return seconds of an update, for each rule and size."""
    from dbmpi.runs.pair_times import push_times

    return [push_times(pair, rule, side, steps).apply for rule in _RULES.values() for side, steps in _SIDES]


def _of_pair(
    comm: MPI.Intracomm, ranks: tuple[int, int], measure: Callable[[MPI.Intracomm], list[float]]
) -> list[float]:
    """Let two ranks measure, and return on all what the first of them has found (collective)."""
    from mpi4py import MPI

    from dbmpi.mpi import blocking, waiting

    member = comm.rank in ranks
    pair = blocking.split(comm, 0 if member else MPI.UNDEFINED, comm.rank, "all ranks to set two of them apart")
    values = np.zeros(_MOST_VALUES)
    if member:
        found = measure(pair)
        values[: len(found)] = found
        blocking.free(pair)
    waiting.complete(comm.Ibcast(values, ranks[0]), "two ranks to measure", seconds=_PATIENCE)
    result: list[float] = values.tolist()
    return result


def _meet(comm: MPI.Intracomm | None) -> None:
    if comm is not None:
        from dbmpi.mpi import waiting

        waiting.complete(comm.Ibarrier(), "the other ranks to measure", seconds=_PATIENCE)


def _mean(comm: MPI.Intracomm | None, values: list[float]) -> list[float]:
    """Return values in the mean of all ranks."""
    if comm is None:
        return values
    from mpi4py import MPI

    from dbmpi.mpi import waiting

    total = waiting.allreduce(comm, np.array(values), MPI.SUM, "the measurements of the other ranks", seconds=_PATIENCE)
    result: list[float] = (total / comm.size).tolist()
    return result


def _each(comm: MPI.Intracomm | None, value: float) -> np.ndarray:
    """Return the value of each rank."""
    if comm is None:
        return np.array([value])
    from mpi4py import MPI

    from dbmpi.mpi import waiting

    mine = np.zeros(comm.size)
    mine[comm.rank] = value
    return waiting.allreduce(comm, mine, MPI.SUM, "the measurements of the other ranks", seconds=_PATIENCE)


def _resident() -> int:
    """Return the bytes of this process that are in memory."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
