"""A worker of a run by Sandblaster: its portions, and how it does without a replica that has lost a partition."""

from __future__ import annotations

from contextlib import suppress

from dbmpi.errors import EndedByDeath, EndedElsewhere, RunFailed
from dbmpi.index.layout import pieces
from dbmpi.mpi import failures, waiting
from dbmpi.mpi.failures import RankLost
from dbmpi.mpi.mailbox import Mailbox, MessageKind, Role
from dbmpi.mpi.window import Window
from dbmpi.paramserver.client import Client
from dbmpi.paramserver.protocol import ShardMap
from dbmpi.replica.team import Team
from dbmpi.sandblaster.board import END
from dbmpi.sandblaster.replica import Portions
from dbmpi.sandblaster.setup import Setup
from dbmpi.sandblaster.shard import ShardSpace
from dbmpi.sandblaster.work import PortionWork
from dbmpi.session import Session

FOR_THE_LEAD = 1.25
"""Factor on the stall limit where a rank waits for the lead, which knows better which rank is late."""


class BatchWorker:
    """A worker of a replica that takes no further part when another one of its replica has died.

    Where it fails itself, it lets the lead write a checkpoint first.

    Parameters
    ----------
    session, setup
        The run.
    window
        This rank's.
    number
        Of the worker.
    space
        The shard on this rank, if there is one.
    """

    def __init__(self, session: Session, setup: Setup, window: Window, number: int, space: ShardSpace | None) -> None:
        plan, rank = session.plan, session.comms.world.rank
        self._others = {*plan.ranks_of(number // plan.partitions)} - {rank}
        self._watch, self._space, self._board = session.watch, space, setup.board(window)
        self._on_lead, self._mailbox = rank == 0, Mailbox(session.comms.world, Role.WORKER)
        self._portions = self._deal(session, setup, window, number)

    @property
    def ended(self) -> bool:
        """Whether the run is over."""
        return self._portions.ended

    def poll(self) -> bool:
        """Do the next step; return whether there was any."""
        try:
            if not self._portions.given_up:
                self._check()
            return self._portions.poll()
        except Exception as error:  # in whatever step of the exchange the loss of a partition was noticed
            self._watch.check(now=True)
            if self._portions.given_up or self._watch.dead.isdisjoint(self._others):
                ended = isinstance(error, (EndedByDeath, EndedElsewhere, RankLost)) or failures.reports_death(error)
                if not ended:
                    self._let_lead_write()
                raise
        self._portions.give_up()
        return True

    def _let_lead_write(self) -> None:
        """Let the lead write a checkpoint of what has been learned; return when it has.

        It also returns where the run is over, where this rank's shard cannot take part or is the lead's, whose
        coordinator sees the failure itself, and where nothing moves.
        """
        space = self._space
        if self.ended or self._on_lead or (space is not None and not space.whole):
            return
        with suppress(RunFailed):
            self._mailbox.send(0, Role.SHARD, MessageKind.FAILED)
            waiting.until(
                lambda: self._mailbox.receive() is not None or self._board.number() == END,
                "the lead to write a last checkpoint",
                serve=None if space is None else space.poll,
                seconds=FOR_THE_LEAD * waiting.STALL_SECONDS,
                longest_sleep=0.01,
            )

    def _serve(self) -> bool:
        """Do other duties in a wait for the other partitions; RankLost where it would be in vain."""
        self._check()
        # The lead's own shard carries out commands as its coordinator sends them.
        return self._space is not None and not self._on_lead and self._space.poll()

    def _check(self) -> None:
        if not self._watch.dead.isdisjoint(self._others):
            raise RankLost("a partition of this replica has died")

    def _deal(self, session: Session, setup: Setup, window: Window, number: int) -> Portions:
        """Return this worker's part in the batches."""
        run, plan, batches = session.run, session.plan, session.batches
        assert batches is not None
        assert session.replica is not None
        replica, partition = divmod(number, plan.partitions)
        session.replica.serve_while_waiting(self._serve)
        stretches = setup.stretches[partition]
        shards = ShardMap(window=window, memories=setup.memories, ranks=plan.shard_ranks, ranges=setup.ranges)
        client = Client(shards, number, stretches=stretches, serve=self._serve)
        # Batches of all samples are the same portions in every pass, unless each is drawn anew after some.
        again = not (run.sandblaster.batch_portions or run.draws)
        work = PortionWork(
            session.replica,
            client,
            batches,
            session.data.test,
            log=session.log(number),
            stride=plan.replicas if run.sandblaster.deterministic else 1,
            keep_bytes=batches.source.storage.spare_bytes if again else 0,
            layer_seconds=session.replica.seconds,
        )
        held = pieces(stretches, setup.ranges)
        return Portions(
            self._board,
            window,
            Team(session.comms.replica, self._serve),
            work,
            replica=replica,
            bundles=setup.bundles(number),
            takers=[shard for shard, found in enumerate(held) if any(piece.pushed for piece in found)],
        )
