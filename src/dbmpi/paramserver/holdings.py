"""Which pieces of a client's own vector each shard holds: pure integers."""

from __future__ import annotations

from collections.abc import Sequence

from dbmpi.index.layout import Stretch, divide, pieces


class Holdings:
    """The pieces of one client's own vector that the shards hold.

    Parameters
    ----------
    ranges
        The range of the whole vector that each shard holds.
    stretches
        The pieces of it that make up the client's own; by default all.
    parts
        The ranges of the client's own vector that are pushed one by one; by default one range, all of it.
    fetched
        The ranges of it that are fetched into arrays of their own; likewise.

    Attributes
    ----------
    whole
        For each shard, the pieces that it holds.
    parts
        As given.
    divided
        For each part, as `whole`.
    fetched
        For each range that is fetched, as `whole`; positions in the own vector count from the begin of the range.
    final
        For each shard, the first part that it takes something of: a gradient is pushed from the last part to the first.
    size
        Elements of the client's own vector.
    pushes_to
        Shards that take something of the client's gradient.
    """

    def __init__(
        self,
        ranges: Sequence[range],
        stretches: Sequence[Stretch] | None,
        parts: Sequence[range] | None,
        fetched: Sequence[range] | None,
    ) -> None:
        if stretches is None:
            stretches = [Stretch(0, 0, ranges[-1].stop, pushed=True)]
        self.whole = pieces(stretches, ranges)
        self.size = sum(stretch.length for stretch in stretches)
        self.parts: tuple[range, ...] = (range(self.size),)
        self.divided = [self.whole]
        if parts is not None and tuple(parts) != self.parts:
            self.parts = tuple(parts)
            self.divided = [pieces(part, ranges) for part in divide(stretches, parts)]
        self.fetched = [self.whole]
        if fetched is not None:
            apart = [
                [part._replace(local=part.local - own.start) for part in found]
                for own, found in zip(fetched, divide(stretches, fetched), strict=True)
            ]
            self.fetched = [pieces(part, ranges) for part in apart]
        self.final = [self._first_pushed(shard) for shard in range(len(ranges))]
        self.pushes_to = [shard for shard, found in enumerate(self.whole) if any(piece.pushed for piece in found)]

    def _first_pushed(self, shard: int) -> int:
        takes = (part for part in range(len(self.parts)) if any(piece.pushed for piece in self.divided[part][shard]))
        return next(takes, 0)
