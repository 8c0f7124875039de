"""Vector arithmetic that LLVM does not find by itself: the one module that writes LLVM instructions.

LLVM turns plain loops into vector instructions well, but does not keep a block of two dozen vector accumulators in
registers across a loop.  That is what dense arithmetic lives on: with one accumulator every multiply-add waits for
the one before it, and from memory the core's two multiply-add units starve.
"""

from __future__ import annotations

import math
from collections.abc import Callable
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
