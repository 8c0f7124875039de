"""What lies where in a rank's window: pure integers, computed alike by the owner and by those who write there.

A rank's window begins with its words as a client: for each shard, how many of its chunks that shard has applied.  On
a shard there follow the version, for each client how many chunks it has posted, the parameters, and the inbox: a ring
of slots for each client, each slot a header and a chunk of a gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

from dbmpi.errors import UserError

_WORD = 8
_LINE = 64
HEADER_WORDS = 8
"""64-bit words in front of a chunk, one cache line."""
SLOTS = 4
"""Chunks that a client may have on the way to one shard."""
SMALLEST_CHUNK = 4096
"""Bytes below which sending a gradient in chunks costs more than it saves."""


@dataclass(frozen=True)
class Memory:
    """Offsets, in bytes, in the window of a shard that holds `elements` elements; other ranks have only the words."""

    shards: int
    clients: int
    elements: int
    itemsize: int
    chunk: int
    """Elements of a chunk."""

    def applied(self, shard: int) -> int:
        """Word in a client's window: how many of its chunks the shard has applied."""
        return shard * _WORD

    @property
    def version(self) -> int:
        """Word in a shard's window: how many pushes it has applied."""
        return _lines(self.shards * _WORD)

    def posted(self, client: int) -> int:
        """Word in a shard's window: how many chunks the client has posted."""
        return self.version + _LINE + client * _WORD

    @property
    def parameters(self) -> int:
        """Where a shard's parameters begin."""
        return self.version + _LINE + _lines(self.clients * _WORD)

    def header(self, client: int, count: int) -> int:
        """Where the header of the client's chunk number `count` lies; the chunk follows it."""
        slot_bytes = HEADER_WORDS * _WORD + _lines(self.chunk * self.itemsize)
        return self.parameters + _lines(self.elements * self.itemsize) + (client * SLOTS + count % SLOTS) * slot_bytes

    def data(self, client: int, count: int) -> int:
        """Where the client's chunk number `count` lies."""
        return self.header(client, count) + HEADER_WORDS * _WORD

    @property
    def words_nbytes(self) -> int:
        """Bytes of the window of a rank that is no shard."""
        return self.version

    @property
    def nbytes(self) -> int:
        """Bytes of the window of a shard."""
        return self.header(self.clients, 0)


def chunk_elements(inbox_bytes: float, chunk_bytes: float, clients: int, itemsize: int) -> int:
    """Return how many elements a chunk may have, so that all clients' slots fit in the inbox.

    The inbox does not grow with the number of clients; their chunks shrink.

    Raises
    ------
    UserError
        If that leaves less than 4 KiB for a chunk.
    """
    most = int(min(chunk_bytes, inbox_bytes / (clients * SLOTS)))
    if most < SMALLEST_CHUNK:
        need = clients * SLOTS * SMALLEST_CHUNK / 2**20
        raise UserError(
            f"an inbox of {inbox_bytes / 2**20:.3g} MiB in chunks of at most {chunk_bytes / 2**10:.3g} KiB leaves "
            f"{most} bytes for each of {clients} x {SLOTS} chunks; at least {SMALLEST_CHUNK} are needed: set "
            f"server.inbox_mib to {need:.3g} or more and server.chunk_kib to {SMALLEST_CHUNK // 1024} or more"
        )
    return most // itemsize


def _lines(nbytes: int) -> int:
    """Round up to whole cache lines."""
    return -(-nbytes // _LINE) * _LINE
