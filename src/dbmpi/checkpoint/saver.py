"""How the shards write a checkpoint together while training goes on.

Each shard keeps its vectors as they are, by copying what changes (:mod:`dbmpi.checkpoint.snapshot`), and a thread
writes them into a file of its own.  When all have done so, a thread of the lead writes the small file that makes them a
checkpoint.  A shard alone writes one plain file.  Threads never call MPI: shards report to the lead when they are
polled.
"""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from dbmpi.checkpoint import compressed, directory, schema
from dbmpi.checkpoint.background import Background
from dbmpi.checkpoint.finite import finite
from dbmpi.checkpoint.sharded_writer import ShardFacts, write_shard
from dbmpi.checkpoint.snapshot import Snapshot
from dbmpi.errors import DiskFailed
from dbmpi.machine import capacity
from dbmpi.machine.rank_variables import ranks_on_node
from dbmpi.mpi import waiting
from dbmpi.mpi.tags import Tag

if TYPE_CHECKING:
    from mpi4py import MPI

Written = TypeVar("Written")
_LEAD = 0
"""Rank of the lead."""


class NotFinite(Exception):
    """Some parameters are NaN or infinite."""


class ShardSaver:
    """A shard's part in writing checkpoints.

    Parameters
    ----------
    comm
        All ranks.
    run_directory
        Where checkpoints are.
    number, shards
        Of this shard, and how many there are.
    compression
        ``"none"`` or ``"zstd"``.

    Raises
    ------
    UserError
        If a package is missing that compresses.
    """

    def __init__(
        self, comm: MPI.Intracomm, run_directory: Path, number: int, shards: int, compression: str = "none"
    ) -> None:
        self._comm, self._directory, self._number, self._shards = comm, run_directory, number, shards
        self._compression, self._identity = compression, 0
        if compression != "none":
            compressed.require()
        self._snapshot: Snapshot | None = None
        self._ahead: Background[None] | None = None
        self._job: Background[ShardFacts] | None = None
        self._file: Path | None = None
        """What the job writes."""
        self._leaving: deque[tuple[MPI.Request, np.ndarray]] = deque()
        self._reported = time.monotonic()

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._snapshot is not None

    def begin(
        self, step: int, identity: int, vectors: Mapping[str, np.ndarray], version: int, *, last: bool = False
    ) -> None:
        """Take the vectors as they are now, and let a thread write them.

        Parameters
        ----------
        step, identity
            As the lead has told.
        vectors
            By name, the parameters first; before they change, :meth:`keep` is called.
        version
            Of the shard.
        last
            Whether nothing is learned afterwards.
        """
        self._identity = identity
        path = directory.checkpoint_path(self._directory, step)
        self._file = path = directory.shard_path(path, self._number, self._shards, digits(identity))

        def write(snapshot: Snapshot, moved: Callable[[], None]) -> ShardFacts:
            return write_shard(path, vectors, snapshot, checking(moved), moved, self._compression)

        self._job = self.start(vectors, write, last)
        self.report({"taken": version})

    def keep(self, name: str, start: int = 0, stop: int | None = None) -> None:
        """Keep what is not written yet of the vector `name`, whose elements ``start ... stop`` are about to change."""
        if self._snapshot is not None:
            self._snapshot.keep(name, start, stop)

    def poll(self) -> bool:
        """Report to the lead when there is something new; return whether there was."""
        job = self._job
        if job is None:
            return False
        if job.done:
            self._job = None
            waited = self.drop()
            try:
                self.report({"written": job.result().to_json(), "waited": waited})
            except NotFinite:
                self.report({"not_finite": True})
            except DiskFailed as error:
                self.report({"failed": str(error)})
            return True
        moved = job.moved()
        if moved and time.monotonic() - self._reported > waiting.STALL_SECONDS / 8:
            self.report({})
        return moved

    def close(self) -> None:
        """Abandon what is being written; a file that was not reported is removed, now or when its thread ends."""
        if self._job is not None:
            self._job.abandon()
            # Just written, and not reported: no checkpoint has it.
            if self._job.done and self._file is not None:
                with suppress(OSError):
                    self._file.unlink(missing_ok=True)
            self._job = None
        self.drop()

    def instead_of(self, shard: int) -> ShardSaver:
        """Return what writes the part of another shard, given its number."""
        return ShardSaver(self._comm, self._directory, shard, self._shards, self._compression)

    def fail(self, identity: int, why: str) -> None:
        """Report that this shard takes no part in the checkpoint of that `identity`, and `why`, a clause."""
        self._identity = identity
        self.report({"taken": 0})
        self.report({"failed": why})

    def start(
        self,
        vectors: Mapping[str, np.ndarray],
        write: Callable[[Snapshot, Callable[[], None]], Written],
        last: bool,
    ) -> Background[Written]:
        """Let a thread write a new snapshot, and another one copy ahead of it if training goes on.

        Parameters
        ----------
        vectors
            The shard's, by name.
        write
            What the thread does with the snapshot; its second argument is called for each step.
        last
            Whether nothing is learned afterwards.
        """
        assert self._snapshot is None, "one checkpoint at a time"
        # Other ranks of this host may copy, too, and something must be left for what they do besides.
        most = capacity.available() / 2 / ranks_on_node(os.environ)
        self._snapshot = snapshot = Snapshot(vectors, most)
        self._ahead = None if last else Background(snapshot.ahead)

        def work(moved: Callable[[], None]) -> Written:
            try:
                return write(snapshot, moved)
            finally:
                snapshot.release()  # no change may wait for what is not written any more

        return Background(work)

    def drop(self) -> float:
        """Let the vectors change without copies; return for how long changes have waited for these."""
        snapshot, ahead, self._snapshot, self._ahead = self._snapshot, self._ahead, None, None
        if snapshot is None:
            return 0.0
        snapshot.release()
        if ahead is not None:
            ahead.abandon()
        return snapshot.waited

    def report(self, report: dict[str, Any]) -> None:
        """Send a report on the checkpoint that was begun last to the lead."""
        self._reported = time.monotonic()
        while self._leaving and self._leaving[0][0].Test():
            self._leaving.popleft()
        whole = {"shard": self._number, "identity": self._identity, **report}
        data = np.frombuffer(json.dumps(whole).encode(), np.uint8)
        self._leaving.append((self._comm.Isend(data, _LEAD, Tag.CHECKPOINT), data))


def digits(identity: int) -> str:
    """Return an `identity` as it is in the names of files."""
    return f"{identity:08x}"


def checking(moved: Callable[[], None]) -> Callable[[str, np.ndarray], None]:
    """Return what is called before a block of a vector is written: it calls `moved`, and looks for NaN and infinity."""

    def check(name: str, values: np.ndarray) -> None:
        moved()
        if name == schema.PARAMETERS and not finite(values):
            raise NotFinite

    return check
