"""The layout of a rank's window: pure integers, computed alike by the owner and by the ranks that write there.

A rank's window begins with its words as a client: for each shard, the number of the client's chunks applied there.  On
a shard there follow its words (versions, and for each client the number of chunks posted), its parameters, these in
bfloat16 if workers use that, the headers of the chunks, a ring for each client, and the inbox: a ring of slots for the
chunks of each client that cannot be read in place.  The window of a client whose gradient is read in place ends with
the gradient.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

from dbmpi.errors import UserError
from dbmpi.index.layout import Layout
from dbmpi.kernels.memory import CACHE_LINE
from dbmpi.paramserver.protocol import HEADER_WORDS

_WORD = 8
_ROUNDED = 2  # bytes of a bfloat16
HEADERS = 64
"""Chunks read in place that a client may have posted to one shard; each costs a header and no more."""
SLOTS = 4
"""Chunks that a client may have on the way to one shard through its inbox."""
_MOST_BYTES = 2**62
SMALLEST_CHUNK = 4096
"""Bytes below which sending a gradient in chunks costs more than it saves."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Offsets, in bytes, in the window of a shard that holds `elements` elements; other ranks have only the words."""

    shards: int
    clients: int
    elements: int
    itemsize: int
    chunk: int
    """Elements of a chunk in the inbox."""
    partitions: int = 1
    """Clients of one replica; each counts the pushes to its own part alone."""
    in_place: tuple[int, ...] = ()
    """Clients whose gradients this shard reads in place, in order; shards of one host share the tuple."""
    vectors: int = 1
    """Vectors of which a slot of the inbox holds a piece: gradients, and with 2 also what they were computed at."""
    rounded: bool = False
    """Whether the shard keeps its parameters in bfloat16, too: workers compute on its memory, or fetch them so."""

    def applied(self, shard: int) -> int:
        """Word in a client's window: the number of its chunks that the shard has applied."""
        return shard * _WORD

    def version(self, partition: int) -> int:
        """Word in a shard's window: the number of pushes applied that came from this partition of any replica."""
        return lines(self.shards * _WORD) + partition * _WORD

    def posted(self, client: int) -> int:
        """Word in a shard's window: the number of chunks that the client has posted."""
        return self.version(0) + lines(self.partitions * _WORD) + client * _WORD

    def active(self, client: int, activity: int) -> int:
        """Word in a shard's window: whether the client, on another host, is fetching (`activity` 0) or pushing (1)."""
        return self.posted(0) + lines(self.clients * _WORD) + (2 * client + activity) * _WORD

    def wanted(self, client: int) -> int:
        """Word in a shard's window: whether the client waits to read between two pushes."""
        return self.active(0, 0) + lines(2 * self.clients * _WORD) + client * _WORD

    @property
    def sequence(self) -> int:
        """Word in a shard's window: odd while a push is half applied, and another number after each."""
        return self.wanted(0) + lines(self.clients * _WORD)

    @property
    def parameters(self) -> int:
        """Offset of a shard's parameters."""
        return self.sequence + CACHE_LINE

    @property
    def rounded_parameters(self) -> int:
        """Offset of a shard's parameters in bfloat16, if it keeps them."""
        return self.parameters + lines(self.elements * self.itemsize)

    def reads(self, client: int) -> bool:
        """Whether the shard reads the client's gradients in place."""
        return self._before(client) < self._before(client + 1)

    def slots(self, client: int) -> int:
        """Return the number of chunks that the client may have on the way."""
        return HEADERS if self.reads(client) else SLOTS

    def header(self, client: int, count: int) -> int:
        """Offset of the header of the client's chunk number `count`."""
        start = self.rounded_parameters + lines(self.rounded * self.elements * _ROUNDED)
        near = self._before(client)
        # Clients of other hosts, which may be many, have one header for each slot.
        headers = near * HEADERS + (client - near) * SLOTS + count % self.slots(client)
        return start + headers * HEADER_WORDS * _WORD

    def data(self, client: int, count: int, vector: int = 0) -> int:
        """Offset of the client's chunk number `count` in the inbox.

        Parameters
        ----------
        client, count
            Number of the client, and of its chunk.
        vector
            Of which of the slot's vectors.
        """
        slot = (client - self._before(client)) * SLOTS + count % SLOTS
        return self._slot(slot) + vector * lines(self.chunk * self.itemsize)

    @property
    def words_nbytes(self) -> int:
        """Bytes of the window of a rank that is no shard."""
        return self.version(0)

    @property
    def nbytes(self) -> int:
        """Bytes of the window of a shard."""
        return self._slot((self.clients - len(self.in_place)) * SLOTS)

    def _before(self, client: int) -> int:
        """Return how many of the clients before this one are read in place."""
        return bisect_left(self.in_place, client)

    def _slot(self, number: int) -> int:
        return self.header(self.clients, 0) + number * self.vectors * lines(self.chunk * self.itemsize)


def chunk_elements(inbox_bytes: float, chunk_bytes: float, clients: int, itemsize: int) -> int:
    """Return the number of elements that a chunk may have, so that the slots of all clients fit in the inbox.

    The inbox does not grow with the number of clients; their chunks shrink.

    Parameters
    ----------
    inbox_bytes, chunk_bytes
        Size of the inbox, and of the largest chunk to use.
    clients
        Number of clients.
    itemsize
        Bytes of an element.

    Raises
    ------
    UserError
        If that leaves less than 4 KiB for a chunk.
    """
    most = int(min(chunk_bytes, inbox_bytes / (max(clients, 1) * SLOTS), _MOST_BYTES))
    if most < SMALLEST_CHUNK:
        need = max(clients, 1) * SLOTS * SMALLEST_CHUNK / 2**20
        raise UserError(
            f"an inbox of {inbox_bytes / 2**20:.3g} MiB in chunks of at most {chunk_bytes / 2**10:.3g} KiB leaves "
            f"{most} bytes for each of {clients} x {SLOTS} chunks; at least {SMALLEST_CHUNK} are needed: set "
            f"server.inbox_mib to {need:.3g} or more and server.chunk_kib to {SMALLEST_CHUNK // 1024} or more"
        )
    return most // itemsize


def check_fits(layout: Layout, shards: int, itemsize: int, available: int) -> None:
    """Refuse parameters that need more memory than the shards have: usually one digit too many in a description.

    Parameters
    ----------
    layout
        The parameters.
    shards
        Number of ranks that share them.
    itemsize, available
        Bytes of a parameter, and of the memory of this rank's machine.

    Raises
    ------
    UserError
        If a shard's parameters alone need more memory; names the largest tensor.
    """
    needed = -(-layout.size // shards) * itemsize
    if needed > available:
        largest = max(layout.tensors, key=lambda tensor: tensor.size)
        raise UserError(
            f"the model has {layout.size:,} parameters, {largest.size:,} of them in {largest.name!r} of shape "
            f"{largest.shape}: that is {needed / 2**30:,.1f} GiB on each of {shards} shards, but there are "
            f"{available / 2**30:,.1f} GiB of memory; make that array smaller, or start more shards on more machines"
        )


def lines(nbytes: int) -> int:
    """Round `nbytes` up to whole cache lines."""
    return -(-nbytes // CACHE_LINE) * CACHE_LINE
