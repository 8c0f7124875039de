"""Transfers of any size, in pieces that every MPI can carry.

An MPI counts in C integers, or says that it does not: Open MPI 5.0 has no transfer of 2 GiB or more, and its
collectives count offsets in C integers, too.  So nothing that grows with a model or with data is handed to MPI in one
piece: functions of this module do the same as the communicator's method of that name, piece by piece for large arrays.

All pieces are begun at once, in one order on all ranks, so that they can be mixed with other operations.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from mpi4py import MPI

LARGEST = 1 << 30
"""Bytes of a transfer, at most."""
Parts = tuple[np.ndarray, Sequence[range]]
"""A contiguous array, and for each rank the range of its flat elements that is this rank's."""


class Operation(Protocol):
    """An operation that has begun, e.g. an ``MPI.Request``."""

    def Test(self) -> bool:  # noqa: N802 (MPI's name)
        """Return whether it is complete; must not be asked again then."""


class Several:
    """The operations given to it as one, which is complete when all of them are."""

    def __init__(self, operations: Iterable[Operation]) -> None:
        self._left = list(operations)

    def Test(self) -> bool:  # noqa: N802
        """Return whether all are complete."""
        self._left = [operation for operation in self._left if not operation.Test()]
        return not self._left


def divide(values: np.ndarray) -> list[np.ndarray]:
    """Return the pieces of `values`, which is contiguous, flat and in order: views of at most `LARGEST` bytes."""
    if values.nbytes <= LARGEST:
        return [values]
    flat, step = _flat(values), max(LARGEST // values.itemsize, 1)
    return [flat[start : start + step] for start in range(0, flat.size, step)]


def isend(comm: MPI.Comm, values: np.ndarray, rank: int, tag: int) -> Operation:
    """Begin to send a contiguous array; the receiver calls :func:`irecv` with as many elements.

    Parameters
    ----------
    comm, rank, tag
        The communicator, the destination and the message's tag.
    values
        Must stay until the operation is complete.
    """
    return _together(comm.Isend(piece, rank, tag) for piece in divide(values))


def irecv(comm: MPI.Comm, values: np.ndarray, rank: int, tag: int) -> Operation:
    """Begin to receive an array that :func:`isend` sends.

    Parameters
    ----------
    comm, rank, tag
        The communicator, the source and the message's tag.
    values
        Contiguous; filled when the operation is complete.
    """
    return _together(comm.Irecv(piece, rank, tag) for piece in divide(values))


def ibcast(comm: MPI.Comm, values: np.ndarray, root: int) -> Operation:
    """Begin to fill `values` on all ranks of `comm` with those of `root`."""
    return _together(comm.Ibcast(piece, root) for piece in divide(values))


def iallreduce(comm: MPI.Comm, values: np.ndarray, result: np.ndarray, operation: MPI.Op) -> Operation:
    """Begin to reduce an array over all ranks.

    Parameters
    ----------
    comm
        The ranks.
    values
        This rank's; contiguous.
    result
        Another array of that size and dtype.
    operation
        How elements are combined.
    """
    both = zip(divide(values), divide(result), strict=True)
    return _together(comm.Iallreduce(piece, into, operation) for piece, into in both)


def iallgatherv(comm: MPI.Comm, part: np.ndarray, whole: np.ndarray, counts: Sequence[int]) -> Operation:
    """Begin to gather all ranks' parts on all ranks.

    Parameters
    ----------
    comm
        The ranks.
    part
        This rank's ``counts[rank]`` elements.
    whole
        All parts in the order of the ranks; contiguous.
    counts
        Elements of each rank's part.
    """
    if whole.nbytes <= LARGEST:
        return comm.Iallgatherv(part, [whole, counts])
    parts = _parts(whole, counts)
    parts[comm.rank][:] = part.reshape(-1)
    return Several(ibcast(comm, values, owner) for owner, values in enumerate(parts))


def ireduce_scatter(comm: MPI.Comm, whole: np.ndarray, part: np.ndarray, counts: Sequence[int]) -> Operation:
    """Begin to add up an array over all ranks, each of which gets a part of the sum.

    Parameters
    ----------
    comm
        The ranks.
    whole
        This rank's summand; contiguous.
    part
        This rank's ``counts[rank]`` elements of the sum.
    counts
        Elements of each rank's part, in the order of the ranks.
    """
    if whole.nbytes <= LARGEST:
        return comm.Ireduce_scatter(whole, part, counts)
    from mpi4py import MPI

    into = divide(part)
    return Several(
        comm.Ireduce(piece, into[number] if owner == comm.rank else None, MPI.SUM, owner)
        for owner, values in enumerate(_parts(whole, counts))
        for number, piece in enumerate(divide(values))
    )


def ialltoallv(comm: MPI.Comm, source: Parts, target: Parts, everything: int, tag: int) -> Operation:
    """Begin to send a part of an array to each rank, and to receive one from each.

    Parameters
    ----------
    comm
        The ranks.
    source, target
        An array, and which of its elements are for each rank, or come from it.
    everything
        Elements that all ranks send together, the same number on all of them: it decides how they travel.
    tag
        Of messages.
    """
    (out, sends), (into, receives) = source, target
    if everything * out.itemsize <= LARGEST:
        from mpi4py import MPI

        kind = MPI._typedict[out.dtype.char]
        here, there = (
            [values, ([len(part) for part in parts], [part.start for part in parts]), kind]
            for values, parts in (source, target)
        )
        return comm.Ialltoallv(here, there)
    outgoing, incoming = _flat(out), _flat(into)
    received = [irecv(comm, incoming[part.start : part.stop], rank, tag) for rank, part in enumerate(receives)]
    sent = [isend(comm, outgoing[part.start : part.stop], rank, tag) for rank, part in enumerate(sends)]
    return Several(received + sent)


def _flat(values: np.ndarray) -> np.ndarray:
    if not values.flags.c_contiguous:
        raise ValueError(f"given an array {values.shape} with strides {values.strides}, expected a contiguous one")
    return values.reshape(-1)


def _parts(whole: np.ndarray, counts: Sequence[int]) -> list[np.ndarray]:
    """Return the part of each rank, flat."""
    flat, parts, start = _flat(whole), [], 0
    for count in counts:
        parts.append(flat[start : start + count])
        start += count
    return parts


def _together(operations: Iterable[Operation]) -> Operation:
    """Return operations as one."""
    begun = list(operations)
    return begun[0] if len(begun) == 1 else Several(begun)
