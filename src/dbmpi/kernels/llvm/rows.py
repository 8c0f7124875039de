"""Products with rows at any offsets in memory: the parts of layers of filters on fields.

Rows are taken in blocks whose sums stay in registers.  `tile` is a constant: the height of the first blocks, that of
the others (0 if there are none), and the vectors of a row; `blocks` says how many there are of each height.  Arrays
are flat and of one float type; indices are not checked.  A tile may be partly filled: nothing is read or written
beyond its `filled` columns, which are at least one and at most ``vectors * lanes``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from numba import types

from dbmpi.kernels.llvm.writer import Call, MaskedWriter, Writer, instructions
from dbmpi.kernels.memory import CACHE_LINE


@instructions(
    "tile blocks a a_start a_stride b b_start offsets first last out out_start out_stride filled add addends"
    " addends_start ahead",
    constants="tile ahead",
)
def multiply_rows(call: Call) -> None:
    """Multiply rows of `a` by rows of `b` that lie anywhere, into rows of `out`.

    ``out[r, c] (+)= sum over first <= k < last of a[r, k] * b[offsets[k] + c]`` for the rows r of all blocks and
    `filled` columns c, summed in the order of k.

    Arguments of the call
    ---------------------
    a, b, out : 1-D arrays
        Element (r, k) of the first is ``a[a_start + r * a_stride + k]``, element (r, c) of the last
        ``out[out_start + r * out_stride + c]``.
    b_start : int
        Added to all offsets.
    offsets : 1-D int64 array
        Where the rows of `b` start.
    add : bool
        Add to what is in `out`, instead of replacing it.
    addends : 1-D array or None
        What comes to all elements of a row that is replaced: ``addends[addends_start + r]`` to those of row r.
    ahead : constant
        Whether to prefetch the rows of `a` two blocks on.
    """
    writer, builder = _RowTiles(call.builder, call.itemsize("a")), call.builder
    a, b, out = (call.pointer(array, f"{array}_start") for array in ("a", "b", "out"))
    offsets, addends = call.pointer("offsets"), None
    if not isinstance(call.kinds["addends"], types.NoneType):
        addends = call.pointer("addends", "addends_start")
    for rows, top, masks in writer.tiles(call):
        strips = writer.strided(writer.at(a, builder.mul(top, call["a_stride"])), call["a_stride"], rows)
        sums = writer.strided(writer.at(out, builder.mul(top, call["out_stride"])), call["out_stride"], rows)
        later = None
        if call.constant("ahead"):
            later = writer.at(strips[0], builder.mul(call["a_stride"], writer.index(2 * rows)))
        own = [] if addends is None else writer.strided(writer.at(addends, top), writer.index(1), rows)
        writer.multiply(masks, strips, later, b, offsets, call["first"], call["last"], sums, call["add"], own)


@instructions(
    "tile blocks a a_start a_stride b b_start b_stride out out_start offsets first last filled", constants="tile"
)
def add_to_rows(call: Call) -> None:
    """Multiply columns of `a` by rows of `b`, and add to rows of `out` that lie anywhere: `multiply_rows` transposed.

    ``out[offsets[n] + c] += sum over r of a[r, n] * b[r, c]`` for ``first <= n < last`` and `filled` columns c, summed
    in the order of r: the rows of all blocks, and those of `b` are in registers.  The rows of `out` must not overlap.

    Arguments of the call
    ---------------------
    a, b, out : 1-D arrays
        Element (r, n) of the first is ``a[a_start + r * a_stride + n]``, element (r, c) of the second
        ``b[b_start + r * b_stride + c]``.
    out_start : int
        Added to all offsets.
    offsets : 1-D int64 array
        Where the rows of `out` start.
    """
    writer, builder = _RowTiles(call.builder, call.itemsize("a")), call.builder
    a, b, out = (call.pointer(array, f"{array}_start") for array in ("a", "b", "out"))
    offsets = call.pointer("offsets")
    for rows, top, masks in writer.tiles(call):
        strips = writer.strided(writer.at(a, builder.mul(top, call["a_stride"])), call["a_stride"], rows)
        others = writer.strided(writer.at(b, builder.mul(top, call["b_stride"])), call["b_stride"], rows)
        writer.add(masks, strips, others, out, offsets, call["first"], call["last"])


@instructions(
    "tile blocks a a_start a_stride b b_start b_stride out out_start offsets first depth filled", constants="tile"
)
def add_maps_to_rows(call: Call) -> None:
    """Do as `add_to_rows` does, with the rows of `out` in registers, which are those of all blocks.

    ``out[offsets[first + n] + c] += sum over r < depth of a[r, first + n] * b[r, c]``.  As many rows of `a` as come
    after these are prefetched, a share in every tile.  Arguments of the call are as for `add_to_rows`, but for `depth`.
    """
    writer, builder = _RowTiles(call.builder, call.itemsize("a")), call.builder
    a, b, out = (call.pointer(array, f"{array}_start") for array in ("a", "b", "out"))
    offsets, stride, depth = call.pointer("offsets", "first"), call["a_stride"], call["depth"]
    for rows, top, masks in writer.tiles(call):
        column = builder.add(call["first"], top)
        # Prefetched in the order of memory, by tiles and then by rows.
        later = writer.at(a, builder.mul(depth, builder.add(stride, column)))
        sums = [writer.at(out, builder.load(writer.at(offsets, top, n))) for n in range(rows)]
        writer.add_all(masks, writer.at(a, column), stride, later, b, call["b_stride"], depth, sums)


@instructions("a first last written", constants="written")
def prefetch(call: Call) -> None:
    """Prefetch the cache lines of the elements ``first <= n < last`` of a 1-D array.

    `written`, a constant of the call, is whether they will be written.
    """
    writer, start = Writer(call.builder, call.itemsize("a")), call.pointer("a")

    def ask(n: Any, nothing: list[Any]) -> list[Any]:
        writer.prefetch(writer.at(start, n), write=call.constant("written"))
        return nothing

    writer.loop(CACHE_LINE // writer.itemsize, call["first"], call["last"], [], ask)


class _RowTiles(MaskedWriter):
    """The instructions of the products above; arrays are addresses."""

    def tiles(self, call: Call) -> Iterator[tuple[int, Any, list[Any]]]:
        """Yield the height, the first row and the masks of the tiles of `call`, where their instructions belong."""
        *heights, vectors = call.constant("tile")
        blocks = call.numbers("blocks")
        for masks in self._variants(vectors, call["filled"]):
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
        offsets: Any,
        first: Any,
        last: Any,
        sums: list[Any],
        add: Any,
        addends: list[Any],
    ) -> None:
        """Multiply a strip by rows of `b` into the rows at `sums`; prefetch the strip that starts at `later`.

        Rows that are replaced have the elements at `addends` added to them, if there are any.
        """
        builder, rows = self.builder, len(strips)

        def steps(k: Any, count: int, totals: list[Any]) -> list[Any]:
            if later is not None:  # a share in each step, in the order of memory
                ahead = self.at(later, builder.mul(k, self.index(rows)))
                for byte in range(0, count * rows * self.itemsize, CACHE_LINE):
                    self.prefetch(self.at(ahead, byte // self.itemsize))
            for step in range(count):
                b_row = self.load_row(self.at(b, builder.load(self.at(offsets, k, step))), masks)
                factors = [self.spread_at(strip, k, step) for strip in strips]
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
        self, masks: list[Any], strips: list[Any], others: list[Any], out: Any, offsets: Any, first: Any, last: Any
    ) -> None:
        """Add the products of strips and the rows at `others` to rows of `out`."""
        builder = self.builder
        tile = [self.load_row(row, masks) for row in others]

        def steps(n: Any, count: int, nothing: list[Any]) -> list[Any]:
            rows = [self.at(out, builder.load(self.at(offsets, n, step))) for step in range(count)]
            totals = [self.load_row(row, masks) for row in rows]
            for strip, values in zip(strips, tile, strict=True):
                for step in range(count):
                    totals[step] = self._products([self.spread_at(strip, n, step)], values, totals[step])
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
        """Add the products of columns of factors and rows of `b` to the rows at `sums`; prefetch `later`."""
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
