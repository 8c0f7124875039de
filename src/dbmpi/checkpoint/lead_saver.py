"""The lead's part in writing checkpoints: it plans them, hears the shards, and makes their files a whole."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dbmpi.checkpoint import directory, leftovers, retention, run_lock, schema, shard_boxes
from dbmpi.checkpoint.background import Background
from dbmpi.checkpoint.saver import NotFinite, ShardSaver, checking, digits
from dbmpi.checkpoint.sharded_writer import ShardFacts, write_whole
from dbmpi.checkpoint.single_file import write_shard_alone, write_together
from dbmpi.checkpoint.snapshot import Snapshot
from dbmpi.checkpoint.writer import CheckpointWriter
from dbmpi.errors import DiskFailed, RunFailed, UserError
from dbmpi.mpi import failures
from dbmpi.mpi.tags import Tag

if TYPE_CHECKING:
    from mpi4py import MPI

    from dbmpi.config import CheckpointSection
    from dbmpi.replica.arrangement import Arrangement


@dataclass
class _Whole:
    """A checkpoint in the making."""

    step: int
    identity: int
    describe: Callable[..., schema.CheckpointInfo]
    objective_state: Mapping[str, np.ndarray]
    info: schema.CheckpointInfo | None = None
    versions: dict[int, int] = field(default_factory=dict)
    facts: dict[int, ShardFacts] = field(default_factory=dict)
    waited: float = 0.0
    began: float = field(default_factory=time.monotonic)
    problems: dict[int, Exception] = field(default_factory=dict)


class LeadSaver(ShardSaver):
    """The lead's part: that of its own shard, and the whole.

    Parameters
    ----------
    comm, run_directory
        As for `ShardSaver`.
    shard_ranks
        The rank of each shard, the lead's first.
    arrangement
        In which order the shards hold the vectors.
    section
        How checkpoints are written.
    not_finite
        Makes the exception for parameters that are NaN or infinite after so many steps.

    Attributes
    ----------
    size, seconds, waited
        Of the last checkpoint: bytes of all files; seconds from when the vectors were taken to when it was on disk;
        seconds for which changes waited for copies, on the shard where it was longest.
    written, versions
        Of the last checkpoint: its path, and the version of each shard.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        run_directory: Path,
        shard_ranks: Sequence[int],
        arrangement: Arrangement,
        section: CheckpointSection,
        not_finite: Callable[[int], Exception],
    ) -> None:
        super().__init__(comm, run_directory, 0, len(shard_ranks), section.compression)
        self._numbers = {rank: number for number, rank in enumerate(shard_ranks)}
        self._arrangement, self._section, self._not_finite = arrangement, section, not_finite
        # More than a reader accepts have only been seen in tests.
        count = shard_boxes.most_boxes(arrangement)
        if count > shard_boxes.MOST and section.compression != "none":
            raise UserError(
                f"checkpoint.compression: the shards may hold {count:,} parts of tensors, and their files can name "
                f'{shard_boxes.MOST:,}; set it to "none", or topology.shards to fewer'
            )
        self._single = section.layout == "single" or count > shard_boxes.MOST
        self._arriving: tuple[MPI.Request, np.ndarray] | None = None
        """A report of another shard."""
        self._whole: _Whole | None = None
        self._last: Background[Path] | None = None
        self._dtype = np.dtype(np.float32)
        self.size, self.seconds, self.waited = 0, 0.0, 0.0
        self.written = run_directory
        self.versions: Mapping[int, int] = {}

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._whole is not None

    @property
    def taken(self) -> bool:
        """Whether all shards have taken their vectors, so that training may go on."""
        return self._whole is None or len(self._whole.versions) == self._shards

    def plan(
        self,
        step: int,
        describe: Callable[..., schema.CheckpointInfo],
        objective_state: Mapping[str, np.ndarray],
    ) -> int:
        """Plan a checkpoint, and return its identity; all shards are then to :meth:`begin` it.

        Parameters
        ----------
        step
            Of the run.
        describe
            Makes the description from ``shard_versions``, the versions of all shards.
        objective_state
            What an objective of the user's own has beside its parameters, by name.
        """
        kept = {name: np.array(values) for name, values in objective_state.items()}
        self._whole = _Whole(step, secrets.randbits(32), describe, kept)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if self._shards > 1 or self._compression != "none":
                leftovers.note(self._path, digits(self._whole.identity))
        except OSError as error:
            text = f"{self._path.parent}: checkpoints cannot be written here: {error.strerror}"
            failed = DiskFailed(f"{text}; {retention.kept(self._path.parent)}")
            self._whole = None
            raise failed from error
        return self._whole.identity

    def begin(
        self, step: int, identity: int, vectors: Mapping[str, np.ndarray], version: int, *, last: bool = False
    ) -> None:
        """Begin as a shard does; a shard alone writes the whole checkpoint."""
        whole = self._whole
        assert whole is not None
        self._dtype = vectors[schema.PARAMETERS].dtype
        if self._shards > 1 or self._compression != "none":
            super().begin(step, identity, vectors, version, last=last)
            return
        self._identity = identity
        self.report({"taken": version})
        path, info = self._path, whole.info
        assert info is not None

        def write(snapshot: Snapshot, moved: Callable[[], None]) -> Path:
            layout, state = self._arrangement.layout, whole.objective_state
            with CheckpointWriter(path, layout, tuple(vectors), self._dtype, state) as writer:
                write_shard_alone(writer, self._arrangement, snapshot, checking(moved))
                return writer.commit(info, self._section.keep, self._confirm)

        self._last = self.start(vectors, write, last)

    def poll(self) -> bool:
        """Go on as a shard, hear the others, and write the whole; return whether anything moved."""
        moved = super().poll()
        while self._receive():
            moved = True
        whole = self._whole
        if whole is None:
            return moved
        if self._last is not None:
            return self._last.moved() or moved
        if self._all_reported(whole) and not whole.problems:
            self._last = Background(self._write_whole)
        return moved

    def result(self) -> Path | None:
        """Return the path of the checkpoint if it is written by now, else None.

        Raises
        ------
        DiskFailed, RunFailed
            If it could not be written, or is not to be.  What there was of it is removed.
        """
        whole, last = self._whole, self._last
        if whole is None:
            return None
        if not (last.done if last is not None else whole.problems and self._all_reported(whole)):
            return None
        path = self._path
        self._whole = self._last = None
        whole.waited = max(whole.waited, self.drop())
        try:
            if last is not None:
                written = last.result()
                with suppress(OSError):  # moved away with its directory, and whole
                    of_shards = 0 if self._single else sum(each.size for each in whole.facts.values())
                    self.size = written.stat().st_size + of_shards
                self.seconds, self.waited = time.monotonic() - whole.began, whole.waited
                self.written, self.versions = written, whole.versions
                return written
            problems = list(whole.problems.values())
            raise next((each for each in problems if not isinstance(each, DiskFailed)), problems[0])
        except NotFinite:
            self._remove(path, whole.identity)
            raise self._not_finite(whole.step) from None
        except Exception:
            self._remove(path, whole.identity)
            raise

    def has_written(self, step: int) -> bool:
        """Whether the last checkpoint is of that `step`."""
        return self.written == directory.checkpoint_path(self._directory, step)

    def awaited(self) -> str:
        """Name the shards that the checkpoint waits for."""
        whole = self._whole
        done = {*self._numbers.values()} if whole is None else {*whole.facts, *whole.problems}
        late = [f"shard {number} on rank {rank}" for rank, number in self._numbers.items() if number not in done]
        return f"{', '.join(late)} to write into a checkpoint" if late and self._shards > 1 else "the disk"

    def close(self) -> None:
        """Abandon what is being written, and remove it."""
        super().close()
        whole, last = self._whole, self._last
        if last is not None:
            last.abandon()
        if whole is not None and (last is None or last.done):
            self._remove(self._path, whole.identity)
        self._whole = self._last = None

    @property
    def _path(self) -> Path:
        assert self._whole is not None
        return directory.checkpoint_path(self._directory, self._whole.step)

    def _all_reported(self, whole: _Whole) -> bool:
        return len(whole.facts) + len(whole.problems) == self._shards

    def _remove(self, path: Path, identity: int) -> None:
        """Remove the files of all shards, unless they have become a checkpoint after all."""
        with suppress(OSError):
            leftovers.discard(path, digits(identity))

    def _confirm(self) -> None:
        """Raise RunFailed if another run has taken the directory over."""
        run_lock.confirm(self._directory)

    def report(self, report: dict[str, Any]) -> None:
        """Take the `report` of this shard."""
        self._hear({"shard": 0, "identity": self._identity, **report})

    def _receive(self) -> bool:
        """Hear a report of another shard, if one has arrived; return whether there was one."""
        from mpi4py import MPI

        status = MPI.Status()
        if self._arriving is None:
            if self._shards == 1 or not failures.probe(self._comm, Tag.CHECKPOINT, status):
                return False
            data = np.empty(status.Get_count(MPI.BYTE), np.uint8)
            request = self._comm.Irecv([data, MPI.BYTE], status.source, Tag.CHECKPOINT)
            self._arriving = request, data
        (request, data), self._arriving = self._arriving, None  # also where its sender has died
        if not request.Test():
            self._arriving = request, data
            return False
        self._hear(json.loads(data.tobytes()))
        return True

    def _hear(self, report: Mapping[str, Any]) -> None:
        """Note what a shard reports of this checkpoint."""
        whole, shard = self._whole, report["shard"]
        if whole is None or report["identity"] != whole.identity:
            return
        if "taken" in report:
            whole.versions[shard] = report["taken"]
            if self.taken:
                whole.info = whole.describe(
                    shard_versions=tuple(whole.versions[number] for number in range(self._shards))
                )
        elif "written" in report:
            whole.facts[shard] = ShardFacts.from_json(report["written"])
            whole.waited = max(whole.waited, report["waited"])
        elif "failed" in report:
            whole.problems[shard] = DiskFailed(f"{report['failed']}; {retention.kept(self._path.parent)}")
        elif "not_finite" in report:
            whole.problems[shard] = NotFinite()

    def _write_whole(self, moved: Callable[[], None]) -> Path:
        """Write the file that makes those of the shards a checkpoint, or one file of them all."""
        whole, arrangement, section = self._whole, self._arrangement, self._section
        assert whole is not None
        assert whole.info is not None
        facts = [whole.facts[shard] for shard in range(self._shards)]
        path, layout, identity = self._path, arrangement.layout, digits(whole.identity)
        if self._single:
            vectors = tuple(facts[0].offsets)
            with CheckpointWriter(path, layout, vectors, self._dtype, whole.objective_state) as writer:
                write_together(writer, arrangement, facts, identity, moved)
                writer.commit(whole.info, section.keep, self._confirm)
            with suppress(OSError):  # the next start removes them
                leftovers.discard(path, identity)
            return path
        return write_whole(
            path,
            layout,
            shard_boxes.of_arrangement(arrangement),
            facts,
            identity,
            whole.info,
            dtype=self._dtype,
            keep=section.keep,
            objective_state=whole.objective_state,
            compression=self._compression,
            confirm=self._confirm,
            moved=moved,
        )


def unusable(run_directory: Path, step: int, *, advice: str = "") -> RunFailed:
    """Return the exception for parameters that are NaN or infinite after a `step`, of which a run writes none.

    It names the newest checkpoint in `run_directory`, and ends with the `advice`.
    """
    way_on = "; ".join(filter(None, (retention.kept(run_directory / "checkpoints"), advice)))
    return RunFailed(f"after {step} steps some parameters are NaN or infinite; no checkpoint is written; {way_on}")
