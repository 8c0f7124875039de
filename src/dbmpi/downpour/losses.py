"""Replicas that are lost: noticed, told to the user, and recorded."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from dbmpi.downpour.stalls import Stalls
from dbmpi.monitor.reports import LossReport

if TYPE_CHECKING:
    from dbmpi.downpour.replicas import Replicas
    from dbmpi.monitor.records import Recorder
    from dbmpi.session import Session


class LostShare(NamedTuple):
    """What a replica that is given up had done, and what becomes of its share."""

    replica: int
    pushes: int
    dropped: int
    """Further pushes, which it had posted at least in part."""
    repeated: int
    """Of these, pushes that some shard has applied, at least in part, though their batches are learned again."""
    steps: int
    """Steps beyond those that count, which had been reported."""
    samples: int
    """Samples behind them."""
    left: int
    """Batches that others learn."""
    takers: tuple[int, ...]
    """These others."""


class Losses:
    """Gives up the replicas of which a rank has died, or is stalled.

    Parameters
    ----------
    session
        Everything that is known of the run.
    replicas
        Those of the run.
    recorder
        Writes a report of each loss.
    say
        Shows a line to the user.

    Attributes
    ----------
    stalls
        Listens to all ranks.
    """

    def __init__(self, session: Session, replicas: Replicas, recorder: Recorder, say: Callable[[str], None]) -> None:
        self._watch, self._replicas, self._plan = session.watch, replicas, session.plan
        self._recorder, self._say = recorder, say
        self._mourned: set[int] = set()
        self.stalls = Stalls(session.run.monitor, self._watch, self._plan, replicas, self.give_up, say)

    def mourn(self) -> None:
        """Give up the replicas of ranks that have died, or are stalled, since the last call."""
        self.stalls.check()
        for rank in sorted(self._watch.dead - self._mourned):
            self._mourned.add(rank)
            self.give_up(self._replicas.of(rank), f"{self._watch.name(rank)} has died")

    def give_up(self, replica: int, why: str) -> None:
        """Do without a replica from now on, and let others learn the rest of its share.

        Parameters
        ----------
        replica
            Number of the replica.
        why
            A clause for the user, e.g. that a rank has died.
        """
        if replica in self._replicas.lost:
            return
        plan = self._plan
        if replica < plan.replicas:
            left = len(self._replicas.living) - 1
            going = f"the run goes on with {left} of {plan.replicas} replicas" if left else "it was the last one"
        else:
            left = len([one for one in self._replicas.testers if one >= plan.replicas]) - 1
            going = f"{left} of {plan.evaluators} are left" if left else "nothing more is evaluated before the end"
        self._say(f"{why}, and with it {plan.name(replica)}: {going}")
        self._replicas.give_up(replica)

    def replace(self) -> None:
        """Let the run begin again from its last checkpoint, with new processes, where these can replace lost replicas.

        Raises
        ------
        RanksMissing
            On all ranks; not where a lost replica is only stalled.
        """
        lost = self._replicas.lost
        gone = all(self._watch.dead.intersection(self._plan.ranks_of(replica)) for replica in lost)
        if lost and gone and self._watch.replaces:
            self._watch.replace(f"{self._replicas.names(lost)} is missing")

    def tell(self, loss: LostShare, step: int) -> None:
        """Record and show what has become of a replica's work.

        Parameters
        ----------
        loss
            What is known now that its pushes are settled.
        step
            Steps of the session that count.
        """
        self._recorder.write(
            LossReport(
                step=step,
                lost=loss.replica,
                pushes=loss.pushes,
                dropped=loss.dropped,
                repeated=loss.repeated,
                left=loss.left,
                takers=loss.takers,
                role="replica" if loss.replica < self._plan.replicas else "evaluator",
            )
        )
        if loss.takers:
            others = f"replica{'s' if len(loss.takers) > 1 else ''} {', '.join(map(str, loss.takers))}"
            again = f", {loss.repeated:,} of them again in part" if loss.repeated else ""
            counts = f"{loss.pushes:,} pushes count; {loss.left:,} batches are left for {others}{again}"
            self._say(f"replica {loss.replica}: {counts}")
