"""Tiles of matrix products in registers, and chains of multiply-adds to measure the processor by."""

from __future__ import annotations

import math
from functools import reduce
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]

from dbmpi.kernels.llvm.writer import REGISTERS, VECTOR_BYTES, Call, Writer, instructions
from dbmpi.kernels.memory import CACHE_LINE

SHAPES = ((6, 4), (12, 2), (24, 1)) if REGISTERS == 32 else ((6, 2), (12, 1))
"""Rows and vectors of a tile, the widest first: its sums, a row of its factors and one more fill the registers."""
_POINTERS = 6
"""Rows whose addresses fit into the processor's other registers."""


@instructions(
    "rows vectors by_columns a a_start a_stride b b_start out out_start out_stride depth add",
    constants="rows vectors by_columns",
)
def multiply_tile(call: Call) -> None:
    """Multiply a strip of `a` by a packed panel of `b` into one tile of `out`, all of it in registers.

    ``out[r, c] (+)= sum over k < depth of a[r, k] * b[k, c]`` for `rows` rows and ``vectors * lanes`` columns,
    summed in the order of k.  The arrays are flat; indices are not checked.

    Arguments of the call
    ---------------------
    rows, vectors, by_columns : constants
        Shape of the tile; and whether the strip of `a` lies column after column (element (r, k) at
        ``a_start + r + k * a_stride``) or row after row (at ``a_start + r * a_stride + k``).
    a, b, out : 1-D arrays of one float type
        `b` holds the panel row after row, without gaps, from `b_start` on, which is aligned to a vector.
    out_start, out_stride : int
        Position of the tile, and distance of its rows.
    depth : int
        Number of products to sum.
    add : bool
        Add to what is in `out`, instead of replacing it.
    """
    tile = _Tile(call.builder, call.itemsize("a"), *map(call.constant, ("rows", "vectors", "by_columns")))
    a, b, out = (call.pointer(array, f"{array}_start") for array in ("a", "b", "out"))
    tile.write(a, call["a_stride"], b, out, call["out_stride"], call["depth"], call["add"])


class _Tile(Writer):
    """The instructions of `multiply_tile`."""

    def __init__(self, builder: Any, itemsize: int, rows: int, vectors: int, by_columns: bool) -> None:
        super().__init__(builder, itemsize)
        self.rows, self.vectors, self.by_columns = rows, vectors, by_columns

    def write(self, a: Any, a_stride: Any, b: Any, out: Any, out_stride: Any, depth: Any, add: Any) -> None:
        """Write all of it; `a`, `b` and `out` are addresses."""
        builder, width = self.builder, self.vectors * self.lanes

        def steps(k: Any, count: int, sums: list[Any]) -> list[Any]:
            factors = self._factors_by_columns if self.by_columns else self._factors_by_rows
            strip, panel = factors(a, a_stride, k, count), self.at(b, builder.mul(k, self.index(width)))
            for step in range(count):
                b_row = [
                    self.load(self.at(panel, step * width + vector * self.lanes), VECTOR_BYTES)
                    for vector in range(self.vectors)
                ]
                products = [(self.spread_at(*factor), values) for factor in strip[step] for values in b_row]
                sums = [self.multiply_add(*pair, total) for pair, total in zip(products, sums, strict=True)]
            return sums

        targets = [
            self.at(row, vector * self.lanes)
            for row in self.strided(out, out_stride, self.rows)
            for vector in range(self.vectors)
        ]
        for target in targets:
            self.prefetch(target, write=True)
        sums = self.unrolled_loop(self.unrolled, self.index(0), depth, [self.zero] * len(targets), steps)
        with builder.if_else(builder.icmp_signed("!=", add, add.type(0))) as (adding, replacing):
            with adding:
                for target, total in zip(targets, sums, strict=True):
                    self.store(builder.fadd(self.load(target), total), target)
            with replacing:
                for target, total in zip(targets, sums, strict=True):
                    self.store(total, target)

    def _factors_by_columns(self, a: Any, a_stride: Any, k: Any, count: int) -> list[list[tuple[Any, int]]]:
        """Return for each step where the strip's elements lie, as addresses and offsets."""
        columns = self.strided(self.at(a, self.builder.mul(k, a_stride)), a_stride, count)
        if count > 1:  # the lines of the strips to the right are needed next
            for column in columns:
                self.prefetch(self.at(column, CACHE_LINE // self.itemsize))
        return [[(column, row) for row in range(self.rows)] for column in columns]

    def _factors_by_rows(self, a: Any, a_stride: Any, k: Any, count: int) -> list[list[tuple[Any, int]]]:
        if self.rows <= _POINTERS:
            strip = [self.at(row, k) for row in self.strided(a, a_stride, self.rows)]
        else:
            # Three rows by one address each time: the compiler would compute all before the loop, and have them to
            # load from the stack.
            thirds = self.strided(self.at(a, k), self.builder.mul(a_stride, self.index(3)), self.rows // 3)
            strip = [row for third in thirds for row in self.strided(self.opaque(third), a_stride, 3)]
        if count > 1:  # the strip below is needed next
            for row in self.strided(strip[-1], a_stride, self.rows + 1)[1:]:
                self.prefetch(row, level=2)
        return [[(row, step) for row in strip] for step in range(count)]


CHAINS = 16
"""Independent chains of `multiply_add_chains`: more than two units times their latency."""


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
