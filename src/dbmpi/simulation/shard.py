"""A shard in virtual time: pushes wait in line, and each is applied by the real rule when its turn is over."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import numpy as np

from dbmpi.paramserver.compensation import DelayCompensated
from dbmpi.paramserver.rules import Rule, State
from dbmpi.paramserver.schedule import Moment
from dbmpi.paramserver.tally import Tally
from dbmpi.simulation.versions import HeldVersion, VersionedParameters

if TYPE_CHECKING:
    from dbmpi.simulation.times import Times


class VirtualShard:
    """A range of the parameters, and what has been done to it.

    Parameters
    ----------
    number
        Of the shard.
    held
        The range of the flat vector.
    rule
        Applies the gradients.
    parameters
        Those of the range, flat; to be filled before :meth:`begin`.
    service
        Draws how long a push takes.
    discard_above
        Staleness above which a push is dropped; 0 for none.

    Attributes
    ----------
    number, held
        As given.
    versioned
        The parameters, and earlier versions that replicas hold.
    state
        The rule's named arrays.
    version, begun, samples
        Pushes applied so far; those before the state was begun; samples behind all pushes.
    tally
        The work since :meth:`take_tally`; its seconds are virtual.
    """

    def __init__(
        self,
        number: int,
        held: range,
        rule: Rule,
        parameters: np.ndarray,
        service: Times,
        discard_above: int = 0,
    ) -> None:
        self.number, self.held = number, held
        self.versioned = VersionedParameters(parameters)
        self.state: State = {}
        self.version = self.begun = self.samples = 0
        self.tally = Tally()
        self._rule, self._service, self._discard_above = rule, service, discard_above
        self._free = 0.0
        self._line: deque[float] = deque()
        """How long each push takes that is not applied."""

    @property
    def parameters(self) -> np.ndarray:
        """The present parameters, flat."""
        return self.versioned.values

    def begin(self, state: State | None, version: int = 0, *, begun: int = 0, samples: int = 0) -> None:
        """Start after :attr:`parameters` have been filled.

        Parameters
        ----------
        state, version, begun, samples
            As for :meth:`dbmpi.paramserver.server.Server.begin`.
        """
        self.state = self._rule.init(self.parameters) if state is None else state
        self.version, self.begun, self.samples = version, begun, samples

    def queue(self, now: float) -> float:
        """Put a push in line that arrives `now`, and return when it is applied."""
        self._line.append(self._service())
        self._free = max(now, self._free) + self._line[-1]
        self.tally.deepest_queue = max(self.tally.deepest_queue, len(self._line))
        return self._free

    def apply(self, gradient: np.ndarray | None, fetched: int, computed_at: HeldVersion, samples: int) -> None:
        """Apply the push that is first in line.

        Parameters
        ----------
        gradient
            Its part for this shard; None where it is withheld.
        fetched
            The version of the fetch that it is counted from.
        computed_at
            The parameters then.
        samples
            Behind the push.
        """
        self.tally.apply_seconds += self._line.popleft()
        staleness = self.version - fetched
        if gradient is None:
            pass
        elif self._discard_above and staleness > self._discard_above:
            self.tally.discarded += 1
        else:
            moment = Moment(self.version + 1 - self.begun, self.samples, samples, staleness)
            parameters = self.versioned.changeable()
            if isinstance(self._rule, DelayCompensated):
                self._rule.apply_delayed(parameters, gradient, computed_at.values, self.state, moment)
            else:
                self._rule.apply(parameters, gradient, self.state, moment)
            self.version += 1
            self.tally.pushes += 1
            self.tally.staleness.add(staleness)
            self.tally.applied_bytes += gradient.nbytes
        self.samples += samples

    def take_tally(self) -> Tally:
        """Return the tally since the last call, and start another."""
        tally, self.tally = self.tally, Tally()
        return tally
