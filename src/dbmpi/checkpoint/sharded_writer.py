"""Write a checkpoint of several files: one for each shard, and a small one that shows all of it whole, by views.

Nothing here knows MPI.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import numpy as np

from dbmpi.checkpoint import compressed, directory, retention, schema, shard_boxes
from dbmpi.checkpoint.new_file import ARRAYS, NewFile, View
from dbmpi.checkpoint.snapshot import Snapshot
from dbmpi.checkpoint.stored_arrays import ShardFiles
from dbmpi.checkpoint.writer import check_names, finish
from dbmpi.errors import DiskFailed
from dbmpi.index.layout import Layout

_SEEN_SECONDS = 30.0
"""How long the file of a shard on another host may take to be seen."""


@dataclass(frozen=True)
class ShardFacts:
    """What must be known of a shard's file to read it: :func:`write_shard` returns it."""

    elements: int
    """Of each vector."""
    size: int
    """Of the file, in bytes."""
    offsets: Mapping[str, int]
    """Where each vector begins in the file."""
    sums: Mapping[str, Sequence[int]]
    """The checksums of each."""

    def to_json(self) -> str:
        """Return all of it as text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Return what :meth:`to_json` has written as `text`."""
        return cls(**json.loads(text))


def write_shard(
    path: Path,
    vectors: Mapping[str, np.ndarray],
    snapshot: Snapshot,
    check: Callable[[str, np.ndarray], None],
    moved: Callable[[], None] = lambda: None,
    compression: str = "none",
) -> ShardFacts:
    """Write the file of a shard.

    Parameters
    ----------
    path
        Of the file, see :func:`dbmpi.checkpoint.directory.shard_path`; its directory must exist.
    vectors
        The shard's, by name, for their sizes and dtypes.
    snapshot
        Their values.
    check
        Called with the name and each block of a vector before it is written; raises where it is not to be kept.
    moved
        Called just before the file gets its name; raises where it is not to get it.
    compression
        ``"none"`` or ``"zstd"``.

    Raises
    ------
    DiskFailed
        If the disk is full or fails; no file is left behind then, as after every exception.
    """
    with NewFile(path, ARRAYS, with_checksums=True, failure=lambda text, _: DiskFailed(text)) as file:
        file.set_attribute("format", schema.SHARD_FORMAT)
        file.set_attribute("format_version", schema.FORMAT_VERSION)
        for name, vector in vectors.items():
            file.create(schema.group_of(name), vector.shape, vector.dtype, compressed=compression == compressed.NAME)
        file.check_space()
        for name, start, values in snapshot.blocks():
            check(name, values)
            file.write(schema.group_of(name), start, values)
        offsets = {name: file.offset(schema.group_of(name)) for name in vectors}
        file.commit(moved)
        return ShardFacts(
            elements=len(next(iter(vectors.values()))),
            size=file.size,
            offsets=offsets,
            sums={name: file.checksums(schema.group_of(name)).tolist() for name in vectors},
        )


def write_whole(
    path: Path,
    layout: Layout,
    boxes: Sequence[shard_boxes.ShardBox],
    facts: Sequence[ShardFacts],
    identity: str,
    info: schema.CheckpointInfo,
    *,
    dtype: np.dtype[Any],
    keep: int | None = None,
    objective_state: Mapping[str, np.ndarray] = MappingProxyType({}),
    compression: str = "none",
    confirm: Callable[[], object] = lambda: None,
    moved: Callable[[], None] = lambda: None,
) -> Path:
    """Write the file that makes the files of all shards a checkpoint, and return its path.

    Parameters
    ----------
    path
        Of the checkpoint.
    layout, boxes
        The tensors, and where their elements are.
    facts
        Of each shard's file.
    identity
        That of the shards' file names.
    info
        All but the arrays.
    dtype
        Of the arrays.
    keep, objective_state
        As for :class:`dbmpi.checkpoint.writer.CheckpointWriter`.
    compression
        Of the vectors in the files of the shards.
    confirm
        Called just before the file gets its name; raises where it is not to get it.
    moved
        Called now and then.

    Raises
    ------
    DiskFailed
        If the disk is full or fails, or the files of the shards are not where this one is to be.
    """
    vectors, shards = tuple(facts[0].offsets), len(facts)
    check_names(layout, vectors)
    files = [directory.shard_path(path, shard, shards, identity).name for shard in range(shards)]

    def failure(text: str, _: bool) -> Exception:
        return DiskFailed(f"{text}; {retention.kept(path.parent)}")

    _wait_for(ShardFiles(path.parent, files, [each.size for each in facts]), path, moved)
    with NewFile(path, ARRAYS, with_checksums=True, failure=failure) as file:
        file.set_attribute("format", schema.FORMAT)
        file.set_attribute("format_version", schema.FORMAT_VERSION)
        of_tensors: dict[str, list[View]] = {tensor.name: [] for tensor in layout.tensors}
        for tensor, box, shard, local in boxes:
            of_tensors[tensor.name].append(View(box, files[shard], facts[shard].elements, local))
        for vector in vectors:
            moved()
            for tensor in layout.tensors:
                group = schema.group_of(vector)
                file.create_view(f"{group}/{tensor.name}", tensor.shape, dtype, group, of_tensors[tensor.name])
        for name, values in objective_state.items():
            file.create(f"{schema.OBJECTIVE_STATE}/{name}", values.shape, values.dtype)
            file.write(f"{schema.OBJECTIVE_STATE}/{name}", 0, np.ascontiguousarray(values).reshape(-1))
        file.put(schema.SHARDS_ID, identity)
        file.put(schema.SHARDS_DTYPE, dtype.str)
        file.put(schema.SHARDS_FILES, [name.encode() for name in files])
        file.put(schema.SHARDS_VECTORS, [vector.encode() for vector in vectors])
        if compression != "none":
            file.put(schema.SHARDS_COMPRESSION, compression)
        file.put(schema.SHARDS_SIZES, [each.size for each in facts])
        file.put(schema.SHARDS_ELEMENTS, [each.elements for each in facts])
        tables = {
            schema.SHARDS_OFFSETS: np.array([[each.offsets[vector] for vector in vectors] for each in facts], np.int64),
            schema.SHARDS_SHAPES: shard_boxes.shapes_table(layout),
            schema.SHARDS_BOXES: shard_boxes.to_table(layout, boxes),
        }
        for shard, each in enumerate(facts):
            for number, vector in enumerate(vectors):
                tables[schema.shard_sums(shard, number)] = np.array(each.sums[vector], np.uint32)
        for name, table in tables.items():
            file.create(name, table.shape, table.dtype)
            file.write(name, 0, table.reshape(-1))
        return finish(file, layout, info, tuple(objective_state), identity=identity, keep=keep, confirm=confirm)


def _wait_for(files: ShardFiles, path: Path, moved: Callable[[], None]) -> None:
    """Wait until the files of all shards are seen here: a network file system may show them some seconds later.

    Raises
    ------
    DiskFailed
        If one is not.
    """
    until = time.monotonic() + _SEEN_SECONDS
    try:
        while problem := files.problem():
            if time.monotonic() > until:
                raise DiskFailed(
                    f"{path}: {problem}, as seen from this host, though a shard has written it; expected a directory "
                    f"that all hosts with shards share: set run.directory to one; {retention.kept(path.parent)}"
                )
            moved()
            time.sleep(0.1)
    finally:
        files.close()
