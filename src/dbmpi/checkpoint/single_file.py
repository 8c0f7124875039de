"""A checkpoint of one plain file, from the vectors of a shard alone, or from the files of several shards."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from dbmpi.checkpoint import checksums, directory, schema
from dbmpi.checkpoint.sharded_writer import ShardFacts
from dbmpi.checkpoint.snapshot import BLOCK, Snapshot
from dbmpi.checkpoint.writer import CheckpointWriter
from dbmpi.errors import DiskFailed
from dbmpi.replica.arrangement import Arrangement


def write_shard_alone(
    writer: CheckpointWriter, arrangement: Arrangement, snapshot: Snapshot, check: Callable[[str, np.ndarray], None]
) -> None:
    """Write the vectors of the only shard.

    Parameters
    ----------
    writer
        Of the new file.
    arrangement
        In which order the shard holds the vectors.
    snapshot, check
        As for :func:`dbmpi.checkpoint.sharded_writer.write_shard`.
    """
    for name, start, values in snapshot.blocks():
        check(name, values)
        _put(writer, arrangement, name, start, values)


def write_together(
    writer: CheckpointWriter,
    arrangement: Arrangement,
    facts: Sequence[ShardFacts],
    identity: str,
    moved: Callable[[], None],
) -> None:
    """Write what the files of all shards hold.

    Parameters
    ----------
    writer
        Of the new file.
    arrangement
        In which order the shards hold the vectors.
    facts, identity
        As for :func:`dbmpi.checkpoint.sharded_writer.write_whole`.
    moved
        Called now and then.
    """
    dtype = writer.dtype
    buffer = np.empty(BLOCK, dtype)
    for shard, (each, held) in enumerate(zip(facts, arrangement.ranges, strict=True)):
        name = directory.shard_path(writer.path, shard, len(facts), identity)
        try:
            with name.open("rb", buffering=0) as file:
                for vector, offset in each.offsets.items():
                    begin = checksums.start(schema.group_of(vector), dtype, (each.elements,))
                    sums, size = np.array(each.sums[vector], np.uint32), each.elements * dtype.itemsize
                    stored = checksums.StoredArray(file.fileno, offset, size, begin, sums)
                    for start in range(0, each.elements, BLOCK):
                        values = buffer[: each.elements - start]
                        stored.read(start * dtype.itemsize, values.view(np.uint8).data)
                        _put(writer, arrangement, vector, held.start + start, values)
                        moved()
        except (OSError, checksums.Mismatch) as error:
            raise DiskFailed(f"{name}: could not be read again: {error}") from error


def _put(writer: CheckpointWriter, arrangement: Arrangement, vector: str, start: int, values: np.ndarray) -> None:
    """Write the `values` of a vector from `start` on, in the order of the shards, where the tensors have them."""
    for position, local, length in arrangement.pieces(range(start, start + len(values))):
        writer.write(vector, position, values[local : local + length])
