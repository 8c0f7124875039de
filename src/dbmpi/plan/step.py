"""The time of a step of one replica: computing, waiting for the slowest partition, exchanges between partitions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING

from dbmpi.plan.rates import between
from dbmpi.plan.work import compute_seconds

if TYPE_CHECKING:
    from dbmpi.plan.constants import MachineConstants
    from dbmpi.plan.work import LayerWork, ReplicaWork

_ITEM = 4
"""Bytes of a number."""
_BLOM = 0.375


@dataclass(frozen=True)
class Hardware:
    """A cluster of equal nodes."""

    nodes: int
    cores: int
    """Of a node."""
    memory: float
    """Bytes of a node."""
    bandwidth: float
    """Bytes a second that leave a node, and as many that reach it at the same time."""
    latency: float
    """Seconds from one node to another."""


@dataclass(frozen=True)
class StepTimes:
    """Where the time of a step goes, in seconds."""

    compute: float
    """Of the partition with most work, on a machine of mean speed."""
    slowest: float
    """What all wait for the slowest machine."""
    exchange: float
    """Moving values between partitions."""

    @property
    def total(self) -> float:
        """All together."""
        return self.compute + self.slowest + self.exchange


def expected_largest(number: int) -> float:
    """Return by how many standard deviations the largest of some normal numbers exceeds their mean, on average.

    Blom, "Statistical estimates and transformed beta-variables", 1958: the expectation of the largest of n is close to
    the quantile (n - 3/8) / (n + 1/4) of the distribution.

    Parameters
    ----------
    number
        How many numbers, at least 1.
    """
    return NormalDist().inv_cdf((number - _BLOM) / (number - 2 * _BLOM + 1))


def step_times(
    work: ReplicaWork,
    samples: int,
    constants: MachineConstants,
    hardware: Hardware,
    *,
    threads: int = 1,
    workers_of_node: int = 1,
    near: bool = True,
) -> StepTimes:
    """Return the time of a step of one replica.

    Parameters
    ----------
    work
        Of the replica.
    samples
        Of a batch.
    constants, hardware
        Of the machines, and of the network between them.
    threads
        Of a rank.
    workers_of_node
        Workers of the replica that share a node, and its line.
    near
        Whether all its workers are on one node, and exchange through its memory.
    """
    speed = 1 + constants.thread_gain * (threads - 1)
    partitions = work.partitions
    loss = constants.loss_seconds * work.outputs * samples / partitions
    compute = (sum(compute_seconds(layer, samples, constants) for layer in work.layers) + loss) / speed
    slowest = compute * constants.spread * expected_largest(partitions)
    exchange = 0.0
    if partitions > 1:
        moving = [layer for layer in work.layers if layer.moves]
        share = 0.0 if near else (partitions - workers_of_node) / (partitions - 1) * workers_of_node
        way = _Way(constants, hardware, near, partitions, share)
        exchange = sum(2 * way.seconds(_ITEM * layer.values * samples, layer) for layer in moving)
        # The loss turns the cut from units to samples and back.
        turned = _ITEM * samples * work.turned * (partitions - 1) / partitions**2
        exchange += 2 * way.seconds(turned, None) if turned else 0.0
        exchange += constants.partition_seconds
    return StepTimes(compute, slowest, exchange)


@dataclass(frozen=True)
class _Way:
    """How values move between the partitions of a replica."""

    constants: MachineConstants
    hardware: Hardware
    near: bool
    partitions: int
    share: float
    """What passes the line of a node, for each byte that a worker on it receives."""

    def seconds(self, nbytes: float, layer: LayerWork | None) -> float:
        """Return the time of one direction of an exchange; of the loss, where no layer is given."""
        constants, peers = self.constants, self.partitions - 1 if layer is None else layer.peers
        if self.near:
            return constants.exchange_seconds + nbytes / between(constants.copies, max(nbytes, 1.0))
        hops = math.ceil(math.log2(self.partitions)) if layer is not None and layer.gathers else 1
        return (
            constants.far_exchange_seconds
            + hops * self.hardware.latency
            + peers * constants.message_seconds
            + nbytes * self.share / self.hardware.bandwidth
        )
