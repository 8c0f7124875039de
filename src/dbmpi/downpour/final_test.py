"""The evaluation at the end of a run: the lead divides the held-out samples among the replicas that are left."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dbmpi.mpi.mailbox import Message, number
from dbmpi.objective import Outcome


class Outcomes:
    """What replicas report of held-out samples, in several messages.

    Parameters
    ----------
    metrics
        Names of what is measured beside the loss.
    """

    def __init__(self, metrics: Sequence[str]) -> None:
        self._metrics = metrics
        self._sums: dict[int, list[float]] = {}

    def hear(self, message: Message) -> None:
        """Note the sum of a metric that a `message` brings."""
        self._sums.setdefault(message.source, [0.0] * len(self._metrics))[message.values[0]] = number(message.values[1])

    def of(self, message: Message) -> Outcome:
        """Return the outcome that a `message` completes."""
        _, samples, correct, loss, *_ = message.values
        sums = self._sums.pop(message.source, [0.0] * len(self._metrics))
        return Outcome(samples, number(loss), correct, tuple(zip(self._metrics, sums, strict=True)))


class FinalTest:
    """The lead's side.

    Parameters
    ----------
    replicas
        Those that are to evaluate a part each.
    ask
        ``ask(replica, part, parts)`` lets a replica evaluate a part.
    """

    def __init__(self, replicas: Sequence[int], ask: Callable[[int, int, int], object]) -> None:
        self._ask, self._parts = ask, len(replicas)
        self._missing = dict(enumerate(replicas))
        self._outcomes: dict[int, Outcome] = {}
        for part, replica in self._missing.items():
            ask(replica, part, self._parts)

    @property
    def outcome(self) -> Outcome | None:
        """Sum over all parts; None where some are missing."""
        if self._missing:
            return None
        total = self._outcomes[0]
        for part in range(1, self._parts):
            total = total.plus(self._outcomes[part])
        return total

    @property
    def awaited(self) -> list[int]:
        """Replicas that have not evaluated their parts."""
        return sorted(set(self._missing.values()))

    def add(self, part: int, outcome: Outcome) -> None:
        """Note the `outcome` of a `part`."""
        if self._missing.pop(part, None) is not None:
            self._outcomes[part] = outcome

    def lose(self, replica: int, others: Sequence[int]) -> None:
        """Let others evaluate the parts of a replica that is given up.

        Parameters
        ----------
        replica
            The one.
        others
            Those that are left, at least one.
        """
        lost = [part for part, holder in self._missing.items() if holder == replica]
        for turn, part in enumerate(lost):
            self._missing[part] = others[turn % len(others)]
            self._ask(self._missing[part], part, self._parts)
