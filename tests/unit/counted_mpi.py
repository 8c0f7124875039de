"""A stand-in for MPI that lets one rank of a large world start up alone, and counts what it asks of MPI.

The rank is the true code; the others are made up.  They contribute what the one contributes, or their number, or the
first rank of their host, which is all that the code under test asks them for; and what a root has broadcast when it was
the one is what the others get later.
"""

# ruff: noqa: N802 (MPI's names)

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from mpi4py import MPI


@dataclass
class Counted:
    """What one rank of a world asks of MPI."""

    rank: int
    size: int
    host_size: int
    splits: list[Sequence[int]]
    """The ranks of what each of its calls of Split gives."""
    said: dict[int, np.ndarray]
    """What the roots have broadcast, by the number of the broadcast."""
    calls: Counter[str] = field(default_factory=Counter)
    moved: int = 0
    """Bytes that it has handed to MPI or got from it."""
    windows: int = 0
    """Bytes of its windows."""
    broadcasts: int = 0

    def host(self, rank: int) -> range:
        """Return the ranks on a rank's host."""
        first = rank - rank % self.host_size
        return range(first, min(first + self.host_size, self.size))


class Request:
    """An operation that is complete."""

    def Test(self) -> bool:
        return True


class Comm:
    """One rank's communicator."""

    def __init__(self, counted: Counted, members: Sequence[int], places: Sequence[int] = ()) -> None:
        self._counted, self._members = counted, members
        self._places = places  # in the communicator that has been split by hosts
        self.size, self.rank = len(members), members.index(counted.rank)

    def Dup(self) -> Comm:
        self._count("Dup")
        return Comm(self._counted, self._members, self._places)

    def Split(self, color: int, key: int) -> Any:
        self._count("Split")
        members = self._counted.splits.pop(0)
        return MPI.COMM_NULL if color == MPI.UNDEFINED else Comm(self._counted, members)

    def Split_type(self, kind: int, key: int = 0) -> Comm:
        self._count("Split_type")
        host = self._counted.host(self._counted.rank)
        places = [place for place, rank in enumerate(self._members) if rank in host]
        return Comm(self._counted, [self._members[place] for place in places], places)

    def Ibarrier(self) -> Request:
        return self._count("Ibarrier")

    def Iallreduce(self, values: np.ndarray, result: np.ndarray, operation: MPI.Op) -> Request:
        result[...] = values * self.size if operation == MPI.SUM else values
        if values.size == 1 and values[0] in self._places and operation == MPI.MIN:
            result[...] = self._places[0]
        return self._count("Iallreduce", values, result)

    def Iallgather(self, values: np.ndarray, result: np.ndarray) -> Request:
        result[:] = self._places or [self._counted.host(rank).start for rank in self._members]
        return self._count("Iallgather", values, result)

    def Igather(self, values: np.ndarray, result: np.ndarray, root: int) -> Request:
        return self._count("Igather", values, result)

    def Ibcast(self, values: np.ndarray, root: int) -> Request:
        number = self._counted.broadcasts = self._counted.broadcasts + 1
        if root == self.rank:
            self._counted.said[number] = values.copy()
        elif number in self._counted.said:
            values[...] = self._counted.said[number]
        return self._count("Ibcast", values)

    def Isend(self, values: np.ndarray, rank: int, tag: int) -> Request:
        return self._count("Isend", values)

    def Iprobe(self, *_: object) -> bool:
        return False

    def Free(self) -> None:
        pass

    def _count(self, name: str, *arrays: np.ndarray) -> Request:
        self._counted.calls[name] += 1
        self._counted.moved += sum(array.nbytes for array in arrays)
        return Request()


class _Window:
    def __init__(self, memory: np.ndarray) -> None:
        self._memory = memory

    def Shared_query(self, place: int) -> tuple[np.ndarray, int]:
        return self._memory, 1

    def Lock_all(self, mode: int) -> None:
        pass

    def Sync(self) -> None:
        pass

    def Unlock_all(self) -> None:
        pass

    def Free(self) -> None:
        pass


class _Windows:
    def __init__(self, counted: Counted) -> None:
        self._counted = counted

    def Allocate_shared(self, size: int, unit: int, info: MPI.Info, comm: Comm) -> _Window:
        self._counted.calls["Win.Allocate_shared"] += 1
        self._counted.windows += size
        return _Window(np.frombuffer(mmap.mmap(-1, size), np.uint8))

    def Create(self, memory: np.ndarray, unit: int, info: MPI.Info, comm: Comm) -> _Window:
        self._counted.calls["Win.Create"] += 1
        return _Window(memory)


class Mpi:
    """Stands for the module ``mpi4py.MPI``; what is no communicator and no window is the true one's."""

    def __init__(self, counted: Counted) -> None:
        self.Win = _Windows(counted)

    def Intracomm(self, comm: Comm) -> Comm:
        return comm

    def __getattr__(self, name: str) -> Any:
        return getattr(MPI, name)
