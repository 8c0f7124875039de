"""The best way to use a cluster, and how it changes with the number of machines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from dbmpi.errors import UserError
from dbmpi.machine.capacity import shown
from dbmpi.plan.candidates import Candidates, Choices, enumerate_ways
from dbmpi.plan.demands import Demands
from dbmpi.plan.step import StepTimes, step_times
from dbmpi.plan.throughput import Predictions, predict
from dbmpi.plan.work import ReplicaWork, work_of
from dbmpi.replica import placement
from dbmpi.replica.thread_count import worthwhile

if TYPE_CHECKING:
    from dbmpi.config import Run
    from dbmpi.network.description import Network
    from dbmpi.plan.constants import MachineConstants
    from dbmpi.plan.step import Hardware

PARTITIONS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 36, 48, 64, 100, 128, 144)
"""Numbers of partitions that are considered; the paper went up to 144."""
PUSHES = (1, 2, 5, 10)
"""Numbers of steps between two pushes, and two fetches, that are considered."""
_NEARLY = 0.9
"""More steps between pushes are taken only where fewer reach less than this fraction of the most samples a second."""
_ALIKE = 0.97
"""Ways that reach this fraction of the most samples a second are as good."""
_GAIN = 1.05
"""A cut over more partitions is considered while a step becomes this much shorter."""


@dataclass(frozen=True)
class Advice:
    """One way to use a cluster, and what is predicted of it."""

    ways: Candidates
    """A single one."""
    predictions: Predictions
    """Of it."""
    hardware: Hardware
    """The cluster."""
    considered: int
    """Ways that were compared."""

    @property
    def samples_per_second(self) -> float:
        """Of all replicas."""
        return float(self.predictions.samples_per_second[0])


class Planner:
    """The cost model of one configuration.

    Parameters
    ----------
    run
        The configuration; numbers in its ``[topology]``, and an ``n_push`` or ``n_fetch`` above 1, are settled.
    network
        Its network.
    constants
        Of the machines.
    max_staleness
        The largest mean staleness of a way that is recommended; 0 for no limit.

    Raises
    ------
    UserError
        If the model does not know how the configuration works.
    """

    def __init__(self, run: Run, network: Network, constants: MachineConstants, max_staleness: float = 0) -> None:
        self.constants, self.demands = constants, Demands.from_config(run, network.size)
        self._run, self._network, self._max_staleness = run, network, max_staleness
        self._works: dict[int, ReplicaWork] = {}

    def work(self, partitions: int) -> ReplicaWork:
        """Return the work of a replica that is cut over so many `partitions`."""
        if partitions not in self._works:
            placed = placement.from_config(self._run.placement, self._network.layers, partitions)
            self._works[partitions] = work_of(self._network, placed)
        return self._works[partitions]

    def predict(self, ways: Candidates, hardware: Hardware) -> Predictions:
        """Predict what `ways` to use the `hardware` will come to."""
        works = {number: self.work(number) for number in np.unique(ways.partitions).tolist()}
        return predict(works, self.demands, self.constants, hardware, ways, threads=self._threads(works))

    def advise(self, hardware: Hardware) -> Advice:
        """Return the best way to use a cluster.

        Of the ways whose memory suffices, and whose staleness is allowed, those count that have the fewest steps
        between pushes with which 90 % of the most samples a second can be had.  Of them, those are as good that come
        within 3 % of the best; the lowest staleness wins, to 10 %, and then the fewest ranks.

        Parameters
        ----------
        hardware
            The cluster.

        Raises
        ------
        UserError
            If no way fits: names the memory, or the number of partitions, that would do.
        """
        ways = enumerate_ways(self._choices(hardware), hardware)
        if not len(ways.partitions):
            raise UserError(self._lacking_ranks(hardware))
        found = self.predict(ways, hardware)
        fits = found.node_bytes <= hardware.memory
        if not fits.any():
            raise UserError(self._lacking_memory(ways, found, hardware))
        if self._max_staleness:
            allowed = fits & (found.staleness <= self._max_staleness + 1e-9)
            if not allowed.any():
                least = float(found.staleness[fits].min())
                raise UserError(
                    f"--max-staleness {self._max_staleness:g}: the settings of [topology] and [optimizer] lead to "
                    f"{least:.3g} at least; give that or more, or settle fewer replicas"
                )
            fits = allowed
        ways, found = ways.chosen(fits), found.chosen(fits)
        rates = found.samples_per_second
        fewest = int(ways.n_push[rates >= _NEARLY * rates.max()].min())
        rates = np.where(ways.n_push == fewest, rates, 0.0)
        best = rates >= _ALIKE * rates.max()
        staleness = np.round(10 * np.log1p(found.staleness[best]))
        number = np.flatnonzero(best)[np.lexsort((-rates[best], ways.ranks[best], staleness))[:1]]
        return Advice(ways.chosen(number), found.chosen(number), hardware, len(fits))

    def over_nodes(self, hardware: Hardware, points: int = 13) -> list[Advice]:
        """Return the advice for growing numbers of nodes, up to those of a cluster.

        Parameters
        ----------
        hardware
            The cluster.
        points
            How many numbers, at most; those on which nothing fits are left out.
        """
        exponents = np.linspace(0, math.log(hardware.nodes), points)
        found = []
        for nodes in sorted({round(math.exp(exponent)) for exponent in exponents.tolist()}):
            try:
                found.append(self.advise(replace(hardware, nodes=nodes)))
            except UserError:
                continue
        return found

    def replica_over_machines(self, hardware: Hardware, machines: Sequence[int]) -> list[StepTimes]:
        """Return the times of a step of one replica with one partition on each of some machines.

        Parameters
        ----------
        hardware
            A machine, and the network between them.
        machines
            Numbers of machines.
        """
        return [
            step_times(
                *(self.work(number), self.demands.samples, self.constants, hardware),
                threads=hardware.cores,
                near=number == 1,
            )
            for number in machines
        ]

    @cached_property
    def _grain(self) -> int:
        return worthwhile(self._network.layers, 1, self.demands.samples)

    def _threads(self, works: dict[int, ReplicaWork]) -> int:
        """Return how many threads a rank can use well: those of the least cut are the most."""
        return max(1, self._grain // min(works))

    def _choices(self, hardware: Hardware) -> Choices:
        topology, optimizer = self._run.topology, self._run.optimizer
        settled = (optimizer.n_push, optimizer.n_fetch)
        steps = (settled,) if settled != (1, 1) or not self._may_skip else tuple((n, n) for n in PUSHES)
        cuts = (topology.partitions,) if topology.partitions else self._cuts(hardware)
        # A replica's push is at least as stale as there are others, and with overlap about twice that.
        bound = int(self._max_staleness) + 1 if self._max_staleness else None
        if bound is not None and self.demands.overlap and self.demands.fetch_copies:
            bound = max(1, bound // 2)
        return Choices(cuts, topology.replicas, topology.shards, steps, bound)

    @property
    def _may_skip(self) -> bool:
        """Whether several steps between pushes go with the other settings."""
        return self.demands.whole_gradients and self.demands.fetch_copies

    def _cuts(self, hardware: Hardware) -> tuple[int, ...]:
        """Return the numbers of partitions that are worth considering.

        All up to where a worker fits into half of a node; beyond that, more of them as long as a step becomes shorter.
        """
        found: list[int] = []
        shortest, idle = math.inf, 0
        for partitions in PARTITIONS:
            if partitions > max(1, hardware.nodes * hardware.cores - 1) and found:
                break
            found.append(partitions)
            (times,) = self.replica_over_machines(hardware, [partitions])
            fits = 12.0 * self.work(partitions).parameters < hardware.memory / 2
            idle = 0 if times.total * _GAIN < shortest or not fits else idle + 1
            shortest = min(shortest, times.total)
            if idle == 3:
                break
        return tuple(found)

    def _lacking_ranks(self, hardware: Hardware) -> str:
        topology = self._run.topology
        given = ", ".join(
            f"{name} = {value}"
            for name in ("partitions", "replicas", "shards")
            if (value := getattr(topology, name)) is not None
        )
        need = (topology.partitions or 1) * (topology.replicas or 1) + (topology.shards or 1)
        return (
            f"[topology] {given or 'without numbers'}: needs {need:,} ranks, and {hardware.nodes:,} nodes of "
            f"{hardware.cores} cores have fewer; give more nodes or cores, or settle smaller numbers"
        )

    def _lacking_memory(self, ways: Candidates, found: Predictions, hardware: Hardware) -> str:
        least = int(found.node_bytes.argmin())
        partitions, ranks = int(ways.partitions[least]), int(ways.ranks_of_node[least])
        more = replace(hardware, nodes=max(2 * hardware.nodes, 2))
        advice = f"--memory {found.node_bytes[least] / 2**30:.1f}GiB would do"
        while more.nodes <= 1 << 20:
            other = enumerate_ways(self._choices(more), more)
            if (self.predict(other, more).node_bytes <= hardware.memory).any():
                advice += f", or --nodes {more.nodes}"
                break
            if more.nodes > 4 * max(PARTITIONS):
                break
            more = replace(more, nodes=2 * more.nodes)
        return (
            f"the model does not fit: {self.demands.size:,} parameters need {shown(found.node_bytes[least])} of a node "
            f"at least (cut over {partitions} partition{'s' if partitions > 1 else ''}, {ranks} rank"
            f"{'s' if ranks > 1 else ''} on a node), and --memory says {shown(hardware.memory)}; {advice}"
        )
