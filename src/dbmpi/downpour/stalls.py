"""Ranks of which the lead hears nothing for long: named, and left alone, done without, or a reason to end."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from dbmpi.errors import Stalled

if TYPE_CHECKING:
    from dbmpi.config import MonitorSection
    from dbmpi.downpour.replicas import Replicas
    from dbmpi.mpi.topology import Plan
    from dbmpi.mpi.watch import Watch

_CHECKS = 16
"""How often silence is counted in the time after which a rank counts as stalled."""


class Stalls:
    """Listens for the heartbeats of all other ranks.

    Silence is counted from check to check, and little of it where the lead itself was suspended meanwhile.

    Parameters
    ----------
    section
        How long a rank may be silent, and what happens then.
    watch
        Knows of ranks that have died.
    plan
        Which rank plays which role.
    replicas
        Those of the run.
    give_up
        ``give_up(replica, why)`` does without a replica.
    say
        Shows a line to the user.
    """

    def __init__(
        self,
        section: MonitorSection,
        watch: Watch,
        plan: Plan,
        replicas: Replicas,
        give_up: Callable[[int, str], None],
        say: Callable[[str], None],
    ) -> None:
        self._limit = section.stall_timeout * (1 + 2 / _CHECKS)
        """Silence before which the rank itself has written where it is: beats and checks are a part of that apart."""
        self._section, self._watch, self._plan, self._replicas = section, watch, plan, replicas
        self._give_up, self._say = give_up, say
        self._silent = dict.fromkeys({*plan.shard_ranks, *plan.worker_ranks}, 0.0) if section.stall_timeout else {}
        self._checked = time.monotonic()

    def heard(self, rank: int) -> None:
        """Note that a `rank` beats."""
        if self._silent[rank] > self._limit:
            self._say(f"{self._name(rank)} is back after {self._silent[rank]:.0f} s")
        self._silent[rank] = 0.0

    def check(self) -> None:
        """Count the silence of all ranks that live, and react where one has been silent for too long.

        Raises
        ------
        Stalled
            If the run is to end.
        """
        limit, now = self._section.stall_timeout, time.monotonic()
        if now - self._checked < limit / _CHECKS or not self._silent:
            return
        passed, self._checked = min(now - self._checked, limit / 4), now
        for rank in sorted(self._silent.keys() - self._watch.dead):
            before = self._silent[rank]
            self._silent[rank] += passed
            if before <= self._limit < self._silent[rank]:
                self._react(rank)

    def may_end(self) -> bool:
        """Return whether no rank is silent that was done without: MPI ends with all ranks.

        Raises
        ------
        Stalled
            If one is for twice the time: it ends with the job, whose exit code is then that of a failure.
        """
        limit, lost = self._limit, self._replicas.lost
        ranks = {rank for replica in lost for rank in self._plan.ranks_of(replica)} - self._watch.dead
        silent = {self._silent[rank]: rank for rank in ranks if self._silent and self._silent[rank] > limit}
        if not silent:
            return True
        if max(silent) > 2 * limit:
            raise Stalled(
                f"everything is learned and in the last checkpoint, but {self._name(silent[max(silent)])} does not "
                "come back, and is ended with the job"
            )
        self._replicas.say_alive()
        return False

    def _react(self, rank: int) -> None:
        replica, reaction = self._plan.replica_of(rank), self._section.on_stall
        if replica in self._replicas.lost:
            return
        silent = f"{self._name(rank)} has been silent for {self._section.stall_timeout:g} s"
        if reaction == "drop" and replica is not None and self._plan.shard_of(rank) is None:
            self._give_up(replica, silent)
        elif reaction == "warn":
            self._say(f"warning: {silent}; unless its process is stopped, it writes where it is")
        else:
            raise Stalled(f"stalled: {silent}")

    def _name(self, rank: int) -> str:
        """Return the name of a rank with its roles, and how far its replica has come."""
        worker, shard = self._plan.worker_of(rank), self._plan.shard_of(rank)
        roles = [] if shard is None else [f"shard {shard}"]
        if worker is not None:
            replica, partition = divmod(worker, self._plan.partitions)
            steps = self._replicas.standings[replica].reports.steps
            part = f"partition {partition} of " if self._plan.partitions > 1 else ""
            after = "" if self._plan.evaluates(rank) else f", after {steps:,} steps"
            roles.append(f"{part}{self._plan.name(replica)}{after}")
        return f"rank {rank} ({', '.join(roles)})"
