"""What goes across the lanes of vectors: sums along rows, and transposition."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types

from dbmpi.kernels.vector import Arguments, MaskedWriter, instructions, lanes


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
            tile = _LaneTile(builder, given.itemsize(2), rows.literal_value)
            a, b, places, out = (given.pointer(*at) for at in ((2, 3), (6, 7), (9, 10), (11, 12)))
            a_stride, a_step, b_step, runs, length = (values[at] for at in (4, 5, 8, 13, 14))
            tile.multiply(columns.literal_value, a, a_stride, a_step, b, b_step, places, runs, length, out)
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
        block = _LaneTile(builder, given.itemsize(0), lanes(given.itemsize(0)))
        block.transpose(given.pointer(0, 1), given.pointer(2, 3), values[4], values[5], given.pointer(6, 7), values[8])
        return context.get_dummy_value()

    return signature, generate


class _LaneTile(MaskedWriter):
    """The instructions of `multiply_along_rows` and `transpose_block`."""

    def __init__(self, builder: Any, itemsize: int, rows: int) -> None:
        super().__init__(builder, itemsize)
        self.rows = rows

    def multiply(
        self,
        columns: int,
        a: Any,
        a_stride: Any,
        a_step: Any,
        b: Any,
        b_step: Any,
        places: Any,
        runs: Any,
        length: Any,
        out: Any,
    ) -> None:
        """Write `multiply_along_rows`; arrays are addresses."""
        builder = self.builder
        row_places = [builder.load(self.at(places, column)) for column in range(columns)]
        whole = builder.and_(length, self.index(-self.lanes))

        def one_run(n: Any, sums: list[Any]) -> list[Any]:
            strips = self.strided(self.at(a, builder.mul(n, a_step)), a_stride, self.rows)
            b_rows = [self.at(b, builder.mul(n, b_step), place) for place in row_places]

            def steps(masks: list[Any], s: Any, sums: list[Any]) -> list[Any]:
                others = [self.load_row(self.at(row, s), masks)[0] for row in b_rows]
                sums = list(sums)
                for number, strip in enumerate(strips):  # one at a time: there is no register for more
                    (value,) = self.load_row(self.at(strip, s), masks)
                    for place in range(number, len(sums), self.rows):
                        sums[place] = self.multiply_add(value, others[place // self.rows], sums[place])
                return sums

            def full(s: Any, sums: list[Any]) -> list[Any]:
                return steps([None], s, sums)

            def rest(s: Any, sums: list[Any]) -> list[Any]:
                return steps(self.masks(1, builder.sub(length, s)), s, sums)

            s, sums = self.loop(self.lanes, self.index(0), whole, sums, full)
            return self.loop(self.lanes, s, length, sums, rest)[1]

        _, sums = self.loop(1, self.index(0), runs, [self.zero] * (self.rows * columns), one_run)
        for first in range(0, len(sums), self.lanes):
            some = sums[first : first + self.lanes]
            place = self.at(out, first)
            mask = ir.Constant(ir.VectorType(ir.IntType(1), self.lanes), [n < len(some) for n in range(self.lanes)])
            masks = [mask if len(some) < self.lanes else None]
            (before,) = self.load_row(place, masks)
            self.store_row([builder.fadd(before, self._sums_of_lanes(some))], place, masks)

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

    def transpose(self, a: Any, places: Any, height: Any, width: Any, out: Any, out_stride: Any) -> None:
        """Write `transpose_block`; arrays are addresses."""
        builder = self.builder
        within = self.masks(1, width)
        rows = []
        for row in range(self.rows):
            # Rows that there are not are read from the place of the first.
            inside = builder.icmp_signed("<", self.index(row), height)
            place = builder.load(self.at(places, builder.select(inside, self.index(row), self.index(0))))
            rows += self.load_row(self.at(a, place), within)
        for bit, lower, upper in self._exchanges():
            swapped = list(rows)
            for row in range(self.rows):
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
