"""The start of a run: from fresh parameters, or from the checkpoint of an earlier session."""

from __future__ import annotations

import tempfile
from collections.abc import Collection
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from mpi4py import MPI

from dbmpi.checkpoint import directory, leftovers
from dbmpi.checkpoint.meaning import Meaning, check_same_data
from dbmpi.checkpoint.reader import Checkpoint
from dbmpi.config import CheckpointSection, Run
from dbmpi.data.stream import Order, Stream
from dbmpi.errors import Damaged, UserError
from dbmpi.index.layout import Layout
from dbmpi.machine.endings import note_run
from dbmpi.monitor.records import next_session
from dbmpi.mpi import waiting
from dbmpi.mpi.world import together
from dbmpi.paramserver.rules import rule
from dbmpi.replica.own_state import OwnState
from dbmpi.runs.trained_network import load_state
from dbmpi.session import StartingPoint

_LEAD = 0
"""The rank of shard 0, which reads the run directory for all."""


class RunStart(NamedTuple):
    """Where a session begins, as all ranks know it."""

    begin: StartingPoint
    """The progress of earlier sessions, and the batches that are left."""
    checkpoint: Path | None
    """Where the parameters are; None: they are fresh."""
    session: int
    """Which start of the run this is, from 1."""


def find(
    run: Run, comm: MPI.Intracomm, replicas: int, layout: Layout, order: Order, meaning: Meaning | None = None
) -> RunStart:
    """Make the run directory, find the checkpoint to resume from, number the session (collective).

    Parameters
    ----------
    run
        The run, which that of the checkpoint must be compatible with.
    comm
        All ranks.
    replicas
        Number of replicas that will learn.
    layout, order, meaning
        Of the network's parameters and of the samples, which those of the checkpoint must match.

    Raises
    ------
    UserError
        On every rank, if the directory cannot be used or its checkpoint is that of another run.
    """
    path, notices = _find_checkpoint(run.run.directory, run.checkpoint, comm)
    session = np.zeros(1, np.int64)
    with together(comm, "numbering the session"):
        if comm.rank == _LEAD:
            session[0] = next_session(run.run.directory)
            note_run(run.run.directory)
    waiting.broadcast(comm, session, _LEAD, "the number of the session")
    if not path:
        begin = StartingPoint(Stream(order.batches))
    else:
        with together(comm, "reading the checkpoint"), Checkpoint.open(Path(path)) as checkpoint:
            checkpoint.expect(layout, what="network" if run.objective is None else "objective")
            info, vectors = checkpoint.info, checkpoint.vectors
            before = _check_same_order(run, info.configuration, order, info.total, Path(path))
            check_same_data(info.meaning, meaning, checkpoint=path, file=run.data.called)
            same_size = before.batch_size == order.batch_size
            begin = StartingPoint(
                Stream(before.batches, info.frontier, info.holes).recut(before, order),
                info.step,
                info.samples,
                info.done if len(info.done) == replicas and same_size else (),
                tuple(name for name in rule(run.optimizer, code=run.network.code).state_names if name not in vectors),
                begun=info.begun,
                earlier=info,
            )
    # Only now: a start that is refused changes nothing.
    with together(comm, "removing what a killed run has left"):
        if comm.rank == _LEAD:
            notices += _clean(run.run.directory / "checkpoints")
    return RunStart(replace(begin, notices=tuple(notices)), Path(path) if path else None, int(session[0]))


def begin_state(
    state: OwnState, begin: StartingPoint, checkpoint: Path | None, comm: MPI.Intracomm, first: int
) -> StartingPoint:
    """Let the state of an objective be that of the checkpoint, or of one worker, on all ranks (collective).

    Parameters
    ----------
    state
        That of the objective.
    begin
        Where the session starts; it is returned, with a notice if the checkpoint has no such state.
    checkpoint
        The one to resume from, if there is one.
    comm, first
        All ranks, and that of the first worker.
    """
    notice = ""
    with together(comm, "reading the state of the objective", seconds=waiting.LONG_SECONDS):
        if checkpoint is not None:
            with Checkpoint.open(checkpoint) as opened:
                notice = load_state(state, opened)
    if checkpoint is None or notice:
        state.broadcast(comm, first)
    return replace(begin, notices=(*begin.notices, notice)) if notice else begin


def _clean(folder: Path) -> tuple[str, ...]:
    """Remove what killed runs have left in a directory of checkpoints; return a notice of files that had arrays."""
    with suppress(OSError):  # they only need space
        removed = leftovers.clean(folder)
        if removed:
            files = f"{len(removed)} files of shards" if len(removed) > 1 else "a file of a shard"
            return (f"{folder}: removed {files} that a run had not made a checkpoint of, such as {removed[0].name}",)
    return ()


def _find_checkpoint(run_directory: Path, section: CheckpointSection, comm: MPI.Intracomm) -> tuple[str, list[str]]:
    """Return the path of the newest intact checkpoint, or ""; on the lead also notices for the user.

    All ranks verify a part of it each.  Damaged ones are set aside when a good one is found: until then another start
    would mistake the run for a new one.
    """
    damaged: list[Path] = []
    notices: list[str] = []
    while True:
        path = ""
        with together(comm, "preparing the run directory"):
            if comm.rank == _LEAD and (found := _newest(run_directory, section, damaged)) is not None:
                path = str(found.path)
                notices += [found.notice] if found.notice else []
        path = waiting.broadcast_text(comm, path, _LEAD, "the lead to look for a checkpoint")
        problem = ""
        if path:
            try:
                with Checkpoint.open(Path(path)) as checkpoint:
                    checkpoint.verify(comm.rank, comm.size)
            except UserError as error:
                problem = str(error)
        vote = np.array([comm.rank if problem else comm.size], np.int64)
        what = "the other ranks to verify the checkpoint"
        first = int(waiting.allreduce(comm, vote, MPI.MIN, what, seconds=waiting.LONG_SECONDS)[0])
        if first == comm.size:
            break
        notices.append(waiting.broadcast_text(comm, problem, first, what) + "; the run resumes from an earlier one")
        damaged.append(Path(path))
    if comm.rank == _LEAD and found is not None:
        for other in (*damaged, *found.damaged):
            directory.set_aside(other)
    return path, list(dict.fromkeys(notices))


class _Found(NamedTuple):
    """The checkpoint to resume from."""

    path: Path
    notice: str
    """Empty, or which newer ones cannot be read."""
    damaged: tuple[Path, ...]
    """Those of them that are torn or corrupt."""


def _newest(run_directory: Path, section: CheckpointSection, without: Collection[Path]) -> _Found | None:
    """Return the newest checkpoint that is not in `without`, if any; refuse to write into another run's directory."""
    try:
        for below in ("checkpoints", "records"):
            (run_directory / below).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=run_directory / below).close()
        existing = directory.checkpoints(run_directory / "checkpoints")
    except OSError as error:
        raise UserError(
            f"{run_directory}: cannot be used as the run directory ({error.strerror}); set "
            "run.directory to a path that you can write to"
        ) from None
    if not existing:
        return None
    if section.resume == "never":
        raise UserError(
            f"{run_directory}: already holds checkpoints, the newest {existing[0].name}, and nothing is overwritten; "
            'set checkpoint.resume = "auto" to resume from it, or run.directory to another path'
        )
    with Checkpoint.open(run_directory, without) as checkpoint:
        damaged = (path for path, error in checkpoint.unreadable.items() if isinstance(error, Damaged))
        return _Found(checkpoint.path, checkpoint.notice, tuple(damaged))


def _check_same_order(run: Run, stored: str, order: Order, total: int, path: Path) -> Order:
    """Refuse to resume where the numbers of the stream would mean other samples; return the order before.

    Its batches may be of another size where either run is by Sandblaster: portions are much larger than the batches of
    stochastic methods.

    `stored` is the description of the run that wrote the checkpoint, and `total` the number of its batches; `order` is
    that of the run that resumes.
    """
    before = Run.from_json(stored)
    same_size = "sandblaster" not in (before.optimizer.method, run.optimizer.method)
    sizes = (min(before.optimizer.batch_size, order.samples), order.batch_size)
    pairs = {
        "optimizer.batch_size": sizes if same_size else (0, 0),
        "run.seed": (before.run.seed, run.run.seed),
        "data.shuffle": ("samples" if before.data.shuffle == "auto" else before.data.shuffle, run.data.shuffle),
        "network.loss": (before.network.loss, run.network.loss),
        "objective.use": tuple(each.objective.use if each.objective else "none" for each in (before, run)),
    }
    for key, (then, now) in pairs.items():
        if then != now:
            raise UserError(
                f"{path}: was written with {key} = {then}, this run has {now}; "
                f"set it back, or start a new run in another run.directory"
            )
    earlier = Order(order.samples, min(before.optimizer.batch_size, order.samples), before.optimizer.epochs, order.seed)
    then = earlier.batches
    if then != total:
        raise UserError(
            f"{path}: was written by a run of {total} batches in {before.optimizer.epochs:g} epochs, but the "
            f"{order.samples} samples of {run.data.called} make {then}: it has learned from other data; "
            f"set data.train back, or start a new run in another run.directory"
        )
    return earlier
