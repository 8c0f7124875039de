"""A checkpoint of one plain file, from the vectors of a shard alone, or from the files of several shards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from dbmpi.checkpoint import checksums, directory, leftovers, schema
from dbmpi.checkpoint.sharded_writer import ShardFacts
from dbmpi.checkpoint.snapshot import BLOCK, Snapshot
from dbmpi.checkpoint.writer import CheckpointWriter
from dbmpi.errors import DiskFailed
from dbmpi.replica.arrangement import Arrangement


def write_shard_alone(
    path: Path,
    arrangement: Arrangement,
    vectors: Mapping[str, np.ndarray],
    snapshot: Snapshot,
    check: Callable[[str, np.ndarray], None],
    info: schema.CheckpointInfo,
    *,
    objective_state: Mapping[str, np.ndarray],
    keep: int,
    confirm: Callable[[], object],
) -> Path:
    """Write the vectors of the only shard, and return the path.

    Parameters
    ----------
    path, info, keep, confirm, objective_state
        As for :func:`dbmpi.checkpoint.sharded_writer.write_whole`.
    arrangement
        In which order the shard holds the vectors.
    vectors, snapshot, check
        As for :func:`dbmpi.checkpoint.sharded_writer.write_shard`.
    """
    dtype = vectors[schema.PARAMETERS].dtype
    with CheckpointWriter(path, arrangement.layout, tuple(vectors), dtype, objective_state) as writer:
        for name, start, values in snapshot.blocks():
            check(name, values)
            for position, local, length in arrangement.pieces(range(start, start + len(values))):
                writer.write(name, position, values[local : local + length])
        return writer.commit(info, keep, confirm)


def write_together(
    path: Path,
    arrangement: Arrangement,
    facts: Sequence[ShardFacts],
    identity: str,
    info: schema.CheckpointInfo,
    *,
    dtype: np.dtype[Any],
    keep: int,
    objective_state: Mapping[str, np.ndarray],
    confirm: Callable[[], object],
    moved: Callable[[], None],
) -> Path:
    """Write one file of those of all shards, remove these, and return the path.

    Parameters
    ----------
    path, facts, identity, info, dtype, keep, objective_state, confirm
        As for :func:`dbmpi.checkpoint.sharded_writer.write_whole`.
    arrangement
        In which order the shards hold the vectors.
    moved
        Called now and then.
    """
    buffer = np.empty(BLOCK, dtype)
    with CheckpointWriter(path, arrangement.layout, tuple(facts[0].offsets), dtype, objective_state) as writer:
        for shard, (each, held) in enumerate(zip(facts, arrangement.ranges, strict=True)):
            name = directory.shard_path(path, shard, len(facts), identity)
            try:
                with name.open("rb", buffering=0) as file:
                    for vector, offset in each.offsets.items():
                        begin = checksums.start(schema.group_of(vector), dtype, (each.elements,))
                        sums, size = np.array(each.sums[vector], np.uint32), each.elements * dtype.itemsize
                        stored = checksums.StoredArray(file.fileno, offset, size, begin, sums)
                        for start in range(0, each.elements, BLOCK):
                            values = buffer[: each.elements - start]
                            stored.read(start * dtype.itemsize, values.view(np.uint8).data)
                            first = held.start + start
                            for position, local, length in arrangement.pieces(range(first, first + len(values))):
                                writer.write(vector, position, values[local : local + length])
                            moved()
            except (OSError, checksums.Mismatch) as error:
                raise DiskFailed(f"{name}: could not be read again: {error}") from error
        writer.commit(info, keep, confirm)
    with suppress(OSError):  # the next start removes them
        leftovers.discard(path, identity)
    return path
