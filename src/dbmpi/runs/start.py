"""Where a run begins: at fresh parameters or where an earlier session ended, and how the shards come by them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from mpi4py import MPI

from dbmpi.checkpoint.directory import set_aside
from dbmpi.checkpoint.meaning import Meaning, check_same_data
from dbmpi.checkpoint.reader import Checkpoint
from dbmpi.config import Run
from dbmpi.data.stream import Order, Stream
from dbmpi.errors import UserError
from dbmpi.index.layout import Layout
from dbmpi.machine.endings import note_run
from dbmpi.monitor.records import next_session
from dbmpi.mpi import waiting
from dbmpi.mpi.world import together
from dbmpi.paramserver.rules import rule
from dbmpi.runs.resume import check_same_order, previous
from dbmpi.session import StartingPoint

_LEAD = 0
"""The rank of shard 0, which looks at the run directory for all."""


class RunStart(NamedTuple):
    """What all ranks know of where they begin."""

    begin: StartingPoint
    """What has been learned, and what is left."""
    checkpoint: Path | None
    """Where the parameters are; None: they are fresh."""
    session: int
    """Which start of the run this is, from 1."""


def find(
    run: Run, comm: MPI.Intracomm, replicas: int, layout: Layout, order: Order, meaning: Meaning | None = None
) -> RunStart:
    """Make the run directory, find the checkpoint to go on from, number the session (collective).

    Parameters
    ----------
    comm
        All ranks.
    replicas
        That will learn.
    layout, order, meaning
        Of the network's parameters and of the samples, which those of the checkpoint must be.

    Raises
    ------
    UserError
        On every rank, if the directory cannot be used or its checkpoint is that of another run.
    """
    path, notices = _find_checkpoint(run, comm)
    session = np.zeros(1, np.int64)
    with together(comm, "numbering the session"):
        if comm.rank == _LEAD:
            session[0] = next_session(run.run.directory)
            note_run(run.run.directory)
    waiting.broadcast(comm, session, _LEAD, "the number of the session")
    warmstart = run.optimizer.warmstart
    if not path:
        return RunStart(StartingPoint(Stream(order.batches), warmstart), None, int(session[0]))
    with together(comm, "reading the checkpoint"), Checkpoint.open(Path(path)) as checkpoint:
        checkpoint.expect(layout)
        info = checkpoint.info
        before = check_same_order(run, info.configuration, order, info.total, Path(path))
        check_same_data(info.meaning, meaning, checkpoint=path, file=str(run.data.train))
        same_size = before.batch_size == order.batch_size
        begin = StartingPoint(
            Stream(before.batches, info.frontier, info.holes).recut(before, order),
            max(0, warmstart - info.step),
            info.step,
            info.samples,
            info.done if len(info.done) == replicas and same_size else (),
            tuple(name for name in rule(run.optimizer).state_names if name not in checkpoint.vectors),
            notices,
        )
    return RunStart(begin, Path(path), int(session[0]))


def _find_checkpoint(run: Run, comm: MPI.Intracomm) -> tuple[str, tuple[str, ...]]:
    """Return the newest checkpoint that is what was written, or nothing; on the lead, with what there is to say.

    All ranks verify a part of it each.  Damaged ones are set aside when a good one is found: until then another start
    would take the run for a new one.
    """
    damaged: list[Path] = []
    notices: list[str] = []
    while True:
        path = ""
        with together(comm, "preparing the run directory"):
            if comm.rank == _LEAD and (found := previous(run, damaged)) is not None:
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
        notices.append(waiting.broadcast_text(comm, problem, first, what) + "; the run goes on from an earlier one")
        damaged.append(Path(path))
    if comm.rank == _LEAD and found is not None:
        for other in (*damaged, *found.damaged):
            set_aside(other)
    return path, tuple(dict.fromkeys(notices))
