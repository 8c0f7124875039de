"""Evaluations over shards and replicas, as the lead's rank drives them (paper, algorithm 1.2).

An evaluation is

1. the shards set the accrued gradient to zero, and *meet*, so that the point is complete on all of them;
2. the batch is put on the board; replicas fetch the point, draw portions, and commit sums of gradients;
3. the shards take each committed sum from the replica's memory and add it up;
4. the losses of the portions, which the replicas wrote down, are added up in their order.

Replicas that die meanwhile are done without, and a signal breaks it off.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn

import numpy as np
from mpi4py import MPI

from dbmpi.errors import EndedByDeath, RunFailed
from dbmpi.mpi import mailbox as mpi_mailbox
from dbmpi.mpi import waiting
from dbmpi.mpi.failures import RESUMING
from dbmpi.sandblaster.board import Board, PassKind
from dbmpi.sandblaster.commands import Command, RemoteSpace, execute
from dbmpi.sandblaster.passes import Passes, Station
from dbmpi.sandblaster.shard import COMMANDS, ShardSpace

if TYPE_CHECKING:
    from dbmpi.machine.signals import StopSignal
    from dbmpi.mpi.failures import Watch
    from dbmpi.mpi.mailbox import Mailbox
    from dbmpi.mpi.topology import Plan
    from dbmpi.mpi.window import Window


class Interrupted(Exception):
    """A signal asks for the end in the middle of an evaluation, or a worker has failed."""


class Evaluator:
    """Lets shards carry out commands, and replicas work through batches.

    Parameters
    ----------
    lead
        The lead's own shard.
    board, window, stations
        Where the replicas find their work, and where they leave it; see :class:`~dbmpi.sandblaster.passes.Passes`.
    ordered
        Whether gradients are added up in the order of the portions.
    watch
        Knows of ranks that have died.
    say
        Tells the user a line.
    serve
        What else this rank has to do while it waits: the work of a replica, where there is one on this rank.

    Attributes
    ----------
    space
        The vectors on the shards.
    passes
        How the last batch came to count.
    stopped_by
        Number of the signal that asks for the end; 0 without any.
    failed
        Rank of a worker that cannot take another step; None without any.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        plan: Plan,
        lead: ShardSpace,
        board: Board,
        window: Window,
        stations: Sequence[Sequence[Station]],
        *,
        ordered: bool,
        mailbox: Mailbox,
        stop: StopSignal,
        watch: Watch,
        say: Callable[[str], None],
        serve: Callable[[], bool],
    ) -> None:
        self._comm, self._plan, self._lead, self._board = comm, plan, lead, board
        self._mailbox, self._stop, self._watch, self._say = mailbox, stop, watch, say
        self._serve_others = serve
        self._mourned: set[int] = set()
        self._leaving: list[tuple[MPI.Request, np.ndarray]] = []
        self._gradient = ""
        self.space = RemoteSpace(self.submit, lead.names)
        self.passes = Passes(board, window, stations, self._accrue, ordered=ordered)
        self.stopped_by = 0
        self.failed: int | None = None

    @property
    def interrupted(self) -> bool:
        """Whether the run ends here, because of a signal or a worker that has failed."""
        return bool(self.stopped_by) or self.failed is not None

    def gradient(self, name: str, portions: range, samples: int, place: int) -> float:
        """Accrue the gradient of some portions of the stream in a vector; return the seconds it took.

        Parameters
        ----------
        name
            Of the vector.
        samples
            Of these portions.
        place
            In the stream, see :class:`~dbmpi.sandblaster.board.PostedBatch`.

        Raises
        ------
        Interrupted
            If a signal asks for the end, or a worker has failed.
        EndedByDeath
            If nobody is left to compute it.
        """
        self._gradient = name
        while True:
            self.space.create(name)
            seconds = self._pass(PassKind.GRADIENT, len(portions), portions.start, samples, place)
            if not (self._watch.on and self.submit(Command("meet", (), ())).any()):
                return seconds
            self._say("what a dead replica had delivered is out of reach: the evaluation begins anew")

    def test(self, portions: int, samples: int, place: int) -> None:
        """Evaluate the held-out samples; raises as :meth:`gradient` does."""
        self._pass(PassKind.TEST, portions, 0, samples, place)

    def submit(self, command: Command) -> np.ndarray:
        """Let all shards carry out a command; return what the lead's shard says, which is what they all say."""
        data = np.frombuffer(command.encode(), np.uint8)
        self._leaving = [(request, sent) for request, sent in self._leaving if not request.Test()]
        for rank in self._plan.shard_ranks[1:]:
            self._leaving.append((self._comm.Isend([data, MPI.BYTE], rank, COMMANDS), data))
        return execute(self._lead, command)

    def serve(self) -> bool:
        """Do what is due on this rank; return whether there was anything."""
        self._watch.check()
        if len(self._watch.dead) > len(self._mourned):
            self._mourn()
        moved = self.passes.poll()
        while (message := self._mailbox.receive()) is not None:
            if message.kind == mpi_mailbox.MessageKind.STOP_ASKED:
                self._stop_asked(message.values[0])
            elif message.kind == mpi_mailbox.MessageKind.FAILED and self.failed is None:
                self.failed, worker = message.source, self._plan.worker_of(message.source)
                assert worker is not None
                replica = worker // self._plan.partitions
                self._say(f"replica {replica} has failed: a checkpoint is written, and the run ends")
        if self._stop.number:
            self._stop_asked(self._stop.number)
        return self._serve_others() or moved

    def end(self) -> None:
        """Let shards and replicas end.

        Raises
        ------
        RunFailed
            If a worker has failed: that one says why, and ends the job meanwhile.
        """
        if self.failed is not None:
            self._end_by(self.failed)
        self.submit(Command("end", (), ()))
        self._board.end()
        for request, _ in self._leaving:
            waiting.complete(request, "the last commands to leave")

    # Helpers

    def _pass(self, kind: PassKind, portions: int, first: int, samples: int, place: int) -> float:
        """Let the replicas work through a batch; return the seconds it took."""
        self.submit(Command("meet", (), ()))
        began = time.monotonic()
        self.passes.begin(kind, portions, first, samples, place)
        waiting.until(lambda: self.passes.finished or self.interrupted, self.passes.awaited, serve=self.serve)
        if not self.passes.finished:
            raise Interrupted
        return time.monotonic() - began

    def _accrue(self, replica: int, bundle: int) -> None:
        self.submit(Command("accrue", (self._gradient,), (float(replica), float(bundle))))

    def _mourn(self) -> None:
        """Go on without the replicas of which a rank has died."""
        plan, lost = self._plan, self.passes.lost
        for rank in sorted(self._watch.dead - self._mourned):
            self._mourned.add(rank)
            worker = plan.worker_of(rank)
            assert worker is not None
            replica = worker // plan.partitions
            self.passes.give_up(replica)
            left = plan.replicas - len(lost)
            if not left:
                raise EndedByDeath(f"{self._watch.name(rank)} has died, and with it the last replica.  {RESUMING}")
            self._say(
                f"{self._watch.name(rank)} has died, and with it replica {replica}: what it had not delivered is "
                f"handed out again, and the run goes on with {left} of {plan.replicas} replicas"
            )

    def _end_by(self, rank: int) -> NoReturn:
        """Leave it to a worker to end the job; the others go on waiting, and have nothing to say."""
        self._mailbox.send(rank, mpi_mailbox.Role.WORKER, mpi_mailbox.MessageKind.END)
        waiting.until(
            lambda: rank in self._watch.dead,
            f"the worker on rank {rank}, which has failed, to end the job",
            serve=lambda: self._mailbox.receive() is not None,
        )
        raise RunFailed("")

    def _stop_asked(self, number: int) -> None:
        if not self.stopped_by:
            self.stopped_by = number
            self._say(f"{signal.Signals(number).name}: the run ends here")
