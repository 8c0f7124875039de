"""Settlement of what a replica has pushed, where it has died or does not come to rest.

All shards hold back its chunks, and say how far its pushes have come.  The lead takes the largest number of pushes that
all of them can apply whole; they apply these, and nothing more until they let the replica go on.  So its pushes are
whole or not there on all shards, but for what some had applied already; and the lead knows which of its batches count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from dbmpi.mpi.mailbox import MessageKind
from dbmpi.paramserver.server import Server
from dbmpi.paramserver.tally import PushProgress

_ANY = 2**62
"""Pushes that a shard can apply of a replica that pushes nothing to it."""


class HeldReplicas:
    """A shard's side.

    Parameters
    ----------
    server
        Applies the pushes.
    partitions
        Of a replica.
    pushing
        Numbers of the partitions that push to this shard.
    lead
        Whether this is the lead's shard, to which first partitions report their pushes.
    """

    def __init__(self, server: Server, partitions: int, pushing: Sequence[int], *, lead: bool) -> None:
        self._server, self._partitions, self._pushing, self._lead = server, partitions, pushing, lead
        self._due: list[tuple[int, int, bool]] = []
        self._forgone: dict[int, int] = {}
        self._ended: list[int] = []

    def hold(self, replica: int) -> PushProgress:
        """Apply nothing more of a `replica` for now; return how far its pushes have come here."""
        clients = self._clients(replica)
        for client in clients:
            self._server.hold(client)
        found = [self._server.progress(clients[partition]) for partition in self._pushing]
        if self._lead:
            reports = self._server.reports(clients[0])
            found.append(PushProgress(reports, reports, 0))
        return PushProgress(
            min((one.whole for one in found), default=_ANY),
            max((one.begun for one in found), default=0),
            max((one.touched for one in found), default=0),
        )

    def settle(self, replica: int, pushes: int, *, gone: bool, forgone: int = 0) -> None:
        """Apply that number of a replica's pushes, as soon as no push of another one is half applied.

        Parameters
        ----------
        replica, pushes
            Number of the replica, and of all its pushes that count.
        gone
            Whether nothing is applied of it afterwards.
        forgone
            Number of a round that is complete without its push, unless that has come; 0 for none.
        """
        self._due.append((replica, pushes, gone))
        self._forgone[replica] = forgone
        self.poll()

    def poll(self) -> bool:
        """Continue with what is to be settled; return whether all of it is."""
        for due in tuple(self._due):
            replica, pushes, gone = due
            done = [self._server.settle(client, pushes, gone=gone) for client in self._clients(replica)]
            if all(done):
                self._due.remove(due)
                forgone = self._forgone.pop(replica, 0)
                for client in self._clients(replica) if forgone else ():
                    self._server.forgo(client, forgone)
                self._ended += [replica] if gone else []
        return not self._due

    def take_ended(self) -> list[int]:
        """Return the replicas of which nothing more is applied, each once."""
        ended, self._ended = self._ended, []
        return ended

    def let_go(self, replica: int) -> None:
        """Apply what a `replica` pushes as before."""
        for client in self._clients(replica):
            self._server.let_go(client)

    def _clients(self, replica: int) -> range:
        return range(replica * self._partitions, (replica + 1) * self._partitions)


class Settled(NamedTuple):
    """What counts of the pushes of a replica."""

    replica: int
    gone: bool
    """Whether the replica is given up."""
    pushes: int
    """Pushes that count."""
    dropped: int
    """Pushes that were posted beyond, at least in part."""
    partly: int
    """Of these, pushes that some shard has applied, at least in part."""


class Settlement:
    """The lead's side.

    Parameters
    ----------
    shards
        How many there are.
    own
        The side of the lead's own shard.
    tell
        Sends a message of some kind and numbers to all other shards.
    leave
        Returns the round that goes on, and whether it is complete without the push of a replica that is given up.
    """

    def __init__(
        self, shards: int, own: HeldReplicas, tell: Callable[..., object], leave: Callable[[int], tuple[int, int]]
    ) -> None:
        self._shards, self._own, self._tell, self._leave = shards, own, tell, leave
        self._answers: dict[tuple[int, bool], list[PushProgress]] = {}
        self._settled: list[Settled] = []

    @property
    def busy(self) -> bool:
        """Whether anything is being settled."""
        return bool(self._answers or self._settled)

    def do_without(self, shards: int) -> None:
        """Settle from now on without so many `shards`, which have died."""
        self._shards -= shards

    def begin(self, replica: int, *, gone: bool) -> None:
        """Begin to settle what a replica has pushed.

        Parameters
        ----------
        replica
            Number of the replica.
        gone
            Whether it is given up.
        """
        self._answers[replica, gone] = []
        self._tell(MessageKind.HOLD, replica, gone)
        self.answered(replica, self._own.hold(replica), gone=gone)

    def answered(self, replica: int, progress: PushProgress, *, gone: bool) -> None:
        """Note how far a replica has come on one shard, and settle when all have answered.

        Parameters
        ----------
        replica, gone
            As for :meth:`begin`.
        progress
            What the shard has answered.
        """
        answers = self._answers[replica, gone]
        answers.append(progress)
        if len(answers) < self._shards:
            return
        del self._answers[replica, gone]
        pushes = min(one.whole for one in answers)
        begun, touched = max(one.begun for one in answers), max(one.touched for one in answers)
        number, less = self._leave(replica) if gone else (0, 0)
        forgone = number * less
        self._tell(MessageKind.SETTLE, replica, pushes, gone, forgone)
        self._own.settle(replica, pushes, gone=gone, forgone=forgone)
        self._settled.append(Settled(replica, gone, pushes, max(begun - pushes, 0), max(touched - pushes, 0)))

    def let_go(self, replica: int) -> None:
        """Let the shards apply what a `replica` pushes as before."""
        self._tell(MessageKind.LET_GO, replica)
        self._own.let_go(replica)

    def take(self) -> list[Settled]:
        """Return what has been settled since the last call, also on the lead's own shard."""
        if not (self._settled and self._own.poll()):
            return []
        settled, self._settled = self._settled, []
        return settled
