"""A worker of a run by Sandblaster: its portions, and how the partitions of its replica act as one."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import suppress

import numpy as np
from mpi4py import MPI

from dbmpi.errors import RunFailed
from dbmpi.index.layout import pieces
from dbmpi.mpi import waiting
from dbmpi.mpi.failures import RankLost, Watch
from dbmpi.mpi.mailbox import Mailbox, MessageKind, Role
from dbmpi.mpi.window import Window
from dbmpi.paramserver.client import Client
from dbmpi.paramserver.protocol import Shards
from dbmpi.sandblaster.board import END
from dbmpi.sandblaster.replica import SAID, Portions
from dbmpi.sandblaster.setup import Setup
from dbmpi.sandblaster.shard import ShardSpace
from dbmpi.sandblaster.work import PortionWork

FOR_THE_LEAD = 1.25
"""Factor on the stall limit where a rank waits for the lead, which knows better which rank is late."""


class BatchWorker:
    """A worker of a replica that takes no further part when another one of its replica has died."""

    def __init__(self, setup: Setup, window: Window, number: int, space: ShardSpace | None) -> None:
        plan, rank = setup.plan, setup.comms.world.rank
        first = number - number % plan.partitions
        others = {*plan.worker_ranks[first : first + plan.partitions]} - {rank}
        polled = None if space is None or plan.shard_of(rank) == 0 else space.poll
        team = _Partitions(setup.comms.replica, others, setup.watch, polled)
        self._portions = _portions(setup, window, number, team)
        self._team, self._space, self._board = team, space, setup.board(window)
        self._on_lead = rank == 0

    @property
    def ended(self) -> bool:
        """Whether the run is over."""
        return self._portions.ended

    def poll(self) -> bool:
        """Do the next step; return whether there was any."""
        try:
            return self._portions.poll()
        except Exception:  # in whatever step of the exchange the loss of a partition was noticed
            if self._portions.given_up or not self._team.broken():
                raise
        self._portions.give_up()
        return True

    def let_lead_write(self, mailbox: Mailbox) -> None:
        """Before this worker fails, let the lead write a checkpoint of what has been learned; return when it has.

        It also returns where the run is over, where this rank's shard cannot take part or is the lead's, whose
        coordinator sees the failure itself, and where nothing moves.
        """
        space = self._space
        if self.ended or self._on_lead or (space is not None and not space.whole):
            return
        with suppress(RunFailed):
            mailbox.send(0, Role.SHARD, MessageKind.FAILED)
            waiting.until(
                lambda: mailbox.receive() is not None or self._board.number() == END,
                "the lead to write a last checkpoint",
                serve=None if space is None else space.poll,
                seconds=FOR_THE_LEAD * waiting.STALL_SECONDS,
                longest_nap=0.01,
            )


def _portions(setup: Setup, window: Window, number: int, team: _Partitions) -> Portions:
    run, plan = setup.run, setup.plan
    assert setup.data.train is not None
    assert setup.replica is not None
    place, partition = divmod(number, plan.partitions)
    serve = team.serve
    setup.replica.serve_while_waiting(serve)
    runs = setup.stretches[partition]
    shards = Shards(window=window, memories=setup.memories, ranks=plan.shard_ranks, ranges=setup.ranges)
    client = Client(shards, number, stretches=runs, serve=serve)
    # Batches of all samples are the same portions in every pass.
    again = not run.sandblaster.batch_portions
    work = PortionWork(
        setup.replica,
        client,
        setup.order,
        setup.data.train,
        setup.data.test,
        recorder=setup.recorder("worker", number),
        report_seconds=run.monitor.report_seconds,
        replica=place,
        stride=plan.replicas if run.sandblaster.deterministic else 1,
        partition=partition,
        keep_bytes=setup.data.train.spare_bytes if again else 0,
        partitions=plan.partitions,
        layer_seconds=setup.replica.seconds,
    )
    takers = [shard for shard, its in enumerate(pieces(runs, setup.ranges)) if any(piece.pushed for piece in its)]
    return Portions(
        setup.board(window),
        window,
        setup.bundles(number),
        place,
        partition,
        takers,
        work,
        setup.per_bundle,
        run.sandblaster.deterministic,
        team.agree,
        team.gather,
        team.wait,
    )


class _Partitions:
    """How the partitions of a replica act as one.

    Parameters
    ----------
    comm
        The partitions.
    others
        Where the others are in the world.
    serve
        What else this rank does while it waits for them.
    """

    def __init__(
        self, comm: MPI.Intracomm, others: Collection[int], watch: Watch, serve: Callable[[], bool] | None
    ) -> None:
        self._comm, self._others, self._watch, self._serve_too = comm, others, watch, serve
        self._words = np.zeros(SAID, np.int64)
        self._request: MPI.Request | None = None

    def serve(self) -> bool:
        """Do other duties in a wait for the other partitions; RankLost where it would be in vain."""
        self._check()
        return self._serve_too is not None and self._serve_too()

    def broken(self) -> bool:
        """Whether one of the others has died."""
        self._watch.look(now=True)
        return not self._watch.dead.isdisjoint(self._others)

    def _check(self) -> None:
        if not self._watch.dead.isdisjoint(self._others):
            raise RankLost("a partition of this replica has died")

    def agree(self, numbers: list[int] | None) -> list[int] | None:
        """Bring what partition 0 says to all partitions."""
        if self._comm.size == 1:
            return numbers
        if self._comm.rank == 0:
            if numbers is None:
                return None
            self._words[:] = 0
            self._words[: len(numbers)] = numbers
            request = self._comm.Ibcast(self._words, 0)
            waiting.complete(request, "the other partitions of this replica", serve=self.serve)
        else:
            self._check()
            if self._request is None:
                self._request = self._comm.Ibcast(self._words, 0)
            if not self._request.Test():
                return None
            self._request = None
        return [int(word) for word in self._words]

    def gather(self) -> None:
        """Wait until all partitions have come here."""
        if self._comm.size > 1:
            waiting.barrier(self._comm, "the other partitions of this replica", serve=self.serve)

    def wait(self, condition: Callable[[], bool]) -> None:
        """Wait for a condition."""
        waiting.until(condition, "the shards to take a gradient", serve=self.serve)
