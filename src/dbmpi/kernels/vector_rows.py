"""Products with rows that lie anywhere in memory: what layers of filters on fields are made of.

A tile may be partly filled: nothing is read or written beyond its columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from numba import types

from dbmpi.kernels.vector import CACHE_LINE, Arguments, MaskedWriter, Writer, instructions


@instructions
def multiply_rows(
    typingctx: Any,
    rows: Any,
    vectors: Any,
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
    ahead: Any,
) -> Any:
    """Multiply a strip of `a` by rows of `b` that lie anywhere, into one tile of `out`, all of it in registers.

    ``out[r, c] (+)= sum over first <= k < last of a[r, k] * b[places[k] + c]`` for `rows` rows and `filled` columns,
    summed in the order of k.  The arrays are flat; indices are not checked.  Nothing is read or written beyond the
    `filled` columns.

    Parameters
    ----------
    rows, vectors : constants
        Shape of the tile, in rows and vectors; without rows, nothing is done.
    a, b, out : 1-D arrays of one float type
        Element (r, k) of the strip is ``a[a_start + r * a_stride + k]``.
    b_start : int
        Added to all places.
    places : 1-D int64 array
        Where the rows of `b` start.
    out_start, out_stride : int
        Position of the tile, and distance of its rows.
    filled : int
        Columns of the tile, at least 1 and at most ``vectors * lanes``.
    add : bool
        Add to what is in `out`, instead of replacing it.
    ahead : constant
        Whether to ask for the strip after the next one below.
    """
    if not isinstance(ahead, types.BooleanLiteral):
        return None
    if not all(isinstance(constant, types.IntegerLiteral) for constant in (rows, vectors)):
        return None
    index = types.intp
    signature = types.void(
        *(rows, vectors, a, index, index, b, index, places, index, index),
        *(out, index, index, index, types.boolean, ahead),
    )

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        if rows.literal_value > 0:
            given = Arguments(context, builder, signature, values)
            tile = _RowTile(builder, given.itemsize(2), rows.literal_value, values[13])
            a, b, places, out = (given.pointer(*at) for at in ((2, 3), (5, 6), (7,), (10, 11)))
            later = tile.later(a, values[4]) if ahead.literal_value else None
            for masks in tile.variants(vectors.literal_value):
                tile.multiply(masks, a, values[4], b, places, values[8], values[9], out, values[12], values[14], later)
        return context.get_dummy_value()

    return signature, generate


@instructions
def add_to_rows(
    typingctx: Any,
    rows: Any,
    vectors: Any,
    a: Any,
    a_start: Any,
    a_stride: Any,
    b: Any,
    b_start: Any,
    b_stride: Any,
    out: Any,
    out_start: Any,
    columns: Any,
    places: Any,
    first: Any,
    last: Any,
    filled: Any,
) -> Any:
    """Multiply a transposed strip of `a` by a tile of `b` that stays in registers, into rows that lie anywhere.

    ``out[places[n] + c] += sum over r < rows of a[r, columns[n]] * b[r, c]`` for ``first <= n < last`` and `filled`
    columns c, summed in the order of r.  The transpose of :func:`multiply_rows`; the rows of `out` must not overlap.

    Parameters
    ----------
    rows, vectors, filled
        As for `multiply_rows`.
    a, b, out : 1-D arrays of one float type
        Element (r, k) of the strip is ``a[a_start + r * a_stride + k]``; row r of the tile starts at
        ``b_start + r * b_stride``.
    out_start : int
        Added to all places.
    columns, places : 1-D int64 arrays
        Columns of `a`, and where the rows of `out` start.
    """
    if not all(isinstance(constant, types.IntegerLiteral) for constant in (rows, vectors)):
        return None
    index = types.intp
    signature = types.void(
        *(rows, vectors, a, index, index, b, index, index, out, index),
        *(columns, places, index, index, index),
    )

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        if rows.literal_value > 0:
            given = Arguments(context, builder, signature, values)
            tile = _RowTile(builder, given.itemsize(2), rows.literal_value, values[14])
            a, b, out, columns_of_a, rows_of_out = (given.pointer(*at) for at in ((2, 3), (5, 6), (8, 9), (10,), (11,)))
            for masks in tile.variants(vectors.literal_value):
                tile.add(masks, a, values[4], b, values[7], out, columns_of_a, rows_of_out, values[12], values[13])
        return context.get_dummy_value()

    return signature, generate


@instructions
def add_maps_to_rows(
    typingctx: Any,
    rows: Any,
    vectors: Any,
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
    """Multiply some columns of `a` by rows of `b`, into rows that lie anywhere, which are in registers meanwhile.

    ``out[places[first + n] + c] += sum over r < depth of a[r, first + n] * b[r, c]`` for ``n < rows`` and `filled`
    columns c, summed in the order of r.  The transpose of :func:`multiply_rows`; the rows of `out` must not overlap.

    Parameters
    ----------
    rows, vectors : constants
        Shape of the tile, in rows of `out` and vectors; without rows, nothing is done.
    a, b, out : 1-D arrays of one float type
        Element (r, k) of the first is ``a[a_start + r * a_stride + k]``, element (r, c) of the second
        ``b[b_start + r * b_stride + c]``.
    out_start : int
        Added to all places.
    places : 1-D int64 array
        Where the rows of `out` start.
    depth : int
        Rows of `a` and `b`.  As many rows of `a` are asked for that come after them, a share in every tile.
    filled : int
        As for `multiply_rows`.
    """
    if not all(isinstance(constant, types.IntegerLiteral) for constant in (rows, vectors)):
        return None
    index = types.intp
    signature = types.void(
        *(rows, vectors, a, index, index, b, index, index, out, index),
        *(places, index, index, index),
    )

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        if rows.literal_value > 0:
            given = Arguments(context, builder, signature, values)
            tile = _RowTile(builder, given.itemsize(2), rows.literal_value, values[13])
            a, b, out, places = (given.pointer(*at) for at in ((2, 3), (5, 6), (8, 9), (10, 11)))
            for masks in tile.variants(vectors.literal_value):
                tile.add_all(masks, a, values[4], b, values[7], out, places, values[11], values[12])
        return context.get_dummy_value()

    return signature, generate


@instructions
def prefetch(typingctx: Any, a: Any, first: Any, last: Any, written: Any) -> Any:
    """Ask for the cache lines of the elements ``first <= n < last`` of a 1-D array.

    `written` is a constant: whether they will be written.
    """
    if not isinstance(written, types.BooleanLiteral):
        return None
    index = types.intp
    signature = types.void(a, index, index, written)

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        given = Arguments(context, builder, signature, values)
        writer, start = Writer(builder, given.itemsize(0)), given.pointer(0)

        def ask(n: Any, nothing: list[Any]) -> list[Any]:
            writer.prefetch(writer.at(start, n), write=written.literal_value)
            return nothing

        writer.loop(CACHE_LINE // writer.itemsize, values[1], values[2], [], ask)
        return context.get_dummy_value()

    return signature, generate


class _RowTile(MaskedWriter):
    """The instructions of `multiply_rows`, `add_to_rows` and `add_maps_to_rows`; `filled` is the number of columns."""

    def __init__(self, builder: Any, itemsize: int, rows: int, filled: Any) -> None:
        super().__init__(builder, itemsize)
        self.rows, self.filled = rows, filled

    def variants(self, vectors: int) -> Iterator[list[Any]]:
        """Yield the masks of the tile's vectors, None for a full one, each time in a branch for so many columns."""
        builder = self.builder
        with builder.if_else(builder.icmp_signed(">=", self.filled, self.index(vectors * self.lanes))) as (full, part):
            with full:
                yield [None] * vectors
            with part:
                if vectors == 1:
                    yield self.masks(1, self.filled)
                else:
                    with builder.if_else(builder.icmp_signed(">", self.filled, self.index(self.lanes))) as (some, one):
                        with some:
                            yield self.masks(vectors, self.filled)
                        with one:
                            yield self.masks(1, self.filled)

    def later(self, a: Any, a_stride: Any) -> Any:
        """Return where the strip after the next one starts."""
        return self.at(a, self.builder.mul(a_stride, self.index(2 * self.rows)))

    def ask_for(self, later: Any, k: Any, count: int) -> None:
        """Ask for `count` steps' share of a strip, in the order of memory, when at step k."""
        ahead = self.at(later, self.builder.mul(k, self.index(self.rows)))
        for byte in range(0, count * self.rows * self.itemsize, CACHE_LINE):
            self.prefetch(self.at(ahead, byte // self.itemsize))

    def multiply(
        self,
        masks: list[Any],
        a: Any,
        a_stride: Any,
        b: Any,
        places: Any,
        first: Any,
        last: Any,
        out: Any,
        out_stride: Any,
        add: Any,
        later: Any,
    ) -> None:
        """Write `multiply_rows`; arrays are addresses."""
        builder = self.builder
        strips = self.strided(a, a_stride, self.rows)
        out_rows = self.strided(out, out_stride, self.rows)
        for row in out_rows:
            for vector in range(len(masks)):
                self.prefetch(self.at(row, vector * self.lanes), write=True)

        def steps(k: Any, count: int, totals: list[Any]) -> list[Any]:
            if later is not None:
                self.ask_for(later, k, count)
            for offset in range(count):
                b_row = self.load_row(self.at(b, builder.load(self.at(places, k, offset))), masks)
                factors = [self.spread_at(strip, k, offset) for strip in strips]
                pairs = [(factor, values) for factor in factors for values in b_row]
                totals = [self.multiply_add(*pair, total) for pair, total in zip(pairs, totals, strict=True)]
            return totals

        # For large tiles, one step at a time: of several, LLVM would load all factors first and spill them, to a stack
        # that is not aligned to vectors.  Small ones have registers for it, and too few instructions in one step.
        size = self.rows * len(masks)
        at_once = 1 if size > 8 else 2 if size > 4 else self.unrolled
        sums = self.unrolled_loop(at_once, first, last, [self.zero] * size, steps)
        totals = [sums[row * len(masks) :][: len(masks)] for row in range(self.rows)]
        with builder.if_else(builder.icmp_signed("!=", add, add.type(0))) as (adding, replacing):
            with adding:
                for row, values in zip(out_rows, totals, strict=True):
                    before = self.load_row(row, masks)
                    after = [builder.fadd(one, other) for one, other in zip(before, values, strict=True)]
                    self.store_row(after, row, masks)
            with replacing:
                for row, values in zip(out_rows, totals, strict=True):
                    self.store_row(values, row, masks)

    def add(
        self,
        masks: list[Any],
        a: Any,
        a_stride: Any,
        b: Any,
        b_stride: Any,
        out: Any,
        columns: Any,
        places: Any,
        first: Any,
        last: Any,
    ) -> None:
        """Write `add_to_rows`; arrays are addresses."""
        builder = self.builder
        strips = self.strided(a, a_stride, self.rows)
        tile = [self.load_row(row, masks) for row in self.strided(b, b_stride, self.rows)]
        later = self.later(a, a_stride)

        def steps(n: Any, count: int, nothing: list[Any]) -> list[Any]:
            self.ask_for(later, n, count)
            rows = [self.at(out, builder.load(self.at(places, n, offset))) for offset in range(count)]
            selected = [builder.load(self.at(columns, n, offset)) for offset in range(count)]
            totals = [self.load_row(row, masks) for row in rows]
            for strip, values in zip(strips, tile, strict=True):
                for number, column in enumerate(selected):
                    factor = self.spread_at(strip, column)
                    totals[number] = [
                        self.multiply_add(factor, value, total)
                        for value, total in zip(values, totals[number], strict=True)
                    ]
            for row, total in zip(rows, totals, strict=True):
                self.store_row(total, row, masks)
            return nothing

        self.unrolled_loop(2, first, last, [], steps)  # two, for more multiply-adds that do not wait for one another

    def add_all(
        self,
        masks: list[Any],
        a: Any,
        a_stride: Any,
        b: Any,
        b_stride: Any,
        out: Any,
        places: Any,
        first: Any,
        depth: Any,
    ) -> None:
        """Write `add_maps_to_rows`; arrays are addresses."""
        builder = self.builder
        factors = self.at(a, first)
        # What comes next is asked for in the order of memory, by tiles and then by rows.
        later = self.at(a, builder.mul(depth, builder.add(a_stride, first)))
        rows = [self.at(out, builder.load(self.at(places, n))) for n in range(self.rows)]
        before = [value for row in rows for value in self.load_row(row, masks)]

        def step(r: Any, totals: list[Any]) -> list[Any]:
            self.prefetch(self.at(later, builder.mul(r, self.index(self.rows))))
            values = self.load_row(self.at(b, builder.mul(r, b_stride)), masks)
            row = self.at(factors, builder.mul(r, a_stride))
            pairs = [
                (factor, value) for n in range(self.rows) for factor in [self.spread_at(row, n)] for value in values
            ]
            return [self.multiply_add(*pair, total) for pair, total in zip(pairs, totals, strict=True)]

        totals = self.loop(1, self.index(0), depth, before, step)[1]
        for n, row in enumerate(rows):
            self.store_row(totals[n * len(masks) :][: len(masks)], row, masks)
