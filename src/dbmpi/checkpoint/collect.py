"""How the shards' vectors come into one checkpoint: the lead collects them piece by piece, and writes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dbmpi.checkpoint import run_lock
from dbmpi.checkpoint.retention import kept
from dbmpi.checkpoint.schema import CheckpointInfo
from dbmpi.checkpoint.writer import CheckpointWriter
from dbmpi.errors import DiskFailed, RunFailed
from dbmpi.mpi import waiting
from dbmpi.replica.arrangement import Arrangement

if TYPE_CHECKING:
    from mpi4py import MPI

_DATA = 3
"""Tag of the vectors' pieces."""
_PIECE = 1 << 22
"""Elements of a vector that are sent at once."""
_LEAD_RANK = 0


@dataclass(frozen=True)
class ShardPart:
    """The lead's own part of the vectors."""

    arrangement: Arrangement
    """In which order the shards hold the vectors; the checkpoint has that of the layout."""
    vectors: Mapping[str, np.ndarray]
    """By name."""
    version: int
    """Of the shard."""
    objective_state: Mapping[str, np.ndarray] = field(default_factory=dict)
    """What an objective of the user's own has beside its parameters, by name."""


def save(
    comm: MPI.Intracomm,
    shard_ranks: Sequence[int],
    path: Path,
    part: ShardPart,
    describe: Callable[[tuple[int, ...]], CheckpointInfo],
    *,
    keep: int,
    check: Callable[[str, np.ndarray], None],
    alive: Callable[[], None] = lambda: None,
) -> Path:
    """Write a checkpoint on the lead, while all other shards call :func:`hand_over`; return its path.

    Parameters
    ----------
    comm, shard_ranks
        The ranks of the shards in a communicator, in the order of the shards; the first is the lead's.
    path
        Of the checkpoint.
    part
        The lead's own.
    describe
        Makes the description from the versions of all shards.
    check
        Called with the name and each piece of a vector before it is written; raises where it is not to be kept.
    keep
        How many checkpoints stay in the directory, this one included.
    alive
        Called now and then.

    Raises
    ------
    RunFailed
        If another run has taken the directory over.
    DiskFailed
        If the file cannot be written; what the other shards hand over is then received all the same.
    """
    arrangement, vectors = part.arrangement, part.vectors
    versions = [part.version] * len(shard_ranks)
    dtype, ranges = vectors["parameters"].dtype, arrangement.ranges
    failure: DiskFailed | None = None
    with ExitStack() as stack:
        try:
            writer = stack.enter_context(
                CheckpointWriter(path, arrangement.layout, tuple(vectors), dtype, part.objective_state)
            )
        except DiskFailed as error:
            failure = error

        def write(name: str, span: range, values: np.ndarray) -> None:
            nonlocal failure
            check(name, values)
            try:
                for start, local, length in arrangement.pieces(span) if failure is None else ():
                    writer.write(name, start, values[local : local + length])
            except DiskFailed as error:
                failure = error
            alive()

        for name, values in vectors.items():
            write(name, ranges[0], values)
        for other, rank in enumerate(shard_ranks[1:], 1):
            versions[other], pieces = collect(comm, rank, ranges[other], tuple(vectors), dtype)
            for name, start, values in pieces:
                write(name, range(start, start + len(values)), values)
        if failure is not None:
            raise failure
        run_lock.confirm(path.parent.parent)
        return writer.commit(describe(tuple(versions)), keep)


def hand_over(comm: MPI.Intracomm, version: int, vectors: Iterable[np.ndarray]) -> None:
    """Send a shard's `version` and its part of the `vectors` to the lead, piece by piece over `comm`."""
    word = np.array([version], np.int64)
    waiting.complete(comm.Isend(word, _LEAD_RANK, _DATA), "the lead to take a checkpoint")
    for vector in vectors:
        for start in range(0, vector.size, _PIECE):
            piece = vector[start : start + _PIECE]
            waiting.complete(comm.Isend(piece, _LEAD_RANK, _DATA), "the lead to take a checkpoint")


def collect(
    comm: MPI.Intracomm, rank: int, span: range, names: tuple[str, ...], dtype: np.dtype[np.floating]
) -> tuple[int, Iterator[tuple[str, int, np.ndarray]]]:
    """Receive a shard's version, and its vectors in pieces.

    Parameters
    ----------
    comm, rank
        Where the shard is.
    span
        Positions of the vectors, in the shards' order, that it holds.
    names, dtype
        Of its vectors, in the order in which it sends them.

    Returns
    -------
    version
        The shard's version.
    pieces
        ``(vector, start, values)`` with the start in the shards' order; `values` is only valid until the next
        piece.
    """
    version = np.empty(1, np.int64)
    waiting.complete(comm.Irecv(version, rank, _DATA), f"the shard on rank {rank} to hand over its vectors")

    def pieces() -> Iterator[tuple[str, int, np.ndarray]]:
        buffer = np.empty(min(_PIECE, len(span)), dtype)
        for name in names:
            for start in range(span.start, span.stop, _PIECE):
                piece = buffer[: min(_PIECE, span.stop - start)]
                waiting.complete(comm.Irecv(piece, rank, _DATA), f"{name} of the shard on rank {rank}")
                yield name, start, piece

    return int(version[0]), pieces()


def finite(values: np.ndarray) -> bool:
    """Return whether all `values`, float32, are finite: if and only if their float64 sum is, which needs no memory."""
    return math.isfinite(float(np.sum(values, dtype=np.float64)))


def check_finite(directory: Path, name: str, values: np.ndarray) -> None:
    """Raise RunFailed where `values`, a piece of the vector `name`, are parameters that are not finite.

    No checkpoint is written of such ones.  `directory` is that of the run.
    """
    if name == "parameters" and not finite(values):
        raise RunFailed(
            f"some parameters are NaN or infinite; no checkpoint is written; {kept(directory / 'checkpoints')}"
        )
