"""Ways to use a cluster, one an element of arrays: how many partitions, replicas, shards, ranks of a node and steps."""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from dbmpi.plan.step import Hardware


_CORES_OF_SHARD = 8
"""Cores of a node for each shard that shares them with workers, at least."""


@dataclass(frozen=True)
class Candidates:
    """Ways to use a cluster; all arrays are as long as there are ways."""

    partitions: np.ndarray
    replicas: np.ndarray
    shards: np.ndarray
    n_push: np.ndarray
    n_fetch: np.ndarray
    ranks_of_node: np.ndarray
    """Ranks on a node."""

    @classmethod
    def one(
        cls, partitions: int, replicas: int, shards: int, n_push: int = 1, n_fetch: int = 1, ranks_of_node: int = 1
    ) -> Candidates:
        """Return a single way.

        Parameters
        ----------
        partitions, replicas, shards, n_push, n_fetch, ranks_of_node
            As the fields.
        """
        numbers = (partitions, replicas, shards, n_push, n_fetch, ranks_of_node)
        return cls(*(np.array([number]) for number in numbers))

    @property
    def workers(self) -> np.ndarray:
        """Ranks that compute."""
        result: np.ndarray = self.partitions * self.replicas
        return result

    @property
    def ranks(self) -> np.ndarray:
        """All ranks."""
        result: np.ndarray = self.workers + self.shards
        return result

    @property
    def nodes(self) -> np.ndarray:
        """Nodes that the ranks fill."""
        result: np.ndarray = -(-self.ranks // self.ranks_of_node)
        return result

    def chosen(self, which: np.ndarray) -> Candidates:
        """Return those of the ways that `which`, a mask or indices, names."""
        return Candidates(*(getattr(self, field.name)[which] for field in fields(self)))


@dataclass(frozen=True)
class Choices:
    """What is free to be chosen, and what a user has settled."""

    partitions: tuple[int, ...]
    """Numbers of partitions that are considered."""
    replicas: int | None = None
    """Replicas, if they are settled."""
    shards: int | None = None
    """Shards, if they are settled."""
    steps: tuple[tuple[int, int], ...] = ((1, 1),)
    """Pairs of ``n_push`` and ``n_fetch`` that are considered."""
    most_replicas: int | None = None
    """Replicas at most, where they are not settled."""


def enumerate_ways(choices: Choices, hardware: Hardware) -> Candidates:
    """Return the ways to use a cluster that are worth a look.

    Ranks of a node are powers of two up to its cores, all cores, and as many more as shards need that share cores with
    workers.  Shards are powers of two, the partitions, and multiples of these; replicas are all that fit, and halves of
    that, as shards or staleness may allow no more.

    Parameters
    ----------
    choices
        What is free to be chosen.
    hardware
        The cluster.
    """
    rows = list(chain.from_iterable(_rows(choices, hardware, partitions) for partitions in choices.partitions))
    table = np.array(sorted(set(rows)), np.int64).reshape(-1, 6)
    return Candidates(*table.T)


def _rows(choices: Choices, hardware: Hardware, partitions: int) -> Iterable[tuple[int, ...]]:
    most = hardware.nodes * hardware.cores
    for shards in _shards(choices, partitions, most):
        beside = -(-shards // hardware.nodes)
        more = {hardware.cores + beside} if beside <= max(1, hardware.cores // _CORES_OF_SHARD) else set()
        for ranks_of_node in sorted({*_doubling(hardware.cores), hardware.cores, *more}):
            fitting = (hardware.nodes * ranks_of_node - shards) // partitions
            if choices.most_replicas is not None and not choices.replicas:
                fitting = min(fitting, choices.most_replicas)
            for replicas in [choices.replicas] if choices.replicas else _halving(fitting):
                if 1 <= replicas <= fitting:
                    for n_push, n_fetch in choices.steps:
                        yield partitions, replicas, shards, n_push, n_fetch, ranks_of_node


def _shards(choices: Choices, partitions: int, most: int) -> list[int]:
    if choices.shards:
        return [choices.shards]
    multiples = [partitions * factor for factor in _doubling(max(1, most // partitions))]
    return sorted(number for number in {*_doubling(most), *multiples} if 2 * number <= max(most, 2))


def _doubling(most: int) -> list[int]:
    """Return the powers of two up to a number."""
    return [1 << exponent for exponent in range(max(most, 1).bit_length())]


def _halving(most: int) -> Sequence[int]:
    """Return a number and its halves, down to 1."""
    found = []
    while most >= 1:
        found.append(most)
        most //= 2
    return found
