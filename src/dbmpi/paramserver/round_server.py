"""A shard that applies the pushes of a round together, as one: their mean, in which each sample counts alike.

Pushes are added up as their chunks arrive, so that the memory for a round does not grow with the replicas.  Where the
turns of a round have an order, each element is added in this order, and the result does not depend on timing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from dbmpi.kernels import updates
from dbmpi.paramserver.protocol import LAST, MORE, REPORT, WITHHELD, Header, ShardMap
from dbmpi.paramserver.rules import Rule
from dbmpi.paramserver.schedule import Moment
from dbmpi.paramserver.server import Server


@dataclass(slots=True)
class RoundPart:
    """The push of one client in a round, as far as it has come."""

    samples: int
    """Samples behind it."""
    covered: list[slice] = field(default_factory=list)
    """What is added of it, in the order in which it is pushed, which all clients of a partition share."""
    done: int = 0
    """Elements of that."""
    complete: bool = False
    """Whether nothing more of it will come."""


class PushRound:
    """The pushes to one partition's part that are applied together.

    Parameters
    ----------
    number
        Of the round.

    Attributes
    ----------
    number
        As given.
    parts
        What has come of each client.
    missing
        Pushes that will never come, of those that are needed.
    unit
        Samples of the first push that was added; others are added with weights in proportion to it.
    """

    def __init__(self, number: int) -> None:
        self.number, self.missing, self.unit = number, 0, 0
        self.parts: dict[int, RoundPart] = {}
        self._needed = -1

    def part(self, client: int, header: Header) -> RoundPart:
        """Return what has come of a `client`, one of whose chunks has that `header`."""
        self._needed = header.needed
        return self.parts.setdefault(client, RoundPart(header.samples))

    def is_complete(self, client: int) -> bool:
        """Return whether all of a client's push is added."""
        return client in self.parts and self.parts[client].complete

    @property
    def full(self) -> bool:
        """Whether all pushes have come that will."""
        complete = sum(part.complete for part in self.parts.values())
        return self._needed >= 0 and complete >= self._needed - self.missing

    def pieces(self) -> Iterator[tuple[slice, int]]:
        """Yield the pieces of the shard's range that were added up, with the samples behind the sum of each.

        They differ only where a client has died, or was late, in the middle of its push.
        """
        parts = list(self.parts.values())
        edges = sorted({part.done for part in parts} - {0})
        position = 0
        for covered in max(parts, key=lambda part: part.done).covered if parts else ():
            start = covered.start
            while start < covered.stop:
                edge = next(edge for edge in edges if edge > position)
                stop = min(covered.stop, start + edge - position)
                yield slice(start, stop), sum(part.samples for part in parts if part.done > position)
                start, position = stop, position + stop - start


class RoundServer(Server):
    """The work of one shard that applies the pushes of a round together.

    A client learns that its push is applied when that of the whole round is.  A push that comes when its round is
    closed is dropped.

    Parameters
    ----------
    shards, number, clients, rule, parameters
        As for :class:`Server`.
    """

    def __init__(
        self, shards: ShardMap, number: int, clients: tuple[int, ...], rule: Rule, parameters: np.ndarray
    ) -> None:
        super().__init__(shards, number, clients, rule, parameters)
        self._whole = False  # parameters change between rounds alone
        self._consistent = shards.consistent
        self._sum = np.zeros_like(parameters)
        self._rounds = [PushRound(1) for _ in range(self._memory.partitions)]

    @property
    def unfinished(self) -> int:
        """Pushes that are half applied: never any."""
        return 0

    def poll(self) -> bool:
        """Add the chunks that have arrived; return whether anything was done, or a transfer is under way."""
        closed = [self._close(partition) for partition in range(len(self._rounds))]
        return super().poll() or any(closed) or self._transfers_go_on()

    def forgo(self, client: int, number: int) -> None:
        """Do not wait for the push of a `client` in the round of that `number`, unless it has come."""
        current = self._round(client, number)
        if current.number == number and not current.is_complete(client):
            current.missing += 1

    def _round(self, client: int, number: int) -> PushRound:
        """Return the round that goes on, for a client that takes part in one of that number.

        A later one begins only when all of an earlier one have left: what is left of that is forgotten.
        """
        partition = client % len(self._rounds)
        if self._rounds[partition].number < number:
            for part in self._rounds[partition].parts.values():
                for covered in part.covered:
                    self._sum[covered] = 0
            self._rounds[partition] = PushRound(number)
        return self._rounds[partition]

    def _waits(self, client: int) -> bool:
        """Whether the next chunk of a client is to be added after one that has not come."""
        header = self._next(client)
        if header.kind in (REPORT, WITHHELD) or header.after < 0 or self._gone[header.after]:
            return False
        current = self._round(client, header.round)
        if header.round < current.number or current.is_complete(header.after):
            return False
        before, own = current.parts.get(header.after), current.parts.get(client)
        return before is None or before.done < header.length + (0 if own is None else own.done)

    def _apply(self, client: int) -> int:
        """Add the client's next chunk, or drop it if its round is closed; return its kind."""
        header, count = self._next(client), int(self._applied[client])
        if header.kind == REPORT:
            return super()._apply(client)
        current, partition = self._round(client, header.round), client % len(self._rounds)
        late = header.round < current.number
        if not late:
            self._add(current.part(client, header), current, client, header)
        elif header.kind != MORE:
            self._samples[partition] += header.samples
            self.tally.discarded += header.kind == LAST
        self._inside[client] = header.kind == MORE
        self._counts[LAST][client] += header.kind != MORE
        self._applied[client] = count + 1
        self._acknowledge(client)
        self._close(partition)
        return header.kind

    def _add(self, part: RoundPart, current: PushRound, client: int, header: Header) -> None:
        """Add a chunk to the sum of its round."""
        part.complete = header.kind != MORE
        if not header.length:
            return
        covered = slice(header.start, header.start + header.length)
        current.unit = current.unit or part.samples
        chunk = self._chunk(client, int(self._applied[client]), header)
        updates.sgd(self._sum[covered], chunk, -part.samples / current.unit)  # the sum += weight * chunk
        part.covered.append(covered)
        part.done += header.length

    def _acknowledge(self, client: int) -> None:
        """Let a client know what of it is applied, but not before its round is."""
        if not self._rounds[client % len(self._rounds)].is_complete(client):
            super()._acknowledge(client)

    def _close(self, partition: int) -> bool:
        """Apply a round if all of it has come, and another update may begin; return whether it was."""
        current = self._rounds[partition]
        if not current.full or (self.most is not None and self.version >= self.most):
            return False
        complete = {client: part for client, part in current.parts.items() if part.complete}
        samples = sum(part.samples for part in complete.values())
        version = int(self._versions[partition])
        moment = Moment(version + 1 - self.begun, self._samples[partition], samples)
        pushes = sum(part.done > 0 for part in complete.values())
        if self._consistent:
            self._step_sequence()
        for covered, behind in current.pieces():
            total = self._sum[covered]
            if behind != current.unit:
                updates.scale(total, current.unit / behind)
            if pushes:
                self._change(covered, total, moment)
            total[:] = 0
        for _ in range(pushes):
            self.tally.staleness.add(0)
        self.tally.pushes += pushes
        self._versions[partition] += pushes > 0
        self._samples[partition] += samples
        if self._consistent:
            self._step_sequence()
        self._rounds[partition] = PushRound(current.number + 1)
        for client in complete:
            self._acknowledge(client)
        return True
