"""Mirrors: the vectors of each shard are also in the memory of another one, at most so many updates old.

A shard copies its vectors between two pushes, and sends the copy while it goes on.  Its mirror is whole at any time,
as the next one arrives beside it.  When a shard dies, the others write a checkpoint with its mirror in its place.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from dbmpi.mpi import failures
from dbmpi.mpi.tags import Tag

if TYPE_CHECKING:
    from mpi4py import MPI

    from dbmpi.mpi.topology import Plan
    from dbmpi.paramserver.server import Server
    from dbmpi.session import Session

_PART = 1 << 24
"""Bytes that are sent at a time, so that polls stay short."""
_PATIENCE = 0.2
"""Seconds that a copy waits for half applied pushes; their clients may have halted."""
_CLOSING = -1
"""Instead of a version: no mirror follows."""


@dataclass
class Mirror:
    """The vectors of a shard as they were at a version."""

    vectors: dict[str, np.ndarray]
    """By name, each of the shard's length."""
    word: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))
    """The version."""

    @property
    def version(self) -> int:
        """Pushes that are in the vectors."""
        return int(self.word[0])

    def parts(self) -> Iterator[np.ndarray]:
        """Return what travels of it, piece by piece."""
        yield self.word
        for values in self.vectors.values():
            step = _PART // values.itemsize
            yield from (values[start : start + step] for start in range(0, values.size, step))


def holders(plan: Plan, hosts: Sequence[str]) -> tuple[int, ...]:
    """Return for each shard the one that holds its mirror: one on the next host, all alike, or else the next one.

    Parameters
    ----------
    plan
        Which rank plays which role.
    hosts
        Names of the ranks' hosts.
    """
    of_host: dict[str, list[int]] = {}
    for shard, rank in enumerate(plan.shard_ranks):
        of_host.setdefault(hosts[rank], []).append(shard)
    groups = list(of_host.values())
    if len(groups) == 1:
        return tuple((shard + 1) % plan.shards for shard in range(plan.shards))
    found = [0] * plan.shards
    for group, following in zip(groups, groups[1:] + groups[:1], strict=True):
        for place, shard in enumerate(group):
            found[shard] = following[place % len(following)]
    return tuple(found)


class _Arriving:
    """The mirror of one shard, which is held here: the last whole one, and the next one as it arrives."""

    def __init__(self, comm: MPI.Intracomm, rank: int, like: Mapping[str, np.ndarray], size: int) -> None:
        self._comm, self._rank = comm, rank
        self._next, self._other = (
            Mirror({name: np.empty(size, values.dtype) for name, values in like.items()}) for _ in range(2)
        )
        self._parts: Iterator[np.ndarray] = iter(())
        self._request: MPI.Request | None = None
        self._leaving: tuple[MPI.Request, np.ndarray] | None = None
        self.whole: Mirror | None = None
        self.over = False

    @property
    def nbytes(self) -> int:
        return 2 * sum(values.nbytes for values in self._next.vectors.values())

    def poll(self) -> bool:
        """Receive; return whether anything moved."""
        if self.over:
            return False
        if self._request is None:
            if not self._comm.Iprobe(self._rank, Tag.MIRROR):
                return False
            self._parts = self._next.parts()
            self._request = self._comm.Irecv(next(self._parts), self._rank, Tag.MIRROR)
        request, self._request = self._request, None
        try:
            arrived = request.Test()
        except Exception:  # MPI's, where the sender has died: this mirror never gets whole
            self.over = True
            raise
        if not arrived:
            self._request = request
            return False
        if self._next.version == _CLOSING:
            self.over = True
        elif (part := next(self._parts, None)) is not None:
            self._request = self._comm.Irecv(part, self._rank, Tag.MIRROR)
        else:
            self.whole, self._next, self._other = self._next, self._other, self._next
            word = self.whole.word.copy()
            self._leaving = self._comm.Isend(word, self._rank, Tag.MIRRORED), word
        return True

    def abandon(self) -> None:
        """Receive nothing more."""
        self.over = True
        if self._request is not None:
            failures.abandon(self._request, *self._next.vectors.values(), self._next.word)


class Mirrors:
    """One shard's part: it sends its own mirror, and holds those of others.

    Parameters
    ----------
    comm
        All ranks.
    ranks
        That of each shard.
    number
        Of this shard.
    held_by
        For each shard, the number of the one that holds its mirror.
    sizes
        Elements of each shard.
    every
        Updates that a mirror may lack, 1 or more.
    server
        Of this shard, with its vectors filled.

    Attributes
    ----------
    held_by
        As given.
    closed
        Whether nothing is sent or received any more.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        ranks: Sequence[int],
        number: int,
        held_by: Sequence[int],
        sizes: Sequence[int],
        every: int,
        server: Server,
    ) -> None:
        self._comm, self._server, self._every, self.held_by = comm, server, every, held_by
        self._holder = ranks[held_by[number]]
        like = {"parameters": server.parameters, **server.state}
        self._sends = number > 0
        """The lead's shard has no mirror, as nothing goes on without the lead."""
        self._copy = Mirror({name: np.empty_like(values) for name, values in like.items()} if self._sends else {})
        self._leaving: Iterator[np.ndarray] | None = None
        self._request: MPI.Request | None = None
        self._sent: int | None = None
        """Version of the last mirror that is sent or on its way."""
        self._since = 0.0
        """Since when the next copy waits; 0 if it does not."""
        self._ending = self._said = self.closed = False
        self._stuck = 0
        """Pushes that were half applied when the last copy was made."""
        self._most = server.version + every
        server.most = self._most if self._sends else None
        self._arriving = {
            shard: _Arriving(comm, ranks[shard], like, sizes[shard])
            for shard, holder in enumerate(held_by)
            if holder == number and shard
        }

    @property
    def nbytes(self) -> int:
        """Memory of the copy, and of the mirrors held here."""
        size = sum(values.nbytes for values in self._copy.vectors.values())
        return size + sum(arriving.nbytes for arriving in self._arriving.values())

    def holds(self, shard: int) -> bool:
        """Whether the mirror of a `shard` is held here."""
        return shard in self._arriving

    def mirror(self, shard: int) -> Mirror | None:
        """Return the last whole mirror of a `shard` that is held here; None if there is none yet."""
        return self._arriving[shard].whole

    def poll(self) -> bool:
        """Send and receive; return whether anything moved."""
        if self.closed:
            return False
        with failures.survived():
            moved = self._send()
            for arriving in self._arriving.values():
                moved = arriving.poll() or moved
            if self._ending:
                self.closed = self._said and all(arriving.over for arriving in self._arriving.values())
            return moved
        return False

    def end(self) -> None:
        """Send nothing more than what is on its way; then :attr:`closed`, after polls of all shards."""
        self._ending = True
        self._server.most = None

    def abandon(self) -> None:
        """Stop, because a shard has died; the mirrors stay."""
        if self.closed:
            return
        self.closed, self._server.most = True, None
        if self._request is not None:
            failures.abandon(self._request, self._copy.word, *self._copy.vectors.values())
        for arriving in self._arriving.values():
            arriving.abandon()

    def _send(self) -> bool:
        """Go on sending, or begin if it is time; return whether anything moved."""
        if not self._sends:
            self._said = self._ending
            return False
        if self._leaving is None:
            return self._begin()
        if self._request is not None:
            if not self._request.Test():
                return False
            self._request = None
        part = next(self._leaving, None)
        if part is not None:
            self._request = self._comm.Isend(part, self._holder, Tag.MIRROR)
            return True
        if self._copy.version == _CLOSING:
            moved, self._said = not self._said, True
            return moved
        return self._confirm()

    def _begin(self) -> bool:
        """Copy the vectors, if it is time and no push is half applied, or say that this is the end."""
        server, version = self._server, self._server.version
        if self._ending:
            self._copy.word[0] = _CLOSING
            self._leaving = iter([self._copy.word])
            return True
        if self._sent is not None and version - self._sent < max(self._every // 2, 1):
            return False
        stuck = server.unfinished
        if stuck > self._stuck:  # those of clients that have halted need not be awaited again
            self._since = self._since or time.monotonic()
            server.most = version
            if time.monotonic() - self._since < _PATIENCE:
                return False
        self._stuck = stuck
        for name, values in {"parameters": server.parameters, **server.state}.items():
            self._copy.vectors[name][:] = values
        self._copy.word[0], self._since = version, 0.0
        server.most = self._most
        self._sent = version
        self._leaving = self._copy.parts()
        return True

    def _confirm(self) -> bool:
        """Note that the mirror has arrived whole, if the holder says so; return whether it does."""
        if not self._comm.Iprobe(self._holder, Tag.MIRRORED):
            return False
        word = np.empty(1, np.int64)
        self._comm.Recv(word, self._holder, Tag.MIRRORED)
        self._leaving = None
        self._most = self._server.most = int(word[0]) + self._every + self._stuck
        return True


def mirrors_of(session: Session, server: Server, ranges: Sequence[range]) -> Mirrors | None:
    """Return what keeps the mirrors of the shard on this rank; None where the run has none.

    Parameters
    ----------
    session
        Everything that is known.
    server
        Of the shard, with its vectors filled.
    ranges
        Of the flat vector, those of all shards.
    """
    every, plan, watch = session.run.server.mirror, session.plan, session.watch
    if not (every and watch.on):
        return None
    assert session.comms.shard is not None
    held_by, sizes = holders(plan, watch.hosts), [len(held) for held in ranges]
    return Mirrors(session.comms.world, plan.shard_ranks, session.comms.shard, held_by, sizes, every, server)


def mirror_notes(every: int, mirrors: Mirrors | None) -> tuple[str, ...]:
    """Return what a user should know about `mirrors`, asked for by ``server.mirror = every``."""
    if mirrors is not None:
        more = f"{mirrors.nbytes / 2**20:,.0f} MiB more on a shard"
        return (f"each shard is mirrored by another one, {every:,} updates late at most: {more}",)
    return (f"server.mirror = {every}: nothing is mirrored, as this MPI ends the job if a rank dies",) if every else ()
