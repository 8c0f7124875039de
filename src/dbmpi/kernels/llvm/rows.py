"""Products with rows that lie anywhere in memory: what layers of filters on fields are made of.

Rows are taken in blocks whose sums stay in registers.  `tile` is a constant: the height of the first blocks, that of
the others (0 if there are none), and the vectors of a row; `blocks` says how many there are of each height.  Arrays
are flat and of one float type; indices are not checked.  A tile may be partly filled: nothing is read or written
beyond its `filled` columns, which are at least one and at most ``vectors * lanes``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from numba import types

from dbmpi.kernels.llvm.writer import (
    Arguments,
    MaskedWriter,
    Writer,
    constants,
    instructions,
    literals,
    signature_of,
)
from dbmpi.kernels.memory import CACHE_LINE


@instructions
def multiply_rows(
    typingctx: Any,
    tile: Any,
    blocks: Any,
    a: Any,
    a_start: Any,
    a_stride: Any,
    b: Any,
    b_start: Any,
    places: Any,
    first: Any,
    last: Any,
    out: Any,
    out_start: Any,
    out_stride: Any,
    filled: Any,
    add: Any,
    addends: Any,
    addends_start: Any,
    ahead: Any,
) -> Any:
    """Multiply rows of `a` by rows of `b` that lie anywhere, into rows of `out`.

    ``out[r, c] (+)= sum over first <= k < last of a[r, k] * b[places[k] + c]`` for the rows r of all blocks and
    `filled` columns c, summed in the order of k.

    Parameters
    ----------
    a, b, out : 1-D arrays
        Element (r, k) of the first is ``a[a_start + r * a_stride + k]``, element (r, c) of the last
        ``out[out_start + r * out_stride + c]``.
    b_start : int
        Added to all places.
    places : 1-D int64 array
        Where the rows of `b` start.
    add : bool
        Add to what is in `out`, instead of replacing it.
    addends : 1-D array or None
        What comes to all elements of a row that is replaced: ``addends[addends_start + r]`` to those of row r.
    ahead : constant
        Whether to ask for the rows of `a` two blocks on.
    """
    if not constants(tile, ahead):
        return None

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        given = Arguments(context, builder, signature, values)
        writer = _RowTiles(builder, given.itemsize(2))
        a, b, places, out = (given.pointer(*at) for at in ((2, 3), (5, 6), (7,), (10, 11)))
        a_stride, first, last, out_stride, filled, add = (values[at] for at in (4, 8, 9, 12, 13, 14))
        addends = None if isinstance(signature.args[15], types.NoneType) else given.pointer(15, 16)
        for rows, top, masks in writer.tiles(tile, given.numbers(1), filled):
            strips = writer.strided(writer.at(a, builder.mul(top, a_stride)), a_stride, rows)
            sums = writer.strided(writer.at(out, builder.mul(top, out_stride)), out_stride, rows)
            later = writer.at(strips[0], builder.mul(a_stride, writer.index(2 * rows))) if ahead.literal_value else None
            own = [] if addends is None else writer.strided(writer.at(addends, top), writer.index(1), rows)
            writer.multiply(masks, strips, later, b, places, first, last, sums, add, own)
        return context.get_dummy_value()

    given = (a, a_start, a_stride, b, b_start, places, first, last, out, out_start, out_stride, filled, types.boolean)
    return signature_of(tile, blocks, *given, addends, addends_start, ahead), generate


@instructions
def add_to_rows(
    typingctx: Any,
    tile: Any,
    blocks: Any,
    a: Any,
    a_start: Any,
    a_stride: Any,
    b: Any,
    b_start: Any,
    b_stride: Any,
    out: Any,
    out_start: Any,
    places: Any,
    first: Any,
    last: Any,
    filled: Any,
) -> Any:
    """Multiply columns of `a` by rows of `b`, and add to rows of `out` that lie anywhere: `multiply_rows` transposed.

    ``out[places[n] + c] += sum over r of a[r, n] * b[r, c]`` for ``first <= n < last`` and `filled` columns c, summed
    in the order of r: the rows of all blocks, and those of `b` are in registers.  The rows of `out` must not overlap.

    Parameters
    ----------
    a, b, out : 1-D arrays
        Element (r, n) of the first is ``a[a_start + r * a_stride + n]``, element (r, c) of the second
        ``b[b_start + r * b_stride + c]``.
    out_start : int
        Added to all places.
    places : 1-D int64 array
        Where the rows of `out` start.
    """
    if not constants(tile):
        return None

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        given = Arguments(context, builder, signature, values)
        writer = _RowTiles(builder, given.itemsize(2))
        a, b, out, places = (given.pointer(*at) for at in ((2, 3), (5, 6), (8, 9), (10,)))
        a_stride, b_stride, first, last, filled = (values[at] for at in (4, 7, 11, 12, 13))
        for rows, top, masks in writer.tiles(tile, given.numbers(1), filled):
            strips = writer.strided(writer.at(a, builder.mul(top, a_stride)), a_stride, rows)
            others = writer.strided(writer.at(b, builder.mul(top, b_stride)), b_stride, rows)
            writer.add(masks, strips, others, out, places, first, last)
        return context.get_dummy_value()

    given = (a, a_start, a_stride, b, b_start, b_stride, out, out_start, places, first, last, filled)
    return signature_of(tile, blocks, *given), generate


@instructions
def add_maps_to_rows(
    typingctx: Any,
    tile: Any,
    blocks: Any,
    a: Any,
    a_start: Any,
    a_stride: Any,
    b: Any,
    b_start: Any,
    b_stride: Any,
    out: Any,
    out_start: Any,
    places: Any,
    first: Any,
    depth: Any,
    filled: Any,
) -> Any:
    """Do as `add_to_rows` does, with the rows of `out` in registers, which are those of all blocks.

    ``out[places[first + n] + c] += sum over r < depth of a[r, first + n] * b[r, c]``.  As many rows of `a` as come
    after these are asked for, a share in every tile.
    """
    if not constants(tile):
        return None

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        given = Arguments(context, builder, signature, values)
        writer = _RowTiles(builder, given.itemsize(2))
        a, b, out, places = (given.pointer(*at) for at in ((2, 3), (5, 6), (8, 9), (10, 11)))
        a_stride, b_stride, first, depth, filled = (values[at] for at in (4, 7, 11, 12, 13))
        for rows, top, masks in writer.tiles(tile, given.numbers(1), filled):
            column = builder.add(first, top)
            # What comes next is asked for in the order of memory, by tiles and then by rows.
            later = writer.at(a, builder.mul(depth, builder.add(a_stride, column)))
            sums = [writer.at(out, builder.load(writer.at(places, top, n))) for n in range(rows)]
            writer.add_all(masks, writer.at(a, column), a_stride, later, b, b_stride, depth, sums)
        return context.get_dummy_value()

    given = (a, a_start, a_stride, b, b_start, b_stride, out, out_start, places, first, depth, filled)
    return signature_of(tile, blocks, *given), generate


@instructions
def prefetch(typingctx: Any, a: Any, first: Any, last: Any, written: Any) -> Any:
    """Ask for the cache lines of the elements ``first <= n < last`` of a 1-D array.

    `written` is a constant: whether they will be written.
    """
    if not constants(written):
        return None

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        given = Arguments(context, builder, signature, values)
        writer, start = Writer(builder, given.itemsize(0)), given.pointer(0)

        def ask(n: Any, nothing: list[Any]) -> list[Any]:
            writer.prefetch(writer.at(start, n), write=written.literal_value)
            return nothing

        writer.loop(CACHE_LINE // writer.itemsize, values[1], values[2], [], ask)
        return context.get_dummy_value()

    return signature_of(a, first, last, written), generate


class _RowTiles(MaskedWriter):
    """The instructions of the products above; arrays are addresses."""

    def tiles(self, tile: Any, blocks: list[Any], filled: Any) -> Iterator[tuple[int, Any, list[Any]]]:
        """Yield the height, the first row and the masks of tiles, where the instructions for them belong."""
        *heights, vectors = literals(tile)
        for masks in self._variants(vectors, filled):
            for rows, top in self.blocks(heights, blocks):
                yield rows, top, masks

    def _variants(self, vectors: int, filled: Any) -> Iterator[list[Any]]:
        """Yield the masks of a tile's vectors, None for a full one, each time in a branch for so many columns."""
        builder = self.builder
        with builder.if_else(builder.icmp_signed(">=", filled, self.index(vectors * self.lanes))) as (full, part):
            with full:
                yield [None] * vectors
            with part:
                if vectors == 1:
                    yield self.masks(1, filled)
                else:
                    with builder.if_else(builder.icmp_signed(">", filled, self.index(self.lanes))) as (some, one):
                        with some:
                            yield self.masks(vectors, filled)
                        with one:
                            yield self.masks(1, filled)

    def multiply(
        self,
        masks: list[Any],
        strips: list[Any],
        later: Any,
        b: Any,
        places: Any,
        first: Any,
        last: Any,
        sums: list[Any],
        add: Any,
        addends: list[Any],
    ) -> None:
        """Multiply a strip by rows of `b` into the rows at `sums`; ask for the strip that starts at `later`.

        Rows that are replaced have the elements at `addends` added to them, if there are any.
        """
        builder, rows = self.builder, len(strips)

        def steps(k: Any, count: int, totals: list[Any]) -> list[Any]:
            if later is not None:  # a share in each step, in the order of memory
                ahead = self.at(later, builder.mul(k, self.index(rows)))
                for byte in range(0, count * rows * self.itemsize, CACHE_LINE):
                    self.prefetch(self.at(ahead, byte // self.itemsize))
            for offset in range(count):
                b_row = self.load_row(self.at(b, builder.load(self.at(places, k, offset))), masks)
                factors = [self.spread_at(strip, k, offset) for strip in strips]
                totals = self._products(factors, b_row, totals)
            return totals

        # For large tiles, one step at a time: of several, LLVM would load all factors first and spill them, to a stack
        # that is not aligned to vectors.  Small ones have registers for it, and too few instructions in one step.
        size = rows * len(masks)
        at_once = 1 if size > 8 else 2 if size > 4 else self.unrolled
        totals = self.unrolled_loop(at_once, first, last, [self.zero] * size, steps)
        with builder.if_else(builder.icmp_signed("!=", add, add.type(0))) as (adding, replacing):
            with adding:
                before = [value for row in sums for value in self.load_row(row, masks)]
                after = [builder.fadd(one, other) for one, other in zip(before, totals, strict=True)]
                self._store(after, sums, masks)
            with replacing:
                own = [value for addend in addends for value in [self.spread_at(addend)] * len(masks)]
                if own:
                    totals = [builder.fadd(one, other) for one, other in zip(totals, own, strict=True)]
                self._store(totals, sums, masks)

    def add(
        self, masks: list[Any], strips: list[Any], others: list[Any], out: Any, places: Any, first: Any, last: Any
    ) -> None:
        """Add the products of strips and the rows at `others` to rows of `out`."""
        builder = self.builder
        tile = [self.load_row(row, masks) for row in others]

        def steps(n: Any, count: int, nothing: list[Any]) -> list[Any]:
            rows = [self.at(out, builder.load(self.at(places, n, offset))) for offset in range(count)]
            totals = [self.load_row(row, masks) for row in rows]
            for strip, values in zip(strips, tile, strict=True):
                for offset in range(count):
                    totals[offset] = self._products([self.spread_at(strip, n, offset)], values, totals[offset])
            for row, total in zip(rows, totals, strict=True):
                self.store_row(total, row, masks)
            return nothing

        self.unrolled_loop(2, first, last, [], steps)  # two, for more multiply-adds that do not wait for one another

    def add_all(
        self,
        masks: list[Any],
        factors: Any,
        stride: Any,
        later: Any,
        b: Any,
        b_stride: Any,
        depth: Any,
        sums: list[Any],
    ) -> None:
        """Add the products of columns of factors and rows of `b` to the rows at `sums`; ask for what is at `later`."""
        builder, rows = self.builder, len(sums)

        def step(r: Any, totals: list[Any]) -> list[Any]:
            self.prefetch(self.at(later, builder.mul(r, self.index(rows))))
            b_row = self.load_row(self.at(b, builder.mul(r, b_stride)), masks)
            row = self.at(factors, builder.mul(r, stride))
            return self._products([self.spread_at(row, n) for n in range(rows)], b_row, totals)

        before = [value for row in sums for value in self.load_row(row, masks)]
        self._store(self.loop(1, self.index(0), depth, before, step)[1], sums, masks)

    def _products(self, factors: list[Any], values: list[Any], totals: list[Any]) -> list[Any]:
        """Return the totals of a tile with the products of its rows' factors and its columns' values."""
        pairs = [(factor, value) for factor in factors for value in values]
        return [self.multiply_add(*pair, total) for pair, total in zip(pairs, totals, strict=True)]

    def _store(self, totals: list[Any], rows: list[Any], masks: list[Any]) -> None:
        """Store the vectors of a tile."""
        for number, row in enumerate(rows):
            self.store_row(totals[number * len(masks) :][: len(masks)], row, masks)
