"""Room for the gradients of the layers that are on their way to the shards, where a whole gradient has none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from dbmpi.config import ServerSection
    from dbmpi.paramserver.client import Client

_ENOUGH = 1 << 24
"""Elements (64 MiB) below which a whole gradient has room: small layers need not wait for each other."""


class Room:
    """Gives each layer room for its gradient, and waits for the shards before it is used again.

    A gradient is made from the last layer to the first.  Each layer has a fixed place behind that of the layer above,
    or at the beginning where the room ends.

    Parameters
    ----------
    client
        Sends the gradients part by part (:meth:`Client.divide`); the room is in its window where shards read in place.
    parts
        For each layer the range of the worker's own vector that holds its parameters.
    serve
        Called while a layer waits.
    waiting
        Entered while a layer waits: whose time it is.
    """

    def __init__(
        self,
        client: Client,
        parts: Sequence[range],
        dtype: np.dtype[np.floating],
        serve: Callable[[], bool],
        waiting: AbstractContextManager[None],
    ) -> None:
        size = room_size(parts)
        self._client, self._serve, self._waiting = client, serve, waiting
        self._memory = client.gradients[0][:size] if client.gradients else np.empty(size, dtype)
        self._places = places(parts, size)
        self._in_the_way = [
            [other for other, its in enumerate(self._places) if max(mine.start, its.start) < min(mine.stop, its.stop)]
            for mine in self._places
        ]
        self._marks = [client.mark()] * len(parts)

    def __call__(self, layer: int) -> np.ndarray:
        """Return room for a layer's flat gradient, when the shards have applied what lay there."""
        others = self._in_the_way[layer]
        if others:
            # Marks only grow: the latest holds for all.
            with self._waiting:
                self._client.wait(max(self._marks[other] for other in others), self._serve)
        return self._memory[self._places[layer].start : self._places[layer].stop]

    def post(self, layer: int) -> None:
        """Put a layer's complete gradient in line for the shards."""
        place = self._places[layer]
        self._client.post(self._memory[place.start : place.stop], layer)
        self._marks[layer] = self._client.mark()


def gradient_size(section: ServerSection, parts: Sequence[range]) -> int:
    """Return the elements for which a worker needs room whose layers have such parts of its own vector."""
    return room_size(parts) if section.gradients == "layers" else sum(map(len, parts))


def room_size(parts: Sequence[range]) -> int:
    """Return the elements of the room: the largest layer's, but all where that is little."""
    return max(max(map(len, parts), default=0), min(sum(map(len, parts)), _ENOUGH))


def places(parts: Sequence[range], size: int) -> list[range]:
    """Return for each layer where its gradient lies in a room."""
    found, position = [range(0)] * len(parts), 0
    for layer in reversed(range(len(parts))):
        length = len(parts[layer])
        start = 0 if position + length > size else position
        found[layer] = range(start, start + length)
        position = start + length
    return found
