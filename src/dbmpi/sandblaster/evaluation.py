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
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from dbmpi.errors import RunFailed
from dbmpi.mpi import mailbox as mpi_mailbox
from dbmpi.mpi import waiting
from dbmpi.mpi.mailbox import Mailbox
from dbmpi.sandblaster.board import PassKind
from dbmpi.sandblaster.commands import Command, RemoteSpace

if TYPE_CHECKING:
    import numpy as np

    from dbmpi.sandblaster.passes import Passes
    from dbmpi.sandblaster.shard import Shards
    from dbmpi.session import Session


class LastReplicaLost(RunFailed):
    """No replica is left."""


class Interrupted(Exception):
    """A signal asks for the end in the middle of an evaluation, or a worker has failed."""


class Evaluator:
    """Lets shards carry out commands, and replicas work through batches.

    Parameters
    ----------
    session
        The run.
    shards
        Carry out commands.
    passes
        The batches that replicas work through.
    say
        Tells the user a line.
    serve
        What else this rank has to do while it waits: the work of a replica, where there is one on this rank.

    Attributes
    ----------
    space
        The vectors on the shards.
    stopped_by
        Number of the signal that asks for the end; 0 without any.
    failed
        Rank of a worker that cannot take another step; None without any.
    """

    def __init__(
        self,
        session: Session,
        shards: Shards,
        passes: Passes,
        *,
        say: Callable[[str], None],
        serve: Callable[[], bool],
    ) -> None:
        self._shards, self.passes = shards, passes
        self._mailbox = Mailbox(session.comms.world, mpi_mailbox.Role.SHARD)
        self._stop, self._watch, self._say, self._serve_others = session.stop, session.watch, say, serve
        self._mourned: set[int] = set()
        self._gradient = ""
        self.space = RemoteSpace(shards.submit, shards.lead.names)
        self.stopped_by = 0
        self.failed: int | None = None

    @property
    def interrupted(self) -> bool:
        """Whether the run ends here, because of a signal or a worker that has failed."""
        return bool(self.stopped_by) or self.failed is not None

    def gradient(self, name: str, portions: range, samples: int, reached: int) -> float:
        """Accrue the gradient of some portions of the stream in a vector; return the seconds it took.

        Parameters
        ----------
        name
            Of the vector.
        samples
            Of these portions.
        reached
            Position in the stream, see :class:`~dbmpi.sandblaster.board.PostedBatch`.

        Raises
        ------
        Interrupted
            If a signal asks for the end, or a worker has failed.
        EndedByDeath
            If no replica is left to compute it.
        """
        self._gradient = name
        while True:
            self.space.create(name)
            seconds = self._pass(PassKind.GRADIENT, len(portions), portions.start, samples, reached)
            if not (self._watch.on and self._meet().any()):
                return seconds
            self._say("what a dead replica had delivered is out of reach: the evaluation begins anew")

    def test(self, portions: int, samples: int, reached: int) -> None:
        """Evaluate the held-out samples; raises as :meth:`gradient` does.

        Parameters
        ----------
        portions, samples
            Numbers of them.
        reached
            Position in the stream, for reports.
        """
        self._pass(PassKind.TEST, portions, 0, samples, reached)

    def serve(self) -> bool:
        """Do what is due on this rank; return whether there was anything."""
        self._watch.check()
        if len(self._watch.dead) > len(self._mourned):
            self._mourn()
        counting = self.passes.poll()
        for replica, bundle in counting or ():
            self._shards.submit(Command("accrue", (self._gradient, replica, bundle)))
        while (message := self._mailbox.receive()) is not None:
            if message.kind == mpi_mailbox.MessageKind.STOP_ASKED:
                self._stop.hear(message.values[0])
            elif message.kind == mpi_mailbox.MessageKind.FAILED and self.failed is None:
                self.failed = message.source
                replica_of = self._shards.plan.replica_of
                self._say(f"replica {replica_of(message.source)} has failed: a checkpoint is written, and the run ends")
        if self._stop.number:
            self._stop_asked(self._stop.number)
        return self._serve_others() or counting is not None

    def end(self) -> None:
        """Let shards and replicas end.

        Raises
        ------
        RunFailed
            If a worker has failed: that one says why, and ends the job meanwhile.
        """
        if self.failed is not None:
            self._end_by(self.failed)
        self.passes.end()
        self._shards.end()

    # Helpers

    def _pass(self, kind: PassKind, portions: int, first: int, samples: int, reached: int) -> float:
        """Let the replicas work through a batch; return the seconds it took."""
        self._meet()
        began = time.monotonic()
        self.passes.begin(kind, portions, first, samples, reached)
        waiting.until(lambda: self.passes.finished or self.interrupted, self.passes.awaited, serve=self.serve)
        if not self.passes.finished:
            raise Interrupted
        return time.monotonic() - began

    def _meet(self) -> np.ndarray:
        return self._shards.submit(Command("meet", ()))

    def _mourn(self) -> None:
        """Go on without the replicas of which a rank has died."""
        plan, lost = self._shards.plan, self.passes.lost
        for rank in sorted(self._watch.dead - self._mourned):
            self._mourned.add(rank)
            replica = plan.replica_of(rank)
            assert replica is not None
            self.passes.give_up(replica)
            left = plan.replicas - len(lost)
            if not left:
                raise LastReplicaLost(f"{self._watch.name(rank)} has died, and with it the last replica")
            self._say(
                f"{self._watch.name(rank)} has died, and with it replica {replica}: what it had not delivered is "
                f"handed out again, and the run goes on with {left} of {plan.replicas} replicas"
            )

    def give_up(self, failure: LastReplicaLost) -> NoReturn:
        """End the run on all ranks because of a `failure`."""
        self._watch.end(str(failure))

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
