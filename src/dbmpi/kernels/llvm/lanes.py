"""Operations across the lanes of vectors: sums along rows, and transposition."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]

from dbmpi.kernels.llvm.writer import Call, MaskedWriter, instructions


@instructions("tile blocks a a_start a_stride a_step b b_start b_step offsets depth runs length out", constants="tile")
def multiply_along_rows(call: Call) -> None:
    """Multiply rows of `a` by rows of `b` that lie anywhere, each along the row, and add the sums to `out`.

    The sum for rows r of `a` and c of `b` is that of ``a[a_start + n * a_step + r * a_stride + s] *
    b[b_start + n * b_step + offsets[c] + s]`` over n < `runs` and s < `length`.  Every lane of a vector has a sum, and
    these are added at the end.  In `out`, the sums of each block of rows of `a` are (rows of `b`, rows of `a`).

    Arguments of the call
    ---------------------
    tile : constants
        Height of the first blocks of rows of `a`, that of the others (0 if there are none), and rows of `b` at a time.
    blocks : (int, int)
        How many there are of each height.
    a, b, out : 1-D arrays of one float type
    offsets : 1-D int64 array
    depth : int
        Rows of `b`, a multiple of those at a time.
    runs, length : int
        Number of pieces that the rows consist of, and elements of each.
    """
    writer, builder = _Lanes(call.builder, call.itemsize("a")), call.builder
    a, b, offsets = call.pointer("a", "a_start"), call.pointer("b", "b_start"), call.pointer("offsets")
    *heights, columns = call.constant("tile")
    for rows, top in writer.blocks(heights, call.numbers("blocks")):
        strips = writer.strided(writer.at(a, builder.mul(top, call["a_stride"])), call["a_stride"], rows)
        sums = writer.at(call.pointer("out"), builder.mul(top, call["depth"]))
        for _, first in writer.blocks([columns], [builder.udiv(call["depth"], writer.index(columns))]):
            some = [writer.at(b, builder.load(writer.at(offsets, first, column))) for column in range(columns)]
            sums_of_some = writer.at(sums, builder.mul(first, writer.index(rows)))
            writer.multiply(strips, call["a_step"], some, call["b_step"], call["runs"], call["length"], sums_of_some)


@instructions("tile blocks a a_start a_stride length out out_start", constants="tile")
def sum_along_rows(call: Call) -> None:
    """Write the sum of each row of `a` into `out`: of ``a[a_start + r * a_stride + s]`` over s < `length`.

    Every lane of a vector has a sum of its own; these are added at the end.

    Arguments of the call
    ---------------------
    tile : constants
        Height of the first blocks of rows, that of the others (0 if there are none), and a number that does not count.
    blocks : (int, int)
        How many there are of each height.
    a, out : 1-D arrays of one float type
    length : int
        Elements of a row.
    """
    writer, stride = _Lanes(call.builder, call.itemsize("a")), call["a_stride"]
    a, out = call.pointer("a", "a_start"), call.pointer("out", "out_start")
    *heights, _ = call.constant("tile")
    for rows, top in writer.blocks(heights, call.numbers("blocks")):
        strips = writer.strided(writer.at(a, call.builder.mul(top, stride)), stride, rows)
        writer.sum(strips, call["length"], writer.at(out, top))


@instructions("a a_start offsets first height width out out_start out_stride")
def transpose_block(call: Call) -> None:
    """Transpose a block of at most lanes x lanes elements whose rows lie anywhere.

    ``out[out_start + c * out_stride + r] = a[a_start + offsets[first + r] + c]`` for r < `height` and c < `width`.
    Where these are less than lanes, the rest of a whole block of `out` is overwritten, too.

    Arguments of the call
    ---------------------
    a, out : 1-D arrays of one float type
    offsets : 1-D int64 array
    height, width : int
        At least 1; more than the lanes count as so many.
    """
    block = _Lanes(call.builder, call.itemsize("a"))
    a, offsets, out = call.pointer("a", "a_start"), call.pointer("offsets", "first"), call.pointer("out", "out_start")
    block.transpose(a, offsets, call["height"], call["width"], out, call["out_stride"])


class _Lanes(MaskedWriter):
    """The instructions of the functions above; arrays are addresses."""

    def multiply(
        self, strips: list[Any], a_step: Any, others: list[Any], b_step: Any, runs: Any, length: Any, out: Any
    ) -> None:
        """Add the products along strips of `a` and rows of `b` to the sums at `out`."""
        builder, rows = self.builder, len(strips)

        def one_run(n: Any, sums: list[Any]) -> list[Any]:
            a_rows = [self.at(strip, builder.mul(n, a_step)) for strip in strips]
            b_rows = [self.at(other, builder.mul(n, b_step)) for other in others]

            def steps(masks: list[Any], s: Any, sums: list[Any]) -> list[Any]:
                values = [self.load_row(self.at(row, s), masks)[0] for row in b_rows]
                sums = list(sums)
                for number, row in enumerate(a_rows):  # one at a time: there is no register for more
                    (factor,) = self.load_row(self.at(row, s), masks)
                    for position in range(number, len(sums), rows):
                        sums[position] = self.multiply_add(factor, values[position // rows], sums[position])
                return sums

            return self._along(length, sums, steps)

        _, sums = self.loop(1, self.index(0), runs, [self.zero] * (rows * len(others)), one_run)
        for address, masks, some in self._totals(out, sums):
            (before,) = self.load_row(address, masks)
            self.store_row([builder.fadd(before, some)], address, masks)

    def sum(self, strips: list[Any], length: Any, out: Any) -> None:
        """Write the sums of strips to `out`."""

        def steps(masks: list[Any], s: Any, sums: list[Any]) -> list[Any]:
            values = [self.load_row(self.at(strip, s), masks)[0] for strip in strips]
            return [self.builder.fadd(total, value) for total, value in zip(sums, values, strict=True)]

        for address, masks, some in self._totals(out, self._along(length, [self.zero] * len(strips), steps)):
            self.store_row([some], address, masks)

    def _along(
        self, length: Any, carried: list[Any], steps: Callable[[list[Any], Any, list[Any]], list[Any]]
    ) -> list[Any]:
        """Loop along rows of a length by vectors, the last of which may have a mask; return the carried vectors."""
        whole = self.builder.and_(length, self.index(-self.lanes))

        def rest(s: Any, values: list[Any]) -> list[Any]:
            return steps(self.masks(1, self.builder.sub(length, s)), s, values)

        s, carried = self.loop(self.lanes, self.index(0), whole, carried, lambda s, values: steps([None], s, values))
        return self.loop(self.lanes, s, length, carried, rest)[1]

    def _totals(self, out: Any, sums: list[Any]) -> Iterator[tuple[Any, list[Any], Any]]:
        """Yield the sums of the lanes of vectors, after their address in `out` and their masks."""
        for first in range(0, len(sums), self.lanes):
            some = sums[first : first + self.lanes]
            mask = ir.Constant(ir.VectorType(ir.IntType(1), self.lanes), [n < len(some) for n in range(self.lanes)])
            yield self.at(out, first), [mask if len(some) < self.lanes else None], self._sums_of_lanes(some)

    def _sums_of_lanes(self, vectors: list[Any]) -> Any:
        """Return a vector whose element n is the sum of the elements of vector n; 0 where there is none."""
        vectors = vectors + [self.zero] * (self.lanes - len(vectors))
        half = self.lanes // 2
        while half:
            # Every vector holds pieces of 2 * half elements, each of which is summed.
            lower = [n + k for n in range(0, 2 * self.lanes, 2 * half) for k in range(half)]
            upper = [n + half for n in lower]
            pairs = zip(vectors[::2], vectors[1::2], strict=True)
            vectors = [self.builder.fadd(self.shuffle(*pair, lower), self.shuffle(*pair, upper)) for pair in pairs]
            half //= 2
        return vectors[0]

    def transpose(self, a: Any, offsets: Any, height: Any, width: Any, out: Any, out_stride: Any) -> None:
        """Write `transpose_block`; arrays are addresses."""
        builder = self.builder
        within = self.masks(1, width)
        rows = []
        for row in range(self.lanes):
            # Rows beyond the height are read where the first one is.
            inside = builder.icmp_signed("<", self.index(row), height)
            offset = builder.load(self.at(offsets, builder.select(inside, self.index(row), self.index(0))))
            rows += self.load_row(self.at(a, offset), within)
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
