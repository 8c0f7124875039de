"""A checkpoint of what is left when shards have died, with their mirrors in their places."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dbmpi.downpour.replica_state import ReplicaState
from dbmpi.errors import RunFailed
from dbmpi.monitor.reports import RescueReport
from dbmpi.mpi import waiting
from dbmpi.mpi.mailbox import MessageKind
from dbmpi.mpi.watch import RanksMissing

if TYPE_CHECKING:
    from dbmpi.checkpoint.lead_saver import LeadSaver
    from dbmpi.downpour.replicas import Replicas
    from dbmpi.downpour.settlement import Settled
    from dbmpi.downpour.shard import Shard, ShardRole
    from dbmpi.monitor.progress import RunProgress
    from dbmpi.mpi.watch import Watch
    from dbmpi.session import Session

_A_MOMENT = 0.3
"""Seconds in which deaths become known that happen at the same time."""
_UNTIL_KNOWN = 5.0
"""Seconds in which the lead hears which rank has died, after another one has."""


@contextmanager
def rescued(watch: Watch, shard: Shard | None) -> Iterator[None]:
    """Where the block ends because a rank has died, let this rank's `shard` take part in a checkpoint of what is left.

    Parameters
    ----------
    watch
        Raises RanksMissing then, if it is told that the run rescues shards.
    shard
        None for a rank that has none.
    """
    if shard is None or not watch.rescues:
        yield
        return
    try:
        try:
            yield
        except Exception as error:
            watch.explain(error)
            raise
    except RanksMissing:
        with watch.only_noting():
            shard.rescue()
        raise


@dataclass(frozen=True, kw_only=True)
class Rescue:
    """What the lead does when the run cannot go on because shards have died.

    All replicas leave the run.  What they have pushed is settled among the shards that are left, as where a replica is
    halted, and these write a checkpoint, together with the mirrors.
    """

    session: Session
    """Everything that is known of the run."""
    role: ShardRole
    """The means of the lead's shard."""
    replicas: Replicas
    """Those of the run."""
    saver: LeadSaver
    """Writes the checkpoint."""
    progress: RunProgress
    """Shows what has become of it."""
    poll: Callable[[], bool]
    """Polls the lead's own shard."""

    def run(self, own: Shard, take: Callable[[], None]) -> None:
        """Write the checkpoint, if shards have died and all their mirrors are left; else say why there is none.

        Parameters
        ----------
        own
            The lead's.
        take
            Lets all shards take their vectors.
        """
        try:
            # A worker that is to be replaced is known already; others may have heard of a shard first.
            patience = _A_MOMENT if self.session.watch.dead else _UNTIL_KNOWN
            until = time.monotonic() + patience
            waiting.until(lambda: bool(self._dead()) or time.monotonic() > until, "deaths to be known", serve=self.poll)
            if self._dead():
                until = time.monotonic() + _A_MOMENT
                waiting.until(lambda: time.monotonic() > until, "further deaths to be known", serve=self.poll)
                self._run(self._dead(), own, take)
        except RunFailed as error:
            self.progress.warn(f"no checkpoint is written with the mirrors of shards that have died: {error}")

    def _run(self, dead: list[int], own: Shard, take: Callable[[], None]) -> None:
        began = time.monotonic()
        assert self.role.mirrors is not None
        for shard in dead:
            holder = self.role.mirrors.held_by[shard]
            if holder in dead:
                raise RunFailed(f"shard {shard} has died, and shard {holder}, which held its mirror")
        if self.replicas.settlement.busy:
            raise RunFailed("the pushes of a replica were just being settled")
        for shard in dead:
            self.replicas.tell_shards(MessageKind.RESCUE, shard)
            own.stand_in(shard)
        self.replicas.settlement.do_without(len(dead))
        for replica in self.replicas.which(ReplicaState.RUNNING):
            self.replicas.hold(replica)
        settled: list[Settled] = []
        self._until(dead, lambda: self._settle(settled))
        step = sum(self.replicas.learned)
        if self.saver.has_written(self.session.begin.step + step):
            return
        take()
        self._until(dead, lambda: self.saver.result() is not None)
        versions, name = self.saver.versions, self.saver.written.name
        alive = min(version for shard, version in versions.items() if shard not in dead)
        repeated = sum(done.partly for done in settled)
        for shard in dead:
            lacks = max(alive - versions[shard], 0)
            self.role.recorder.write(RescueReport(step, shard, lacks, repeated, name, time.monotonic() - began))
            self.progress.message(
                f"shard {shard} has died: checkpoint {name} is written with its mirror, which lacks {lacks:,} of its "
                "updates"
            )

    def _settle(self, settled: list[Settled]) -> bool:
        """Note what of the replicas' pushes counts, and add it to `settled`; return whether that is known of all."""
        for done in self.replicas.settlement.take():
            self.replicas.settled(done, ending=True)
            settled.append(done)
        return not self.replicas.settlement.busy

    def _dead(self) -> list[int]:
        """Return the numbers of the shards that have died."""
        dead = self.session.watch.dead
        return [shard for shard, rank in enumerate(self.session.plan.shard_ranks) if rank in dead]

    def _until(self, known: list[int], done: Callable[[], bool]) -> None:
        """Wait until something is done, while no further shard dies."""

        def over() -> bool:
            return done() or self._dead() != known

        waiting.until(over, "the other shards to write what is left", serve=self.poll)
        if self._dead() != known:
            raise RunFailed("a further shard has died meanwhile")
