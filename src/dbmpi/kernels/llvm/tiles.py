"""Tiles of matrix products in registers, and chains of multiply-adds to measure the processor by."""

from __future__ import annotations

import math
from functools import reduce
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]

from dbmpi.kernels.llvm.writer import REGISTERS, VECTOR_BYTES, Call, MaskedWriter, Writer, instructions
from dbmpi.kernels.memory import CACHE_LINE

SHAPES = ((6, 4), (12, 2), (24, 1)) if REGISTERS == 32 else ((6, 2), (12, 1))
"""Rows and vectors of a tile, the widest first: its sums, a row of its factors and one more fill the registers."""
LINES_AHEAD = {6: 1, 12: 4, 24: 8}
"""Neighbouring lines of `ahead` that are requested every `Writer.unrolled` steps, by rows of a tile: the more rows, the
more lines it uses up."""
_POINTERS = 6
"""Rows whose addresses fit into the processor's other registers."""


@instructions(
    "rows vectors by_columns a a_start a_stride b b_start b_next ahead ahead_start ahead_stride "
    "out out_start out_stride depth add",
    constants="rows vectors by_columns",
)
def multiply_tile(call: Call) -> None:
    """Multiply a strip of `a` by a packed panel of `b` into one tile of `out`, all of it in registers.

    ``out[r, c] (+)= sum over k < depth of a[r, k] * b[k, c]`` for `rows` rows and ``vectors * lanes`` columns,
    summed in the order of k.  The arrays are flat; indices are not checked.

    While it computes, the tile requests memory that is used later, a line at a time: many at once would keep the core
    from loading its factors.  What is requested need not exist.

    Arguments of the call
    ---------------------
    rows, vectors, by_columns : constants
        Shape of the tile; and whether the strip of `a` lies column after column (element (r, k) at
        ``a_start + r + k * a_stride``) or row after row (at ``a_start + r * a_stride + k``).
    a, b, ahead, out : 1-D arrays of one float type
        `b` holds the panel row after row, without gaps, from `b_start` on, which is aligned to a vector.
    b_next : int
        Where lines of `b` begin that are requested, as many as a quarter of `depth`.
    ahead_start, ahead_stride : int
        Position of a line of `ahead`, and distance of as many further ones, that are requested; of each, `LINES_AHEAD`
        neighbours.
    out_start, out_stride : int
        Position of the tile, and distance of its rows.  The tile below is requested, too.
    depth : int
        Number of products to sum.
    add : bool
        Add to what is in `out`, instead of replacing it.
    """
    _Tile(call).write()


class _Tile(Writer):
    """The instructions of `multiply_tile`."""

    def __init__(self, call: Call) -> None:
        super().__init__(call.builder, call.itemsize("a"))
        self.rows, self.vectors, self.by_columns = map(call.constant, ("rows", "vectors", "by_columns"))
        self.line = CACHE_LINE // self.itemsize
        self.call = call
        self.a, self.b, self.ahead, self.out = (
            call.pointer(array, f"{array}_start") for array in ("a", "b", "ahead", "out")
        )
        self.b_next = call.pointer("b", "b_next")

    def write(self) -> None:
        """Write all of it."""
        builder, depth, out_stride = self.builder, self.call["depth"], self.call["out_stride"]
        targets = [
            self.at(row, vector * self.lanes)
            for row in self.strided(self.out, out_stride, self.rows)
            for vector in range(self.vectors)
        ]
        # A row of the tile below for each of the first steps, and then steps alone.
        period = 2 * self.unrolled
        most, whole = self.index(self.rows * period), builder.and_(depth, self.index(-period))
        requesting = builder.select(builder.icmp_signed("<", depth, most), whole, most)

        def steps_with_request(k: Any, sums: list[Any]) -> list[Any]:
            row = builder.add(builder.udiv(k, self.index(period)), self.index(self.rows))
            for vector in range(self.vectors):
                self.prefetch(self.at(self.out, builder.mul(row, out_stride), vector * self.lanes), write=True)
            for first in range(0, period, self.unrolled):
                sums = self._steps(builder.add(k, self.index(first)), self.unrolled, sums)
            return sums

        k, sums = self.loop(period, self.index(0), requesting, [self.zero] * len(targets), steps_with_request)
        sums = self.unrolled_loop(self.unrolled, k, depth, sums, self._steps)
        add = self.call["add"]
        with builder.if_else(builder.icmp_signed("!=", add, add.type(0))) as (adding, replacing):
            with adding:
                for target, total in zip(targets, sums, strict=True):
                    self.store(builder.fadd(self.load(target), total), target)
            with replacing:
                for target, total in zip(targets, sums, strict=True):
                    self.store(total, target)

    def _steps(self, k: Any, count: int, sums: list[Any]) -> list[Any]:
        """Write `count` steps from k on, and return the sums."""
        builder = self.builder
        strip = self._factors_by_columns(k, count) if self.by_columns else self._factors_by_rows(k, count)
        panel = self.at(self.b, builder.mul(k, self.index(self.vectors * self.lanes)))
        if count == self.unrolled:
            self._request(k)
        for step in range(count):
            b_row = [
                self.load(self.at(panel, (step * self.vectors + vector) * self.lanes), VECTOR_BYTES)
                for vector in range(self.vectors)
            ]
            before, sums = iter(sums), []
            for factor in strip[step]:
                spread = self.spread_at(*factor)
                sums += [self.multiply_add(spread, values, next(before)) for values in b_row]
                # One factor at a time: the compiler would load many early, and sums would have to leave the registers.
                self.barrier()
        return sums

    def _request(self, k: Any) -> None:
        """Request the next panel's line for the steps from k on, and those of `ahead`."""
        builder = self.builder
        self.prefetch(self.at(self.b_next, builder.mul(k, self.index(self.line // self.unrolled))), level=2)
        number = builder.udiv(k, self.index(self.unrolled))
        ahead = self.at(self.ahead, builder.mul(number, self.call["ahead_stride"]))
        for line in range(LINES_AHEAD[self.rows]):
            self.prefetch(self.at(ahead, line * self.line), level=2)

    def _factors_by_columns(self, k: Any, count: int) -> list[list[tuple[Any, int]]]:
        """Return for each step where the strip's elements lie, as addresses and offsets."""
        stride = self.call["a_stride"]
        columns = self.strided(self.at(self.a, self.builder.mul(k, stride)), stride, count)
        return [[(column, row) for row in range(self.rows)] for column in columns]

    def _factors_by_rows(self, k: Any, count: int) -> list[list[tuple[Any, int]]]:
        stride = self.call["a_stride"]
        if self.rows <= _POINTERS:
            strip = [self.at(row, k) for row in self.strided(self.a, stride, self.rows)]
        else:
            # Three rows by one address each time: the compiler would compute all before the loop, and have them to
            # load from the stack.
            thirds = self.strided(self.at(self.a, k), self.builder.mul(stride, self.index(3)), self.rows // 3)
            strip = [row for third in thirds for row in self.strided(self.opaque(third), stride, 3)]
        return [[(row, step) for row in strip] for step in range(count)]


@instructions("a a_start a_stride target target_start target_stride rows columns")
def copy_block(call: Call) -> None:
    """Copy a block of a matrix to where its rows lie closer together, by whole vectors.

    Arguments of the call
    ---------------------
    a, target : 1-D arrays of one float type
        Row r of the block lies at ``a_start + r * a_stride``, and will lie at ``target_start + r * target_stride``.
    rows, columns : int
        Size of the block.
    """
    writer, builder = MaskedWriter(call.builder, call.itemsize("a")), call.builder
    columns = call["columns"]
    whole = builder.and_(columns, writer.index(-writer.lanes))
    masks = writer.masks(1, builder.sub(columns, whole))
    a, target = (call.pointer(array, f"{array}_start") for array in ("a", "target"))
    for _, row in writer.blocks([1], [call["rows"]]):
        source = writer.at(a, builder.mul(row, call["a_stride"]))
        copied = writer.at(target, builder.mul(row, call["target_stride"]))

        def copy(column: Any, _: list[Any], source: Any = source, copied: Any = copied) -> list[Any]:
            writer.store(writer.load(writer.at(source, column)), writer.at(copied, column))
            return []

        writer.loop(writer.lanes, writer.index(0), whole, [], copy)
        with builder.if_then(builder.icmp_signed("<", whole, columns)):
            writer.store_row(writer.load_row(writer.at(source, whole), masks), writer.at(copied, whole), masks)


CHAINS = 16 if REGISTERS == 32 else 12
"""Independent chains of `multiply_add_chains`: more than two units times their latency, and all in registers."""


@instructions("sample rounds", result="sample")
def multiply_add_chains(call: Call) -> Any:
    """Run `CHAINS` chains of `rounds` dependent vector multiply-adds: the fastest that a core computes.

    Arguments of the call
    ---------------------
    sample : float32 or float64
        Start value of the chains; its type is the type of the arithmetic.
    rounds : int
        Length of each chain.

    Returns
    -------
    float
        One element of the sum of the chains, so that the compiler cannot omit them.
    """
    builder, writer = call.builder, Writer(call.builder, call.kinds["sample"].bitwidth // 8)

    def constant(value: float) -> Any:
        return ir.Constant(writer.vector, [value] * writer.lanes)

    def steps(_: Any, carried: list[Any]) -> list[Any]:
        return [writer.multiply_add(value, factor, addend) for value in carried]

    factor, addend = constant(1.0 - math.ldexp(1, -10)), constant(math.ldexp(1, -17))
    start = writer.spread(call["sample"])
    chains = [builder.fadd(start, constant(math.ldexp(chain, -10))) for chain in range(CHAINS)]
    _, results = writer.loop(1, writer.index(0), call["rounds"], chains, steps)
    return builder.extract_element(reduce(builder.fadd, results, start), writer.short(0))
