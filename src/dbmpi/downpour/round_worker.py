"""A worker whose replica learns in rounds together with others."""

from __future__ import annotations

from dbmpi.data.deal import numbers
from dbmpi.downpour.orders import Decision
from dbmpi.downpour.worker import Worker
from dbmpi.paramserver.protocol import RoundTurn


class RoundWorker(Worker):
    """Accompanies the loop of one worker, and asks the lead for a turn with a batch before each step.

    A turn that has begun is carried through before any other order is obeyed, as others wait for its push.
    """

    @property
    def turn_ends(self) -> bool:
        """Whether the batch that was given last must be pushed before another one is given."""
        return self._next_batch is None

    def proceed(self, fetches: bool) -> int | None:
        """Obey the lead's orders, and return the number of the next batch in the stream, or None to end.

        Parameters
        ----------
        fetches
            Whether a fetch follows, as it always does.
        """
        self._orders.obey()
        while self._next_batch is None:
            decision, *values = self.team.agree(self._next_decision(fetches))
            if decision == Decision.GO_ON:
                self._taken = self._asked
                number, needed, after, position, length, *_ = values
                if not length:
                    return None
                self._in_turn = True
                self._client.begin_turn(RoundTurn(number, needed, self._client.peer(after) if after >= 0 else -1))
                self._batches = numbers(self._assignment.stream, [range(position, position + length)])
                self._next_batch = next(self._batches)
            elif decision == Decision.STOP:
                return None
            else:
                self._obey_between(decision, *values)
        batch, self._next_batch = self._next_batch, next(self._batches, None)
        self._drawn += 1
        return batch

    def _next_decision(self, asks: bool) -> tuple[int, ...]:
        """Return what the replica does next, as this worker sees it; the first partition decides.

        Parameters
        ----------
        asks
            Whether it needs another turn to go on, as it always does.
        """
        orders = self._orders

        def ordered() -> bool:
            return self._has_turn() or orders.paused or orders.stopping or orders.deal is not None

        orders.obey()
        if self._in_turn:
            return (Decision.END_TURN,)
        if self.team.speaks:
            if not ordered():
                with self.stopwatch("wait"):
                    orders.wait(ordered, "the other replicas of its round", longest_sleep=1e-3)
            if self._has_turn():
                return Decision.GO_ON, *orders.given
        if orders.stopping:
            return (Decision.STOP,)
        return (Decision.REST,) if orders.deal is None else (Decision.DEAL, *orders.deal)
