"""Ranks that serve as shards inside one call, for an ordinary training script on all others."""

from __future__ import annotations

import atexit
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from dbmpi.config import ServerSection
from dbmpi.errors import KnownToAll, RunFailed, ToldElsewhere, UserError
from dbmpi.index.layout import Layout, Tensor
from dbmpi.kernels.announce import stderr_line
from dbmpi.loops import choice
from dbmpi.loops.agreement import agree, planned
from dbmpi.loops.connection import ADVICE, Connection
from dbmpi.mpi import blocking, waiting
from dbmpi.mpi.watch import Watch
from dbmpi.mpi.world import aborting, end_all_on_failure, everybody, together

if TYPE_CHECKING:
    from mpi4py import MPI

    from dbmpi.mpi.topology import Plan

_CONNECT, _LEAVE = 1, 0


def serve(comm: MPI.Intracomm | None = None, *, shards: int = 1) -> bool:
    """Make some ranks the shards of the parameter servers of this program (collective).

    On those ranks it serves until all other ranks have ended, and returns True: the program has nothing more to do
    there.  On all others, the workers, it returns False at once, and every :class:`ParameterServer` that they make of
    ``comm=None``, or optimizer of ``dbmpi.torch``, uses these shards.  One process alone is a worker, and holds its
    parameters itself.

    With one shard it is the first rank; several are spread evenly over the ranks.

    Parameters
    ----------
    comm : MPI.Intracomm, optional
        The ranks to use; by default all that were started, or this process alone.
    shards : int
        Number of ranks that serve.

    Returns
    -------
    bool
        Whether this rank was a shard, and has served.

    Raises
    ------
    UserError
        On all ranks, for a mistake in the arguments, or at a second call.

    Examples
    --------
    >>> import dbmpi
    >>> def main():
    ...     if dbmpi.serve(shards=1):
    ...         return
    ...     print("train here")
    >>> main()
    train here
    """
    if comm is None:
        comm = everybody()
    elif comm.size > 1:
        end_all_on_failure(comm)
    own = blocking.duplicate(comm, "all ranks to call serve")
    try:
        with together(own, "looking at the arguments"):
            if Service.current is not None:
                raise UserError("serve: it was called before: once makes shards for all parameter servers of a program")
            plan = planned(own.size, shards, colocate=False)
        agree(own, json.dumps([{}, "", f"shards = {shards}", "", ""]), 0)
    except KnownToAll:
        blocking.free(own)
        raise
    if own.size == 1:
        blocking.free(own)
        return False
    service = Service(own, plan)
    if plan.shard_of(own.rank) is None:
        Service.current = service
        service.at_exit = atexit.register(aborting(service.leave))
        return False
    service.serve()
    return True


class Service:
    """The ranks that serve and those that use them.

    Parameters
    ----------
    comm
        All of them, a communicator of dbmpi's own.
    plan
        The role of each.

    Attributes
    ----------
    current
        On a worker, that of this program, if it has one.
    at_exit
        What is registered for the end of the process.
    """

    current: ClassVar[Service | None] = None

    def __init__(self, comm: MPI.Intracomm, plan: Plan) -> None:
        self._comm, self.plan = comm, plan
        self._root = plan.worker_ranks[0]
        self._connections: list[tuple[Connection, Iterator[bool]]] = []
        self._polling = False
        self.at_exit: Callable[[], None] = self.leave

    def connect(self) -> MPI.Intracomm:
        """Ask the shards for another parameter server, and return the communicator (collective over the workers)."""
        self._announce(_CONNECT)
        return self._comm

    def leave(self) -> None:
        """Let the shards end (collective over the workers); a second call does nothing."""
        if Service.current is not self:
            return
        Service.current = None
        atexit.unregister(self.at_exit)
        self._announce(_LEAVE)
        blocking.free(self._comm)

    def serve(self) -> None:
        """Serve until the workers leave (collective over the shards)."""
        with Watch(self._comm, ADVICE), waiting.serving(self._poll):
            while True:
                word = np.zeros(1, np.int64)
                request = self._comm.Ibcast(word, self._root)
                waiting.complete(request, "the workers to end", serve=self._advance, seconds=waiting.LONG_SECONDS)
                if word[0] == _LEAVE:
                    break
                self._open()
        blocking.free(self._comm)

    def _announce(self, kind: int) -> None:
        word = np.array([kind], np.int64)
        request = self._comm.Ibcast(word, self._root)
        waiting.complete(request, "the other workers", seconds=waiting.LONG_SECONDS)
        if word[0] != kind:
            does = "makes another ParameterServer" if kind == _CONNECT else "has ended"
            raise RunFailed(f"rank {self._comm.rank} {does}, and rank {self._root} does not: all workers must alike")

    def _open(self) -> None:
        """Open a parameter server with the workers, which check the arguments."""
        comm = blocking.duplicate(self._comm, "the workers to make the ParameterServer")
        try:
            with together(comm, "looking at the arguments"):
                pass
            arrays, rule, _, section, checkpoint = json.loads(agree(comm, "", self._root))
            with together(comm, "reading the rule"):  # which the workers can print a mistake of
                pass
            chosen = choice.read(rule)
            layout = Layout(tuple(Tensor(name, tuple(shape)) for name, (shape, _) in arrays.items()))
            dtype = np.dtype(next(dtype for _, dtype in arrays.values()))
            opened = Connection(comm, self.plan, layout, dtype, chosen, ServerSection.model_validate_json(section))
        except KnownToAll as error:
            _leave_to_the_workers(error)
            blocking.free(comm)
            return
        try:
            opened.begin(None, Path(checkpoint) if checkpoint else None)
        except KnownToAll as error:
            _leave_to_the_workers(error)
            return
        opened.settle()
        self._connections.append((opened, opened.ending()))

    def _poll(self) -> bool:
        """Apply what has arrived at any parameter server; return whether there was anything."""
        if self._polling:
            return False
        self._polling = True
        try:
            return sum([connection.poll() for connection, _ in self._connections]) > 0
        finally:
            self._polling = False

    def _advance(self) -> bool:
        """As `_poll`, and give back what all workers have closed."""
        moved = self._poll()
        for each in [each for each in self._connections if next(each[1])]:
            self._connections.remove(each)
            each[0].free()
            moved = True
        return moved


def _leave_to_the_workers(error: KnownToAll) -> None:
    """Report a mistake that this shard has noticed first; the workers end, or go on without what they asked for."""
    if not isinstance(error, ToldElsewhere):
        stderr_line("dbmpi", str(error))
