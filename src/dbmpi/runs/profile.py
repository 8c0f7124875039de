"""The time of a training step, layer by layer, on random batches."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dbmpi.errors import UserError
from dbmpi.index.boxes import Box
from dbmpi.kernels import bfloat16
from dbmpi.kernels.compile import THREADS
from dbmpi.kernels.peaks import multiply_add_peak
from dbmpi.mpi import waiting
from dbmpi.objective import Batch
from dbmpi.replica.plan import plan_exchanges
from dbmpi.replica.replica import Replica

if TYPE_CHECKING:
    from mpi4py import MPI

    from dbmpi.network.description import Network
    from dbmpi.replica.placement import Placement
    from dbmpi.replica.replica import Replica

PHASES = ("forward", "backward", "exchange")
_BLOCK = 1 << 20
_HOST_BYTES = 64


@dataclass(frozen=True)
class LayerProfile:
    """One layer in a step of one replica: times are medians over the steps, of the slowest rank of each phase."""

    name: str
    seconds: tuple[float, ...]
    """Forward, backward, and exchange with the other partitions, waiting for them included."""
    slowest: tuple[int, ...]
    """The rank of each of these."""
    flops: int
    """Floating-point operations of all ranks, forward and backward; 0 where a layer does not count any."""
    nbytes: int
    """Bytes that all ranks receive from each other, forward and backward."""

    @property
    def flops_per_second(self) -> float:
        """Operations a second of all ranks together."""
        return self.flops / max(self.seconds[0] + self.seconds[1], 1e-9)


@dataclass(frozen=True)
class Profile:
    """A step of one replica; the same on every rank."""

    layers: tuple[LayerProfile, ...]
    step: float
    """Seconds of a whole step of the slowest rank: median over the steps."""
    peak: float
    """Multiply-adds in float32, as operations a second, of all threads of all ranks: what they could do at most."""
    hosts: tuple[str, ...]
    """Of each rank."""

    @property
    def flops(self) -> int:
        """Operations of a step."""
        return sum(layer.flops for layer in self.layers)

    @property
    def nbytes(self) -> int:
        """Bytes of a step."""
        return sum(layer.nbytes for layer in self.layers)


def profile(
    network: Network, placement: Placement, samples: int, steps: int, comm: MPI.Intracomm | None = None
) -> Profile:
    """Measure training steps of one replica on random data (collective).

    Parameters
    ----------
    network, placement
        The network, and how it is cut: one partition for each rank.
    samples
        Of a batch.
    steps
        Steps to take the median of, after one that compiles the remaining kernels and touches the memory.
    comm
        The ranks; None for this process alone.

    Raises
    ------
    UserError
        If the memory is not enough for parameters and gradient.
    """
    with Replica(network, placement, comm) as replica:
        halves = network.precision == "bfloat16" and bfloat16.engine() != "float32"
        peak = bfloat16.peak() if halves else multiply_add_peak()
        mine = np.append(_median_times(network, replica, samples, steps, comm), THREADS * peak)
    everybodys = _gather(comm, mine)
    times = everybodys[:, :-2].reshape(-1, len(PHASES), len(network.layers))
    plans = plan_exchanges(network.layers, placement)
    layers = []
    for index, (layer, plan) in enumerate(zip(network.layers, plans, strict=True)):
        seconds, slowest = times[:, :, index].max(axis=0), times[:, :, index].argmax(axis=0)
        moved = plan.values * samples * network.dtype.itemsize * (2 if index > 0 else 1)
        layers.append(
            LayerProfile(
                layer.name,
                tuple(seconds.tolist()),
                tuple(slowest.tolist()),
                layer.flops(Box.whole(layer.output_shape), samples, input_gradient=index > 0),
                moved,
            )
        )
    host = np.frombuffer(os.uname().nodename.encode()[:_HOST_BYTES].ljust(_HOST_BYTES, b"\0"), np.uint8).copy()
    hosts = _gather(comm, host).tolist()
    return Profile(
        tuple(layers),
        float(everybodys[:, -2].max()),
        float(everybodys[:, -1].sum()),
        tuple(bytes(host).rstrip(b"\0").decode("utf-8", "replace") for host in hosts),
    )


def _median_times(
    network: Network, replica: Replica, samples: int, steps: int, comm: MPI.Intracomm | None
) -> np.ndarray:
    """Return this rank's seconds by phase and layer, one behind the other, and of a whole step."""
    random = np.random.default_rng(1)
    try:
        parameters = np.empty(replica.size, network.dtype)
        gradient = np.empty_like(parameters)
        inputs = random.random((*network.input_shape, samples), np.float32)
    except MemoryError:
        need = 2 * replica.size * network.dtype.itemsize
        raise UserError(
            f"parameters and gradient of a rank need {need / 2**30:.1f} GiB, which this machine does not give; "
            "use more partitions on more machines"
        ) from None
    for start in range(0, parameters.size, _BLOCK):
        block = parameters[start : start + _BLOCK]
        block[:] = random.uniform(-0.05, 0.05, block.size)
    targets = random.integers(0, network.outputs, samples).astype(np.int32)
    if network.loss is not None and network.loss.targets == "values":
        targets = random.random((network.outputs, samples)).astype(network.dtype)
    batch = Batch(inputs.astype(network.dtype, copy=False), targets)

    taken: list[np.ndarray] = []
    for step in range(-1, steps):
        before = np.array([replica.seconds[phase] for phase in PHASES])
        if comm is not None:
            waiting.barrier(comm, "the other ranks before a step")
        began = time.perf_counter()
        replica.loss_and_gradient(parameters, batch, gradient, step=step + 1)
        if step >= 0:
            seconds = time.perf_counter() - began
            of_layers = np.array([replica.seconds[phase] for phase in PHASES]) - before
            taken.append(np.append(of_layers.ravel(), seconds))
    medians: np.ndarray = np.median(taken, axis=0)
    return medians


def table(found: Profile) -> list[str]:
    """Return the lines of a table for people.

    Parameters
    ----------
    found
        What :func:`profile` has measured.
    """
    several = len(found.hosts) > 1
    head = ["layer", "forward ms", "backward ms", "GFLOP/s", "% of peak"]
    head += ["KiB moved", "exchange ms", "slowest rank: forward, backward, exchange"] if several else []
    rows = [head]
    for layer in found.layers:
        forward, backward, exchange = (f"{1000 * seconds:.2f}" for seconds in layer.seconds)
        speed = [_rate(layer.flops_per_second), _share(layer.flops_per_second, found.peak)] if layer.flops else ["", ""]
        more = [f"{layer.nbytes / 1024:,.1f}", exchange, ", ".join(map(str, layer.slowest))] if several else []
        rows.append([layer.name, forward, backward, *speed, *more])
    rates = found.flops / max(found.step, 1e-9)
    sums = [f"{1000 * sum(layer.seconds[phase] for layer in found.layers):.2f}" for phase in range(len(PHASES))]
    more = [f"{found.nbytes / 1024:,.1f}", sums[2], ""] if several else []
    rows.append(["all layers", sums[0], sums[1], "", "", *more])
    lines = _aligned(rows)
    lines.append(
        f"a step {1000 * found.step:.2f} ms, with loss and waiting: {_rate(rates)} GFLOP/s, "
        f"{_share(rates, found.peak)} % of the peak of {_rate(found.peak)} GFLOP/s"
    )
    if len(set(found.hosts)) > 1:
        lines += [f"rank {rank} is on {host}" for rank, host in enumerate(found.hosts)]
    return lines


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    sides = (str.ljust, *[str.rjust] * (len(widths) - 1))
    lines = (zip(sides, row, widths, strict=True) for row in rows)
    return ["  ".join(side(cell, width) for side, cell, width in line).rstrip() for line in lines]


def _rate(flops_per_second: float) -> str:
    return f"{flops_per_second / 1e9:.1f}"


def _share(flops_per_second: float, peak: float) -> str:
    return f"{100 * flops_per_second / peak:.1f}"


def _gather(comm: MPI.Intracomm | None, mine: np.ndarray) -> np.ndarray:
    """Return the vectors of all ranks, one a row."""
    if comm is None:
        return mine[np.newaxis]
    everybodys = np.empty((comm.size, mine.size), mine.dtype)
    request = comm.Iallgather(mine, everybodys)
    waiting.complete(request, "the measurements of the other ranks", seconds=waiting.LONG_SECONDS)
    return everybodys
