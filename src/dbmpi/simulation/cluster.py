"""Virtual replicas and shards, and the order of what happens to them: Downpour as a queue of events.

A step of a replica: it fetches, which takes the parameters that the shards have when it begins, and one message on
their way back; it computes; it pushes, one message to each shard, where the push waits in line and is applied; and only
then it fetches again, as a real replica does that waits for its own pushes.  Nothing but these times is virtual:
gradients, updates and their order are those of real replicas that are as fast.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol

import numpy as np

from dbmpi.config import OptimizerSection, SimulationSection
from dbmpi.downpour.datapath import Push
from dbmpi.downpour.turns import Turns
from dbmpi.objective import Outcome
from dbmpi.simulation.gradients import VirtualGradients
from dbmpi.simulation.replica import VirtualLog, VirtualReplica
from dbmpi.simulation.shard import VirtualShard
from dbmpi.simulation.times import Times, VirtualClock

_STREAM = 0x73696D
"""Sets the random numbers of times apart from others that are made of the same seed."""


class Observer(Protocol):
    """Follows what happens."""

    def poll(self) -> bool:
        """Return whether the replicas are to finish; called after each event."""
        ...

    def computed(self, replica: VirtualReplica, log: VirtualLog, outcome: Outcome) -> None:
        """Note the `outcome` of a gradient of a `replica`, which is in its `log`."""
        ...

    def pushed(self, replica: VirtualReplica, log: VirtualLog, push: Push) -> None:
        """Note that all shards have taken a `push` of a `replica`; `log` is that of the replica."""
        ...

    def finished(self, replica: VirtualReplica, log: VirtualLog) -> None:
        """Note that a `replica`, whose `log` this is, learns nothing more."""
        ...


@dataclass(frozen=True, kw_only=True)
class ClusterTimes:
    """How long everything takes, drawn at random."""

    compute: Times
    network: Times
    service: Times
    slowness: Times

    @classmethod
    def from_config(cls, section: SimulationSection, seed: int, step: int) -> ClusterTimes:
        """Return the times of a session.

        Parameters
        ----------
        section
            Their distributions.
        seed
            Of the run.
        step
            Steps of all replicas before the session, which draws others than those before it.
        """
        sequences = np.random.SeedSequence([seed, step, _STREAM]).spawn(4)
        names = ("slowness", "compute", "network", "service")
        return cls(
            **{
                name: Times(getattr(section, name), np.random.Generator(np.random.Philox(sequence)))
                for name, sequence in zip(names, sequences, strict=True)
            }
        )


class VirtualCluster:
    """All replicas and shards.

    Parameters
    ----------
    shards
        The shards.
    shares
        For each replica, the numbers of the batches that it learns.
    gradients
        Computes them; it is given :meth:`computed`.
    section
        When replicas fetch and push.
    times
        How long everything takes.
    clock
        Is set when something happens.
    observer
        Follows it.
    steps
        Where each replica's count of steps begins.
    warmstart
        Batches that replica 0 learns alone.
    most_overlaps
        With how many others a turn of a replica may overlap; None where none waits.

    Attributes
    ----------
    replicas, shards
        All of them.
    """

    def __init__(
        self,
        shards: Sequence[VirtualShard],
        shares: Sequence[Iterator[int]],
        gradients: Callable[[Callable[[VirtualReplica, Outcome], object]], VirtualGradients],
        section: OptimizerSection,
        times: ClusterTimes,
        clock: VirtualClock,
        observer: Observer,
        *,
        steps: Sequence[int] = (),
        warmstart: int = 0,
        most_overlaps: int | None = None,
    ) -> None:
        self.shards = shards
        self._clock = clock
        begins = steps or [0] * len(shares)
        self.replicas = [
            VirtualReplica(number, share, times.slowness(), begin)
            for number, (share, begin) in enumerate(zip(shares, begins, strict=True))
        ]
        self._logs = [VirtualLog() for _ in self.replicas]
        self._gradients = gradients(self._computed)
        self._section, self._times, self._observer = section, times, observer
        self._bytes = 4 * shards[-1].held.stop
        self._warmstart, self._released = warmstart, warmstart == 0
        self._turns = None if most_overlaps is None else Turns(most_overlaps, len(shards), self._begin_turn)
        self._waiting: dict[int, VirtualReplica] = {}
        """Those that wait for the end of the warmstart, or for a turn."""
        self._stopping = False
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = count()

    @property
    def arrays(self) -> int:
        """Vectors as long as the parameters that were needed at the same time, the rule's state apart."""
        return max(shard.versioned.arrays for shard in self.shards) + self._gradients.arrays

    def run(self) -> None:
        """Let everything happen, until all replicas have finished."""
        self._stopping = self._observer.poll()
        for replica in self.replicas:
            self._proceed(replica)
        while self._events:
            self._clock.seconds, _, happen, arguments = heapq.heappop(self._events)
            happen(*arguments)
            if self._observer.poll() and not self._stopping:
                self._stop()

    def _at(self, when: float, happen: Callable[..., None], *arguments: Any) -> None:
        """Let something happen at a time; what happens at the same time does so in the order of these calls."""
        heapq.heappush(self._events, (when, next(self._order), happen, arguments))

    def _stop(self) -> None:
        """Let all replicas finish: those that compute or push do so after this step."""
        self._stopping = True
        waiting, self._waiting = list(self._waiting.values()), {}
        for replica in waiting:
            self._count_wait(replica)
            self._finish(replica)

    def _proceed(self, replica: VirtualReplica) -> None:
        """Begin the next step of a replica, unless it has to wait for others or has finished."""
        if self._stopping or replica.next_batch is None:
            self._finish(replica)
            return
        fetches = replica.fetches or replica.step % self._section.n_fetch == 0
        replica.fetches = fetches
        if not (self._released or replica.number == 0):
            self._wait(replica)
        elif fetches and self._turns is not None:
            self._end_turn(replica)
            self._wait(replica)
            replica.turn += 1
            self._turns.ask(replica.number, replica.turn)
        else:
            self._begin(replica)

    def _wait(self, replica: VirtualReplica) -> None:
        self._waiting[replica.number] = replica
        self._logs[replica.number].since = self._clock.seconds

    def _count_wait(self, replica: VirtualReplica) -> None:
        log = self._logs[replica.number]
        log.seconds["wait"] += self._clock.seconds - log.since

    def _begin_turn(self, number: int, turn: int) -> None:
        replica = self._waiting.pop(number, None)
        if replica is None:  # it is about to finish, which ends the turn
            return
        assert turn == replica.turn
        replica.in_turn = True
        self._count_wait(replica)
        self._begin(replica)

    def _end_turn(self, replica: VirtualReplica) -> None:
        if replica.in_turn and self._turns is not None:
            replica.in_turn = False
            self._turns.over(replica.number)

    def _begin(self, replica: VirtualReplica) -> None:
        """Begin a step: fetch if it is time, and find out when the gradient is there."""
        log, began, section = self._logs[replica.number], self._clock.seconds, self._section
        arrived = began
        if replica.fetches:
            self._release(replica)
            replica.held = [shard.versioned.hold() for shard in self.shards]
            replica.versions = [shard.version for shard in self.shards]
            replica.fetches = False
            arrived += max(self._times.network() for _ in self.shards)
            log.fetched(self._bytes, len(self.shards))
        replica.samples += self._gradients.size(replica.draw())
        done = arrived + replica.slowness * self._times.compute()
        log.seconds["fetch"] += arrived - began
        log.seconds["compute"] += done - arrived
        pushes = replica.step % section.n_push == 0
        if replica.steps or not pushes:
            self._gradients.learn(replica)
        if pushes:
            self._send(replica, done)
        else:
            self._at(done, self._end_step, replica)

    def _send(self, replica: VirtualReplica, when: float) -> None:
        """Push what is accrued at some time."""
        log = self._logs[replica.number]
        log.since = when
        log.pushed(self._bytes, len(self.shards))
        replica.pending = len(self.shards)
        for shard in self.shards:
            self._at(when + self._times.network(), self._queue, replica, shard)

    def _queue(self, replica: VirtualReplica, shard: VirtualShard) -> None:
        self._at(shard.queue(self._clock.seconds), self._apply, replica, shard)

    def _apply(self, replica: VirtualReplica, shard: VirtualShard) -> None:
        """Let a shard take a push; the first one needs the gradient."""
        if replica.push is None:
            if replica.steps == 0:
                self._gradients.learn(replica)
            replica.push = self._gradients.conclude(replica)
        number, gradient = shard.number, None
        if not replica.push.withheld:
            assert replica.gradient is not None
            gradient = replica.gradient[shard.held.start : shard.held.stop]
        shard.apply(gradient, replica.versions[number], replica.held[number], replica.samples)
        replica.pending -= 1
        if replica.pending == 0:
            self._take_back(replica, replica.push)

    def _take_back(self, replica: VirtualReplica, push: Push) -> None:
        """Go on after all shards have taken a push."""
        log = self._logs[replica.number]
        log.seconds["push"] += self._clock.seconds - log.since
        self._gradients.drop(replica)
        replica.learned += push.steps
        replica.withheld_in_a_row = replica.withheld_in_a_row + 1 if push.withheld else 0
        replica.fetches = push.withheld
        log.withheld += push.withheld
        self._observer.pushed(replica, log, push)
        if push.withheld or replica.finishing or (replica.step + 1) % self._section.n_fetch == 0:
            self._end_turn(replica)
            self._release(replica)
        if replica.number == 0 and replica.learned >= self._warmstart:
            self._release_all()
        if replica.finishing:
            self._end(replica)
        else:
            self._end_step(replica)

    def _end_step(self, replica: VirtualReplica) -> None:
        replica.step += 1
        self._proceed(replica)

    def _finish(self, replica: VirtualReplica) -> None:
        """Push what remains, unless it would become too stale, and end."""
        if replica.steps and (self._turns is None or replica.in_turn):
            replica.finishing = True
            self._send(replica, self._clock.seconds)
        else:
            self._gradients.drop(replica)
            self._end(replica)

    def _end(self, replica: VirtualReplica) -> None:
        """Learn nothing more."""
        self._release(replica)
        replica.in_turn = False
        if self._turns is not None:
            self._turns.over(replica.number)
        self._observer.finished(replica, self._logs[replica.number])
        if replica.number == 0:
            self._release_all()

    def _release_all(self) -> None:
        """Let all replicas learn, once the warmstart is over."""
        if self._released:
            return
        self._released = True
        waiting, self._waiting = list(self._waiting.values()), {}
        for replica in waiting:
            self._count_wait(replica)
            self._proceed(replica)

    def _release(self, replica: VirtualReplica) -> None:
        """Give up the parameters that a replica has fetched."""
        for shard, held in zip(self.shards, replica.held, strict=False):
            shard.versioned.release(held)
        replica.held = []
        self._gradients.stop_walking(replica)

    def _computed(self, replica: VirtualReplica, outcome: Outcome) -> None:
        log = self._logs[replica.number]
        log.count(outcome)
        self._observer.computed(replica, log, outcome)
