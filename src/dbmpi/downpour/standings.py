"""How all replicas and evaluators of a run stand."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dbmpi.downpour.replica_state import ReplicaState, Standing

if TYPE_CHECKING:
    from dbmpi.mpi.topology import Plan


class Standings:
    """What the lead knows of all replicas, and behind them of the evaluators, which have nothing to learn.

    Parameters
    ----------
    plan
        How many there are.
    samples_before
        Samples of earlier sessions.

    Attributes
    ----------
    standings
        How each of them stands.
    """

    def __init__(self, plan: Plan, samples_before: int) -> None:
        self._replicas, self._samples_before = plan.replicas, samples_before
        self.standings = [Standing() for _ in range(plan.replicas)]
        self.standings += [Standing(ReplicaState.FINISHED) for _ in range(plan.evaluators)]

    @property
    def learned(self) -> list[int]:
        """Batches of this session that count, by replica."""
        return [one.learned for one in self.standings]

    @property
    def samples(self) -> int:
        """Samples of these batches."""
        return sum(one.samples for one in self.standings)

    @property
    def reported_samples(self) -> int:
        """Samples that have been reported in this session, also those that are not applied everywhere yet."""
        return sum(one.reports.samples for one in self.standings)

    @property
    def samples_so_far(self) -> int:
        """The same, and those of earlier sessions."""
        return self._samples_before + self.reported_samples

    @property
    def living(self) -> list[int]:
        """Replicas that are not given up."""
        return [replica for replica in self._present if replica < self._replicas]

    @property
    def testers(self) -> list[int]:
        """Those that evaluate held-out samples at the end: evaluators, or replicas where none is left."""
        return [one for one in self._present if one >= self._replicas] or self.living

    @property
    def _present(self) -> list[int]:
        return self.which(ReplicaState.RUNNING, ReplicaState.PAUSED, ReplicaState.FINISHED)

    @property
    def lost(self) -> list[int]:
        """Replicas, and evaluators, that are given up."""
        return self.which(ReplicaState.LOST)

    @property
    def waited(self) -> float:
        """Share of the workers' time that they have waited for the shards."""
        return sum(one.waited for one in self.standings) / max(sum(one.spent for one in self.standings), 1e-9)

    @property
    def over(self) -> bool:
        """Whether no replica learns any more."""
        return not self.which(ReplicaState.RUNNING, ReplicaState.PAUSED)

    def which(self, *states: ReplicaState) -> list[int]:
        """Return the replicas in one of some `states`."""
        return [replica for replica, one in enumerate(self.standings) if one.state in states]
