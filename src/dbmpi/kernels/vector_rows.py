"""Products with rows that lie anywhere in memory: what layers of filters on fields are made of.

A tile here may be partly filled: nothing is read or written beyond its columns.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types

from dbmpi.kernels.vector import CACHE_LINE, Arguments, Writer, instructions


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
    """
    if not all(isinstance(constant, types.IntegerLiteral) for constant in (rows, vectors)):
        return None
    index = types.intp
    signature = types.void(
        *(rows, vectors, a, index, index, b, index, places, index, index),
        *(out, index, index, index, types.boolean),
    )

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        if rows.literal_value > 0:
            given = Arguments(context, builder, signature, values)
            tile = _RowTile(builder, given.itemsize(2), rows.literal_value, values[13])
            a, b, places, out = (given.pointer(*at) for at in ((2, 3), (5, 6), (7,), (10, 11)))
            for masks in tile.variants(vectors.literal_value):
                tile.multiply(masks, a, values[4], b, places, values[8], values[9], out, values[12], values[14])
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
def multiply_along_rows(
    typingctx: Any,
    rows: Any,
    columns: Any,
    a: Any,
    a_start: Any,
    a_stride: Any,
    a_step: Any,
    b: Any,
    b_start: Any,
    b_step: Any,
    places: Any,
    first: Any,
    out: Any,
    out_start: Any,
    runs: Any,
    length: Any,
) -> Any:
    """Multiply rows of `a` by rows of `b` that lie anywhere, each along the row, and add the sums to `out`.

    ``out[out_start + c * rows + r] += sum over n < runs, s < length of a[a_start + n * a_step + r * a_stride + s] *
    b[b_start + n * b_step + places[first + c] + s]`` for `rows` rows of `a` and `columns` of `b`.  Every
    lane of a vector has a sum of its own; these are added at the end.

    Parameters
    ----------
    rows, columns : constants
        Without rows, nothing is done.
    a, b, out : 1-D arrays of one float type
    places : 1-D int64 array
    runs, length : int
        Number of pieces that the rows consist of, and elements of each.
    """
    if not all(isinstance(constant, types.IntegerLiteral) for constant in (rows, columns)):
        return None
    index = types.intp
    signature = types.void(
        *(rows, columns, a, index, index, index, b, index, index, places, index, out, index, index, index)
    )

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        if rows.literal_value > 0:
            given = Arguments(context, builder, signature, values)
            tile = _RowTile(builder, given.itemsize(2), rows.literal_value, values[14])
            a, b, places, out = (given.pointer(*at) for at in ((2, 3), (6, 7), (9, 10), (11, 12)))
            tile.multiply_along(columns.literal_value, a, values[4], values[5], b, values[8], places, values[13], out)
        return context.get_dummy_value()

    return signature, generate


@instructions
def transpose_block(
    typingctx: Any,
    a: Any,
    a_start: Any,
    places: Any,
    first: Any,
    height: Any,
    width: Any,
    out: Any,
    out_start: Any,
    out_stride: Any,
) -> Any:
    """Transpose a block of at most lanes x lanes elements whose rows lie anywhere.

    ``out[out_start + c * out_stride + r] = a[a_start + places[first + r] + c]`` for r < `height` and c < `width`.
    Where these are less than lanes, the rest of a whole block of `out` is overwritten, too.

    Parameters
    ----------
    a, out : 1-D arrays of one float type
    places : 1-D int64 array
    height, width : int
        At least 1; more than the lanes count as so many.
    """
    if not isinstance(a, types.Array):
        return None
    index = types.intp
    signature = types.void(a, index, places, index, index, index, out, index, index)

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        given = Arguments(context, builder, signature, values)
        block = _RowTile(builder, given.itemsize(0), 1, values[5])
        block.transpose(given.pointer(0, 1), given.pointer(2, 3), values[4], given.pointer(6, 7), values[8])
        return context.get_dummy_value()

    return signature, generate


@instructions
def prefetch_written(typingctx: Any, a: Any, first: Any, last: Any) -> Any:
    """Ask for the cache lines of the elements ``first <= n < last`` of a 1-D array, which will be overwritten."""
    index = types.intp
    signature = types.void(a, index, index)

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        given = Arguments(context, builder, signature, values)
        writer, start = Writer(builder, given.itemsize(0)), given.pointer(0)

        def ask(n: Any, nothing: list[Any]) -> list[Any]:
            writer.prefetch(writer.at(start, n), write=True)
            return nothing

        writer.loop(CACHE_LINE // writer.itemsize, values[1], values[2], [], ask)
        return context.get_dummy_value()

    return signature, generate


class _RowTile(Writer):
    """The instructions of this module.

    `filled` is the number of columns, or the length of a row; a list of masks, one a vector, says which of its elements
    are among them: all where a mask is None.
    """

    def __init__(self, builder: Any, itemsize: int, rows: int, filled: Any) -> None:
        super().__init__(builder, itemsize)
        self.rows, self.filled = rows, filled
        mask, pointer = ir.VectorType(ir.IntType(1), self.lanes), self.vector.as_pointer()
        name = f"v{self.lanes}f{8 * itemsize}.p0"
        self._masked_load = self.declared(
            f"llvm.masked.load.{name}", self.vector, [pointer, self.short, mask, self.vector]
        )
        self._masked_store = self.declared(
            f"llvm.masked.store.{name}", ir.VoidType(), [self.vector, pointer, self.short, mask]
        )

    def variants(self, vectors: int) -> Iterator[list[Any]]:
        """Yield the masks of the tile's vectors, None for a full one, each time in a branch for so many columns."""
        builder = self.builder
        with builder.if_else(builder.icmp_signed(">=", self.filled, self.index(vectors * self.lanes))) as (full, part):
            with full:
                yield [None] * vectors
            with part:
                if vectors == 1:
                    yield self._masks(1, self.filled)
                else:
                    with builder.if_else(builder.icmp_signed(">", self.filled, self.index(self.lanes))) as (some, one):
                        with some:
                            yield self._masks(vectors, self.filled)
                        with one:
                            yield self._masks(1, self.filled)

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
    ) -> None:
        """Write `multiply_rows`; arrays are addresses."""
        builder = self.builder
        strips = self.strided(a, a_stride, self.rows)
        out_rows = self.strided(out, out_stride, self.rows)
        for row in out_rows:
            for vector in range(len(masks)):
                self.prefetch(self.at(row, vector * self.lanes), write=True)

        def steps(k: Any, count: int, totals: list[Any]) -> list[Any]:
            for offset in range(count):
                b_row = self._load_row(self.at(b, builder.load(self.at(places, k, offset))), masks)
                factors = [self.spread_at(strip, k, offset) for strip in strips]
                pairs = [(factor, values) for factor in factors for values in b_row]
                totals = [self.multiply_add(*pair, total) for pair, total in zip(pairs, totals, strict=True)]
            return totals

        sums = self.unrolled_loop(self.unrolled, first, last, [self.zero] * (self.rows * len(masks)), steps)
        totals = [sums[row * len(masks) :][: len(masks)] for row in range(self.rows)]
        with builder.if_else(builder.icmp_signed("!=", add, add.type(0))) as (adding, replacing):
            with adding:
                for row, values in zip(out_rows, totals, strict=True):
                    before = self._load_row(row, masks)
                    after = [builder.fadd(one, other) for one, other in zip(before, values, strict=True)]
                    self._store_row(after, row, masks)
            with replacing:
                for row, values in zip(out_rows, totals, strict=True):
                    self._store_row(values, row, masks)

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
        tile = [self._load_row(row, masks) for row in self.strided(b, b_stride, self.rows)]
        below = self.at(a, builder.mul(a_stride, self.index(self.rows)))

        def steps(n: Any, count: int, nothing: list[Any]) -> list[Any]:
            if count > 1:  # the strip below is needed next; asked for in the order of memory
                ahead = self.at(below, builder.mul(n, self.index(self.rows)))
                for byte in range(0, count * self.rows * self.itemsize, CACHE_LINE):
                    self.prefetch(self.at(ahead, byte // self.itemsize), level=2)
            rows = [self.at(out, builder.load(self.at(places, n, offset))) for offset in range(count)]
            selected = [builder.load(self.at(columns, n, offset)) for offset in range(count)]
            totals = [self._load_row(row, masks) for row in rows]
            for strip, values in zip(strips, tile, strict=True):
                for number, column in enumerate(selected):
                    factor = self.spread_at(strip, column)
                    totals[number] = [
                        self.multiply_add(factor, value, total)
                        for value, total in zip(values, totals[number], strict=True)
                    ]
            for row, total in zip(rows, totals, strict=True):
                self._store_row(total, row, masks)
            return nothing

        self.unrolled_loop(2, first, last, [], steps)  # two, for more multiply-adds that do not wait for one another

    def multiply_along(
        self,
        columns: int,
        a: Any,
        a_stride: Any,
        a_step: Any,
        b: Any,
        b_step: Any,
        places: Any,
        runs: Any,
        out: Any,
    ) -> None:
        """Write `multiply_along_rows`; arrays are addresses."""
        builder = self.builder
        row_places = [builder.load(self.at(places, column)) for column in range(columns)]
        whole = builder.and_(self.filled, self.index(-self.lanes))

        def one_run(n: Any, sums: list[Any]) -> list[Any]:
            strips = self.strided(self.at(a, builder.mul(n, a_step)), a_stride, self.rows)
            b_rows = [self.at(b, builder.mul(n, b_step), place) for place in row_places]

            def steps(masks: list[Any], s: Any, sums: list[Any]) -> list[Any]:
                others = [self._load_row(self.at(row, s), masks)[0] for row in b_rows]
                sums = list(sums)
                for number, strip in enumerate(strips):  # one at a time: there is no register for more
                    (value,) = self._load_row(self.at(strip, s), masks)
                    for place in range(number, len(sums), self.rows):
                        sums[place] = self.multiply_add(value, others[place // self.rows], sums[place])
                return sums

            def full(s: Any, sums: list[Any]) -> list[Any]:
                return steps([None], s, sums)

            def rest(s: Any, sums: list[Any]) -> list[Any]:
                return steps(self._masks(1, builder.sub(self.filled, s)), s, sums)

            s, sums = self.loop(self.lanes, self.index(0), whole, sums, full)
            return self.loop(self.lanes, s, self.filled, sums, rest)[1]

        _, sums = self.loop(1, self.index(0), runs, [self.zero] * (self.rows * columns), one_run)
        for first in range(0, len(sums), self.lanes):
            some = sums[first : first + self.lanes]
            place = self.at(out, first)
            mask = ir.Constant(ir.VectorType(ir.IntType(1), self.lanes), [n < len(some) for n in range(self.lanes)])
            masks = [mask if len(some) < self.lanes else None]
            (before,) = self._load_row(place, masks)
            self._store_row([builder.fadd(before, self._sums_of_lanes(some))], place, masks)

    def _sums_of_lanes(self, vectors: list[Any]) -> Any:
        """Return a vector whose element n is the sum of the elements of vector n; 0 where there is none."""
        vectors = vectors + [self.zero] * (self.lanes - len(vectors))
        half = self.lanes // 2
        while half:
            # Every vector holds pieces of 2 * half elements, each of which is to be summed.
            lower = [n + k for n in range(0, 2 * self.lanes, 2 * half) for k in range(half)]
            upper = [n + half for n in lower]
            pairs = zip(vectors[::2], vectors[1::2], strict=True)
            vectors = [self.builder.fadd(self.shuffle(*pair, lower), self.shuffle(*pair, upper)) for pair in pairs]
            half //= 2
        return vectors[0]

    def transpose(self, a: Any, places: Any, height: Any, out: Any, out_stride: Any) -> None:
        """Write `transpose_block`; arrays are addresses."""
        builder = self.builder
        within = self._masks(1, self.filled)
        rows = []
        for row in range(self.lanes):
            # Rows that there are not are read from the place of the first.
            inside = builder.icmp_signed("<", self.index(row), height)
            place = builder.load(self.at(places, builder.select(inside, self.index(row), self.index(0))))
            rows += self._load_row(self.at(a, place), within)
        for bit, lower, upper in self._exchanges():
            swapped = list(rows)
            for row in range(self.lanes):
                if not row & bit:
                    swapped[row] = self.shuffle(rows[row], rows[row + bit], lower)
                    swapped[row + bit] = self.shuffle(rows[row], rows[row + bit], upper)
            rows = swapped
        for row, target in zip(rows, self.strided(out, out_stride, self.lanes), strict=True):
            self.store(row, target)

    def _exchanges(self) -> Iterator[tuple[int, list[int], list[int]]]:
        """Yield the steps of a transposition: a bit of the rows' numbers, and what two rows that differ in it become.

        Every step brings this bit into the lanes' numbers, and one of their bits into the rows' numbers.  Of the ways
        to do that, these are single instructions: they interleave elements within 16 bytes, or move 16 bytes.
        """
        both, unit = list(range(2 * self.lanes)), 16 // self.itemsize
        units = [both[start : start + unit] for start in range(0, len(both), unit)]
        pairs = list(zip(units[: len(units) // 2], units[len(units) // 2 :], strict=True))
        joined = itertools.chain.from_iterable
        bit = unit
        while bit > 1:
            bit //= 2
            woven = [list(joined(zip(*pair, strict=True))) for pair in pairs]
            yield bit, list(joined(each[:unit] for each in woven)), list(joined(each[unit:] for each in woven))
        bit = unit
        while bit < self.lanes:
            lower, upper = (list(joined(joined(zip(*pairs[odd::2], strict=True)))) for odd in (0, 1))
            yield bit, lower, upper
            bit *= 2

    def _masks(self, vectors: int, filled: Any) -> list[Any]:
        """Return the masks of vectors of which so many elements are filled."""
        builder, many = self.builder, ir.VectorType(self.index, self.lanes)
        start = ir.Constant(many, ir.Undefined)
        counts = self.shuffle(builder.insert_element(start, filled, self.short(0)), start, [0] * self.lanes)
        return [
            builder.icmp_signed("<", ir.Constant(many, list(range(first, first + self.lanes))), counts)
            for first in range(0, vectors * self.lanes, self.lanes)
        ]

    def _load_row(self, row: Any, masks: list[Any]) -> list[Any]:
        values = []
        for vector, mask in enumerate(masks):
            place = self.at(row, vector * self.lanes)
            if mask is None:
                values.append(self.load(place))
            else:
                arguments = [self.as_vector(place), self.short(self.itemsize), mask, self.zero]
                values.append(self.builder.call(self._masked_load, arguments))
        return values

    def _store_row(self, values: list[Any], row: Any, masks: list[Any]) -> None:
        for vector, (value, mask) in enumerate(zip(values, masks, strict=True)):
            place = self.at(row, vector * self.lanes)
            if mask is None:
                self.store(value, place)
            else:
                arguments = [value, self.as_vector(place), self.short(self.itemsize), mask]
                self.builder.call(self._masked_store, arguments)
