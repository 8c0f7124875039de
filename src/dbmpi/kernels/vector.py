"""Vector arithmetic that LLVM does not find by itself: the one module that writes LLVM instructions.

LLVM turns plain loops into vector instructions well, but does not keep a block of two dozen vector accumulators in
registers across a loop.  That is what dense arithmetic lives on: with one accumulator every multiply-add waits for
the one before it, and from memory the core's two multiply-add units starve.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic


def _instructions(function: Callable[..., Any]) -> Any:
    """Let kernels call what a function of (typing context, types) describes."""
    return intrinsic(prefer_literal=True)(function)


def _vector_bytes() -> tuple[int, int]:
    """Return the bytes of a vector register and how many of them this processor has."""
    features = get_host_cpu_features()  # type: ignore[no-untyped-call]  # honours NUMBA_CPU_FEATURES, as the compiler does
    if "+avx512f" in features:
        return 64, 32
    if "+avx2" in features:
        return 32, 16
    if "+neon" in features:
        return 16, 32
    return 16, 16


VECTOR_BYTES, REGISTERS = _vector_bytes()

CACHE_LINE = 64

ROWS = 6
VECTORS = 4 if REGISTERS == 32 else 2
"""Shape of a tile: with a vector for each of its `VECTORS` factors and one more, it fills the registers."""


def lanes(itemsize: int) -> int:
    """Return how many elements of `itemsize` bytes a vector holds."""
    return VECTOR_BYTES // itemsize


@_instructions
def multiply_tile(
    typingctx: Any,
    rows: Any,
    vectors: Any,
    by_columns: Any,
    a: Any,
    a_start: Any,
    a_stride: Any,
    b: Any,
    b_start: Any,
    out: Any,
    out_start: Any,
    out_stride: Any,
    depth: Any,
    add: Any,
) -> Any:
    """Multiply a strip of `a` by a packed panel of `b` into one tile of `out`, all of it in registers.

    ``out[r, c] (+)= sum over k < depth of a[r, k] * b[k, c]`` for `rows` rows and ``vectors * lanes`` columns,
    summed in the order of k.  The arrays are flat; indices are not checked.

    Parameters
    ----------
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
    if not all(isinstance(constant, types.IntegerLiteral) for constant in (rows, vectors)) or not isinstance(
        by_columns, types.BooleanLiteral
    ):
        return None
    shape = (rows.literal_value, vectors.literal_value, by_columns.literal_value)
    index = types.intp
    signature = types.void(
        rows, vectors, by_columns, a, index, index, b, index, out, index, index, index, types.boolean
    )

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        def pointer(place: int) -> Any:
            data = context.make_array(signature.args[place])(context, builder, values[place]).data
            return builder.gep(data, [values[place + 1]], inbounds=True)

        itemsize = context.get_abi_sizeof(context.get_data_type(signature.args[3].dtype))
        tile = _Tile(builder, itemsize, *shape)
        tile.write(pointer(3), values[5], pointer(6), pointer(8), values[10], values[11], values[12])
        return context.get_dummy_value()

    return signature, generate


def _declared(module: Any, function_type: Any, name: str) -> Any:
    return cgutils.get_or_insert_function(module, function_type, name)  # type: ignore[no-untyped-call]


class _Tile:
    """The instructions of `multiply_tile`."""

    unrolled = 4

    def __init__(self, builder: Any, itemsize: int, rows: int, vectors: int, by_columns: bool) -> None:
        self.builder, self.rows, self.vectors, self.by_columns = builder, rows, vectors, by_columns
        self.itemsize, self.lanes = itemsize, lanes(itemsize)
        self.element = ir.FloatType() if itemsize == 4 else ir.DoubleType()
        self.vector = ir.VectorType(self.element, self.lanes)
        self.index = ir.IntType(64)
        # Fused where the processor can, and otherwise two instructions (llvm.fma would call a function there).
        self.multiply_add = _declared(
            builder.module,
            ir.FunctionType(self.vector, [self.vector] * 3),
            f"llvm.fmuladd.v{self.lanes}f{8 * itemsize}",
        )
        byte, flag = ir.IntType(8).as_pointer(), ir.IntType(32)
        self.prefetch_into_cache = _declared(
            builder.module, ir.FunctionType(ir.VoidType(), [byte, flag, flag, flag]), "llvm.prefetch.p0"
        )

    def write(self, a: Any, a_stride: Any, b: Any, out: Any, out_stride: Any, depth: Any, add: Any) -> None:
        builder = self.builder
        out_rows = self._strided(out, out_stride)
        for row in out_rows:
            for vector in range(self.vectors):
                self._prefetch(builder.gep(row, [self.index(vector * self.lanes)], inbounds=True), write=True)
        sums = [ir.Constant(self.vector, [0.0] * self.lanes)] * (self.rows * self.vectors)
        whole = builder.and_(depth, self.index(-self.unrolled))
        k, sums = self._loop("unrolled", self.unrolled, self.index(0), whole, sums, a, a_stride, b)
        k, sums = self._loop("rest", 1, k, depth, sums, a, a_stride, b)
        places = [
            self._as_vector(builder.gep(row, [self.index(vector * self.lanes)], inbounds=True))
            for row in out_rows
            for vector in range(self.vectors)
        ]
        with builder.if_else(builder.icmp_signed("!=", add, add.type(0))) as (adding, replacing):
            with adding:
                for place, total in zip(places, sums, strict=True):
                    self._store(builder.fadd(self._load(place, self.itemsize), total), place)
            with replacing:
                for place, total in zip(places, sums, strict=True):
                    self._store(total, place)

    def _loop(
        self, name: str, steps: int, start: Any, stop: Any, sums: list[Any], a: Any, a_stride: Any, b: Any
    ) -> tuple[Any, list[Any]]:
        """Loop k from `start` to `stop` in `steps`; the sums are carried in registers."""
        builder = self.builder
        before = builder.block
        head, body, after = (builder.append_basic_block(f"{name}.{part}") for part in ("head", "body", "after"))
        builder.branch(head)
        builder.position_at_end(head)
        k = builder.phi(self.index)
        k.add_incoming(start, before)
        carried = []
        for total in sums:
            carried.append(builder.phi(self.vector))
            carried[-1].add_incoming(total, before)
        builder.cbranch(builder.icmp_signed("<", k, stop), body, after)

        builder.position_at_end(body)
        panel = builder.gep(b, [builder.mul(k, self.index(self.vectors * self.lanes))], inbounds=True)
        if self.by_columns:
            columns = [builder.gep(a, [builder.mul(k, a_stride)], inbounds=True)]
            columns += [columns[0]] * (steps - 1)
            for step in range(1, steps):
                columns[step] = builder.gep(columns[step - 1], [a_stride], inbounds=True)
            if steps > 1:  # the lines of the strips to the right are needed next
                for column in columns:
                    ahead = self.index(CACHE_LINE // self.itemsize)
                    self._prefetch(builder.gep(column, [ahead], inbounds=True))
        else:
            strip = [builder.gep(row, [k], inbounds=True) for row in self._strided(a, a_stride)]
            if steps > 1:  # the strip below is needed next
                for row in self._strided(strip[-1], a_stride, self.rows + 1)[1:]:
                    self._prefetch(row, level=2)
        totals: list[Any] = list(carried)
        for step in range(steps):
            b_row = [
                self._load(
                    self._as_vector(
                        builder.gep(panel, [self.index((step * self.vectors + vector) * self.lanes)], inbounds=True)
                    ),
                    VECTOR_BYTES,
                )
                for vector in range(self.vectors)
            ]
            for row in range(self.rows):
                origin, offset = (columns[step], row) if self.by_columns else (strip[row], step)
                factor = self._spread(builder.load(builder.gep(origin, [self.index(offset)], inbounds=True)))
                for vector in range(self.vectors):
                    place = row * self.vectors + vector
                    totals[place] = builder.call(self.multiply_add, [factor, b_row[vector], totals[place]])
        k.add_incoming(builder.add(k, self.index(steps)), builder.block)
        for phi, total in zip(carried, totals, strict=True):
            phi.add_incoming(total, builder.block)
        builder.branch(head)
        builder.position_at_end(after)
        return k, carried

    def _strided(self, start: Any, stride: Any, count: int | None = None) -> list[Any]:
        pointers = [start]
        for _ in range((count or self.rows) - 1):
            pointers.append(self.builder.gep(pointers[-1], [stride], inbounds=True))
        return pointers

    def _spread(self, value: Any) -> Any:
        """Return a vector of one value."""
        builder, place = self.builder, ir.IntType(32)
        single = builder.insert_element(ir.Constant(self.vector, ir.Undefined), value, place(0))
        mask = ir.Constant(ir.VectorType(place, self.lanes), [0] * self.lanes)
        return builder.shuffle_vector(single, ir.Constant(self.vector, ir.Undefined), mask)

    def _as_vector(self, pointer: Any) -> Any:
        return self.builder.bitcast(pointer, self.vector.as_pointer())

    def _load(self, pointer: Any, alignment: int) -> Any:
        value = self.builder.load(pointer)
        value.align = alignment
        return value

    def _store(self, value: Any, pointer: Any) -> None:
        self.builder.store(value, pointer).align = self.itemsize

    def _prefetch(self, pointer: Any, write: bool = False, level: int = 3) -> None:
        flag = ir.IntType(32)
        address = self.builder.bitcast(pointer, ir.IntType(8).as_pointer())
        self.builder.call(self.prefetch_into_cache, [address, flag(int(write)), flag(level), flag(1)])


CHAINS = 16
"""Independent chains of `multiply_add_chains`: more than two units times their latency."""


@_instructions
def multiply_add_chains(typingctx: Any, sample: Any, rounds: Any) -> Any:
    """Run `CHAINS` chains of `rounds` dependent vector multiply-adds: the fastest that a core computes.

    Parameters
    ----------
    sample : float32 or float64
        Start value of the chains; its type is the type of the arithmetic.
    rounds : int
        Length of each chain.

    Returns
    -------
    float
        One element of the sum of the chains, so that they cannot be left out.
    """
    if not isinstance(sample, types.Float):
        return None

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        tile = _Tile(builder, signature.args[0].bitwidth // 8, 1, 1, False)
        start = tile._spread(values[0])
        factor = ir.Constant(tile.vector, [1.0 - math.ldexp(1, -10)] * tile.lanes)
        addend = ir.Constant(tile.vector, [math.ldexp(1, -17)] * tile.lanes)
        chains = [
            builder.fadd(start, ir.Constant(tile.vector, [math.ldexp(chain, -10)] * tile.lanes))
            for chain in range(CHAINS)
        ]
        before = builder.block
        body, after = builder.append_basic_block("chains.body"), builder.append_basic_block("chains.after")
        builder.branch(body)
        builder.position_at_end(body)
        count = builder.phi(tile.index)
        count.add_incoming(tile.index(0), before)
        carried = []
        for chain in chains:
            carried.append(builder.phi(tile.vector))
            carried[-1].add_incoming(chain, before)
        results = [builder.call(tile.multiply_add, [phi, factor, addend]) for phi in carried]
        for phi, result in zip(carried, results, strict=True):
            phi.add_incoming(result, body)
        following = builder.add(count, tile.index(1))
        count.add_incoming(following, body)
        builder.cbranch(builder.icmp_signed("<", following, values[1]), body, after)
        builder.position_at_end(after)
        total = start
        for result in results:
            total = builder.fadd(total, result)
        return builder.extract_element(total, ir.IntType(32)(0))

    return sample(sample, types.intp), generate


@_instructions
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
            data = _pointers(context, builder, signature, values)
            itemsize = context.get_abi_sizeof(context.get_data_type(signature.args[2].dtype))
            rows_of_b = _Rows(builder, itemsize, rows.literal_value, values[13])
            for masks in rows_of_b.variants(vectors.literal_value):
                rows_of_b.multiply(
                    *(masks, data(2, 3), values[4], data(5, 6), data(7), values[8], values[9]),
                    *(data(10, 11), values[12], values[14]),
                )
        return context.get_dummy_value()

    return signature, generate


@_instructions
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
            data = _pointers(context, builder, signature, values)
            itemsize = context.get_abi_sizeof(context.get_data_type(signature.args[2].dtype))
            rows_of_out = _Rows(builder, itemsize, rows.literal_value, values[14])
            for masks in rows_of_out.variants(vectors.literal_value):
                rows_of_out.add(
                    *(masks, data(2, 3), values[4], data(5, 6), values[7], data(8, 9)),
                    *(data(10), data(11), *values[12:14]),
                )
        return context.get_dummy_value()

    return signature, generate


@_instructions
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
    again: Any,
) -> Any:
    """Transpose a block of at most lanes x lanes elements whose rows lie anywhere, and put it to two places.

    ``out[start + c * out_stride + r] = a[a_start + places[first + r] + c]`` for r < `height` and c < `width`, where
    `start` is `out_start`, and ``out_start + again``.  The further rows up to the lanes of a vector are zeroed.

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
    signature = types.void(a, index, places, index, index, index, out, index, index, index)

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        data = _pointers(context, builder, signature, values)
        itemsize = context.get_abi_sizeof(context.get_data_type(signature.args[0].dtype))
        block = _Rows(builder, itemsize, 1, values[5])
        block.transpose(data(0, 1), data(2, 3), values[4], data(6, 7), *values[8:10])
        return context.get_dummy_value()

    return signature, generate


@_instructions
def prefetch_written(typingctx: Any, a: Any, first: Any, last: Any) -> Any:
    """Ask for the cache lines of the elements ``first <= n < last`` of a 1-D array, which will be overwritten."""
    index = types.intp
    signature = types.void(a, index, index)

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        start = _pointers(context, builder, signature, values)(0)
        itemsize = context.get_abi_sizeof(context.get_data_type(signature.args[0].dtype))
        rows = _Rows(builder, itemsize, 1, values[2])

        def ask(n: Any, count: int, nothing: list[Any]) -> list[Any]:
            rows._prefetch(rows._at(start, n, 0), write=True)
            return nothing

        rows._repeat(CACHE_LINE // itemsize, values[1], values[2], [], ask)
        return context.get_dummy_value()

    return signature, generate


@_instructions
def pointer_at(typingctx: Any, address: Any) -> Any:
    """Turn an address, an integer, into a pointer.

    A kernel that takes its vectors as arguments is compiled anew for every number of them; and a list of arrays costs
    more to hand over than many a kernel takes to run.  Whoever passes addresses keeps the arrays alive, and answers
    for their types and lengths.
    """

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.inttoptr(values[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), generate


def _pointers(context: Any, builder: Any, signature: Any, values: Any) -> Callable[..., Any]:
    """Return a function that gives the address in the array that is one argument, at the index that is another."""

    def pointer(array: int, start: int | None = None) -> Any:
        data = context.make_array(signature.args[array])(context, builder, values[array]).data
        return data if start is None else builder.gep(data, [values[start]], inbounds=True)

    return pointer


class _Rows(_Tile):
    """The instructions of `multiply_rows`, `add_to_rows` and `transpose_block`: tiles that may be partly filled."""

    def __init__(self, builder: Any, itemsize: int, rows: int, filled: Any) -> None:
        super().__init__(builder, itemsize, rows, 1, False)
        self.filled = filled
        self.mask = ir.VectorType(ir.IntType(1), self.lanes)
        name = f"v{self.lanes}f{8 * itemsize}.p0"
        flag, pointer = ir.IntType(32), self.vector.as_pointer()
        self.masked_load = _declared(
            builder.module,
            ir.FunctionType(self.vector, [pointer, flag, self.mask, self.vector]),
            f"llvm.masked.load.{name}",
        )
        self.masked_store = _declared(
            builder.module,
            ir.FunctionType(ir.VoidType(), [self.vector, pointer, flag, self.mask]),
            f"llvm.masked.store.{name}",
        )

    def variants(self, vectors: int) -> Iterator[list[Any]]:
        """Yield the masks of the tile's vectors, None for a full one, each time in a branch for so many columns."""
        builder = self.builder
        with builder.if_else(builder.icmp_signed(">=", self.filled, self.index(vectors * self.lanes))) as (full, part):
            with full:
                yield [None] * vectors
            with part:
                if vectors == 1:
                    yield self._masks(1)
                else:
                    with builder.if_else(builder.icmp_signed(">", self.filled, self.index(self.lanes))) as (some, one):
                        with some:
                            yield self._masks(vectors)
                        with one:
                            yield self._masks(1)

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
        builder = self.builder
        strips = self._strided(a, a_stride)

        def steps(k: Any, count: int, totals: list[Any]) -> list[Any]:
            for offset in range(count):
                place = builder.load(self._at(places, k, offset))
                b_row = self._load_row(builder.gep(b, [place], inbounds=True), masks)
                factors = [self._spread(builder.load(self._at(strip, k, offset))) for strip in strips]
                pairs = [(factor, values) for factor in factors for values in b_row]
                totals = [
                    builder.call(self.multiply_add, [*pair, total]) for pair, total in zip(pairs, totals, strict=True)
                ]
            return totals

        sums = [ir.Constant(self.vector, [0.0] * self.lanes)] * (self.rows * len(masks))
        whole = builder.add(first, builder.and_(builder.sub(last, first), self.index(-self.unrolled)))
        k, sums = self._repeat(self.unrolled, first, whole, sums, steps)
        k, sums = self._repeat(1, k, last, sums, steps)
        totals = [sums[row * len(masks) :][: len(masks)] for row in range(self.rows)]
        out_rows = self._strided(out, out_stride)
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
        builder = self.builder
        strips = self._strided(a, a_stride)
        tile = [self._load_row(row, masks) for row in self._strided(b, b_stride)]
        below = builder.gep(a, [builder.mul(a_stride, self.index(self.rows))])

        def steps(n: Any, count: int, nothing: list[Any]) -> list[Any]:
            if count > 1:  # the strip below is needed next; asked for in the order of memory
                ahead = builder.gep(below, [builder.mul(n, self.index(self.rows))])
                for byte in range(0, count * self.rows * self.itemsize, CACHE_LINE):
                    self._prefetch(builder.gep(ahead, [self.index(byte // self.itemsize)]), level=2)
            rows = [
                builder.gep(out, [builder.load(self._at(places, n, offset))], inbounds=True) for offset in range(count)
            ]
            selected = [builder.load(self._at(columns, n, offset)) for offset in range(count)]
            totals = [self._load_row(row, masks) for row in rows]
            for strip, values in zip(strips, tile, strict=True):
                for number, column in enumerate(selected):
                    factor = self._spread(builder.load(builder.gep(strip, [column], inbounds=True)))
                    totals[number] = [
                        builder.call(self.multiply_add, [factor, value, total])
                        for value, total in zip(values, totals[number], strict=True)
                    ]
            for row, total in zip(rows, totals, strict=True):
                self._store_row(total, row, masks)
            return nothing

        interleaved = 2  # more multiply-adds that do not wait for one another
        whole = builder.add(first, builder.and_(builder.sub(last, first), self.index(-interleaved)))
        n, _ = self._repeat(interleaved, first, whole, [], steps)
        self._repeat(1, n, last, [], steps)

    def transpose(self, a: Any, places: Any, height: Any, out: Any, out_stride: Any, again: Any) -> None:
        builder = self.builder
        (mask,) = self._masks(1)
        rows = []
        for row in range(self.lanes):
            inside = builder.icmp_signed("<", self.index(row), height)
            place = builder.load(self._at(places, builder.select(inside, self.index(row), self.index(0)), 0))
            rows += self._load_row(builder.gep(a, [place], inbounds=True), [mask])
        for bit, lower, upper in self._exchanges():
            swapped = list(rows)
            for row in range(self.lanes):
                if not row & bit:
                    swapped[row] = self._shuffle(rows[row], rows[row + bit], lower)
                    swapped[row + bit] = self._shuffle(rows[row], rows[row + bit], upper)
            rows = swapped
        (stored,) = self._masks(1, height)
        for row, target in zip(rows, self._strided(out, out_stride, self.lanes), strict=True):
            self._store_row([row], target, [stored])
            self._store_row([row], builder.gep(target, [again], inbounds=True), [stored])

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

    def _repeat(
        self, count: int, start: Any, stop: Any, carried: list[Any], steps: Callable[[Any, int, list[Any]], list[Any]]
    ) -> tuple[Any, list[Any]]:
        """Loop k from `start` to `stop`, `count` steps at a time; what they carry on stays in registers."""
        builder = self.builder
        before = builder.block
        head, body, after = (builder.append_basic_block(f"rows.{part}") for part in ("head", "body", "after"))
        builder.branch(head)
        builder.position_at_end(head)
        k = builder.phi(self.index)
        k.add_incoming(start, before)
        phis = []
        for value in carried:
            phis.append(builder.phi(self.vector))
            phis[-1].add_incoming(value, before)
        builder.cbranch(builder.icmp_signed("<", k, stop), body, after)
        builder.position_at_end(body)
        results = steps(k, count, list(phis))
        k.add_incoming(builder.add(k, self.index(count)), builder.block)
        for phi, value in zip(phis, results, strict=True):
            phi.add_incoming(value, builder.block)
        builder.branch(head)
        builder.position_at_end(after)
        return k, list(phis)

    def _at(self, pointer: Any, k: Any, offset: int) -> Any:
        place = self.builder.gep(pointer, [k], inbounds=True)
        return self.builder.gep(place, [self.index(offset)], inbounds=True)

    def _masks(self, vectors: int, filled: Any = None) -> list[Any]:
        """Return the masks of vectors of which so many elements are filled."""
        builder, many = self.builder, ir.VectorType(self.index, self.lanes)
        start = ir.Constant(many, ir.Undefined)
        count = builder.insert_element(start, self.filled if filled is None else filled, ir.IntType(32)(0))
        zeros = ir.Constant(ir.VectorType(ir.IntType(32), self.lanes), [0] * self.lanes)
        counts = builder.shuffle_vector(count, start, zeros)
        return [
            builder.icmp_signed("<", ir.Constant(many, list(range(first, first + self.lanes))), counts)
            for first in range(0, vectors * self.lanes, self.lanes)
        ]

    def _load_row(self, row: Any, masks: list[Any]) -> list[Any]:
        values = []
        for vector, mask in enumerate(masks):
            place = self._as_vector(self.builder.gep(row, [self.index(vector * self.lanes)], inbounds=True))
            if mask is None:
                values.append(self._load(place, self.itemsize))
            else:
                nothing = ir.Constant(self.vector, [0.0] * self.lanes)
                align = ir.IntType(32)(self.itemsize)
                values.append(self.builder.call(self.masked_load, [place, align, mask, nothing]))
        return values

    def _store_row(self, values: list[Any], row: Any, masks: list[Any]) -> None:
        for vector, (value, mask) in enumerate(zip(values, masks, strict=True)):
            place = self._as_vector(self.builder.gep(row, [self.index(vector * self.lanes)], inbounds=True))
            if mask is None:
                self._store(value, place)
            else:
                self.builder.call(self.masked_store, [value, place, ir.IntType(32)(self.itemsize), mask])

    def _shuffle(self, one: Any, other: Any, lanes: list[int]) -> Any:
        mask = ir.Constant(ir.VectorType(ir.IntType(32), self.lanes), lanes)
        return self.builder.shuffle_vector(one, other, mask)
