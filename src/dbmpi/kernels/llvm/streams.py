"""Passes over many long vectors at once, with every cache line asked for while earlier ones are computed with.

Memory is as fast as the number of lines that are on their way.  A processor guesses what comes next of a few streams,
and of each only within a page: of seven vectors, read a page or two at a time, it guesses too little.  A loop that asks
for each line itself, some lines ahead, needs the vectors' instructions written out, as LLVM's compiler
vectorises no loop that does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types

from dbmpi.kernels.llvm.writer import Arguments, Writer, instructions, lanes
from dbmpi.kernels.memory import CACHE_LINE

AHEAD = 32 * CACHE_LINE
"""Bytes that are asked for in advance: 1 to 3 KB are equally good, where pages of many vectors are on their way."""
STEP = CACHE_LINE // 4
"""Elements of a step of a loop."""
LANES = lanes(8)
"""Elements of which sums are kept apart."""


@instructions
def add_products(
    typingctx: Any,
    levels: Any,
    lefts: Any,
    rights: Any,
    at: Any,
    places: Any,
    first: Any,
    left: Any,
    right: Any,
    start: Any,
    count: Any,
    magic: Any,
    magic_start: Any,
    totals: Any,
    totals_start: Any,
) -> Any:
    """Add the products of some left and right vectors, in grains, to totals: see :mod:`dbmpi.kernels.sums`.

    Products are added one right vector after the other, and for each the left ones in turn.  Indices are not checked.

    Parameters
    ----------
    levels, lefts, rights : constants
        1 or 2 levels of grains; numbers of vectors.
    at, places : int64 arrays
        Addresses, and where in `at` those of the left and then of the right vectors are, from `first` on.
    left, right : 1-D arrays
        Of the dtypes of the vectors, float32 or float64.
    start, count : int
        Which elements.
    magic : float64 array
        From `magic_start` on, ``3 * 2^k`` for every product.
    totals : int64 array
        From `totals_start` on, four numbers for every product: high and low halves of the sums of both levels.
    """
    if not all(isinstance(constant, types.IntegerLiteral) for constant in (levels, lefts, rights)):
        return None
    index = types.intp
    signature = types.void(
        levels, lefts, rights, at, places, index, left, right, index, index, magic, index, totals, index
    )

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        given = Arguments(context, builder, signature, values)
        sums = _Grains(builder, levels.literal_value)
        itemsizes = [given.itemsize(6)] * lefts.literal_value + [given.itemsize(7)] * rights.literal_value
        streams = sums.streams(given.pointer(3), given.pointer(4, 5), itemsizes, values[8])
        sums.add(streams, lefts.literal_value, values[9], given.pointer(10, 11), given.pointer(12, 13))
        return context.get_dummy_value()

    return signature, generate


@instructions
def add_multiples(
    typingctx: Any,
    vectors: Any,
    first: Any,
    last: Any,
    at: Any,
    places: Any,
    like: Any,
    factors: Any,
    start: Any,
    total: Any,
    out: Any,
) -> Any:
    """Add multiples of vectors to a total, in their order; return the bits of the largest magnitude of the last sum.

    ``total[i] (+)= sum of factors[places + k] * vector k [start + i]`` over the elements of `out`; the last
    sum goes to `out` instead.  Products and sums are rounded each, in double precision.

    Parameters
    ----------
    vectors, first, last : constants
        Number of vectors; whether the total is what it was or 0; whether the sum goes to `out`.
    at : int64 array
        Addresses, from `places` on.
    like : 1-D array
        Of the dtype of the vectors.
    factors : float64 array
    total : 1-D float64 array
    out : 1-D array, float32 or float64
        It may be a part of one of the vectors.
    """
    if not isinstance(vectors, types.IntegerLiteral) or not all(
        isinstance(constant, types.BooleanLiteral) for constant in (first, last)
    ):
        return None
    index = types.intp
    signature = types.int64(vectors, first, last, at, index, like, factors, index, total, out)

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        given = Arguments(context, builder, signature, values)
        multiples = _Multiples(builder, given.itemsize(9), first.literal_value, last.literal_value)
        places = builder.alloca(multiples.index, multiples.index(vectors.literal_value))
        for k in range(vectors.literal_value):
            builder.store(builder.add(values[4], multiples.index(k)), multiples.at(places, k))
        streams = multiples.streams(given.pointer(3), places, [given.itemsize(5)] * vectors.literal_value, values[7])
        return multiples.add(streams, given.pointer(6, 4), given.pointer(8), given.pointer(9), given.size(9))

    return signature, generate


class _Stream:
    """Where a vector is read."""

    def __init__(self, writer: _Streams, pointer: Any, itemsize: int) -> None:
        self._writer, self._pointer, self._itemsize = writer, pointer, itemsize

    def ask(self, i: Any) -> None:
        """Ask for what a step reads that begins `AHEAD` bytes after element i."""
        for line in range(0, STEP * self._itemsize, CACHE_LINE):
            offset = self._writer.builder.add(i, self._writer.index((AHEAD + line) // self._itemsize))
            self._writer.prefetch(self._writer.builder.gep(self._pointer, [offset]))  # the end may be nearer

    def load(self, i: Any, whole: bool) -> Any:
        """Return as doubles the elements from i on; or element i alone, and zeros."""
        place = self._writer.at(self._pointer, i)
        return self._writer.load_as_double(place, self._itemsize, whole)


class _Streams(Writer):
    """Writes instructions on vectors of doubles that are read from float32 or float64."""

    def __init__(self, builder: Any) -> None:
        super().__init__(builder, 8)
        self.integers = ir.VectorType(self.index, self.lanes)

    def streams(self, at: Any, places: Any, itemsizes: Sequence[int], start: Any) -> list[_Stream]:
        """Return the vectors whose addresses are at some places, from an element on."""
        found = []
        for number, itemsize in enumerate(itemsizes):
            address = self.builder.load(self.at(at, self.builder.load(self.at(places, number))))
            kind = ir.FloatType() if itemsize == 4 else ir.DoubleType()
            found.append(_Stream(self, self.at(self.builder.inttoptr(address, kind.as_pointer()), start), itemsize))
        return found

    def load_as_double(self, place: Any, itemsize: int, whole: bool) -> Any:
        """Return a vector of doubles; unless it is whole, with one element and zeros."""
        if whole:
            kind = self.vector if itemsize == 8 else ir.VectorType(ir.FloatType(), self.lanes)
            value = self.builder.load(self.builder.bitcast(place, kind.as_pointer()))
            value.align = itemsize
            return value if itemsize == 8 else self.builder.fpext(value, self.vector)
        single = self.builder.load(place)
        single = single if itemsize == 8 else self.builder.fpext(single, self.element)
        return self.builder.insert_element(self.zero, single, self.short(0))

    def bits(self, value: Any) -> Any:
        """Return the bits of doubles as integers."""
        return self.builder.bitcast(value, self.integers)

    def whole_steps(self, count: Any) -> Any:
        """Return how many of so many elements whole steps take."""
        return self.builder.and_(count, self.index(-STEP))


class _Grains(_Streams):
    """The instructions of `add_products`."""

    def __init__(self, builder: Any, levels: int) -> None:
        super().__init__(builder)
        self.levels = levels
        self._sum = self.declared(f"llvm.vector.reduce.add.v{self.lanes}i64", self.index, [self.integers])

    def add(self, streams: list[_Stream], lefts: int, count: Any, magic: Any, totals: Any) -> None:
        """Add all products of the first `lefts` streams and the others."""
        builder, nothing = self.builder, ir.Constant(self.integers, [0] * self.lanes)
        pairs = [(left, right) for right in streams[lefts:] for left in streams[:lefts]]
        magics = [[self.spread_at(magic, number)] for number in range(len(pairs))]
        if self.levels == 2:
            fine = ir.Constant(self.vector, [2.0**-52] * self.lanes)
            magics = [[its[0], builder.fmul(its[0], fine)] for its in magics]

        def several(vectors: int, whole: bool) -> Any:
            def step(i: Any, sums: list[Any]) -> list[Any]:
                for stream in streams if vectors > 1 else ():
                    stream.ask(i)
                for vector in range(vectors):
                    place = builder.add(i, self.index(vector * self.lanes))
                    values = {stream: stream.load(place, whole) for stream in streams[:lefts]}
                    grains = []
                    for number, (left, right) in enumerate(pairs):
                        if right not in values:
                            values[right] = right.load(place, whole)
                        grains += self._grains(values[left], values[right], magics[number])
                    sums = [builder.add(total, self.bits(its)) for total, its in zip(sums, grains, strict=True)]
                return sums

            return step

        end = self.whole_steps(count)
        sums = [nothing] * (self.levels * len(pairs))
        _, sums = self.loop(STEP, self.index(0), end, sums, several(STEP // self.lanes, True))
        _, sums = self.loop(1, end, count, sums, several(1, False))
        # Every lane has added a magic number for each vector that it took part in.
        rest = builder.sub(count, end)
        taken = builder.add(builder.sdiv(end, self.index(self.lanes)), rest)
        taken = builder.shuffle_vector(
            builder.insert_element(nothing, taken, self.short(0)),
            nothing,
            ir.Constant(ir.VectorType(self.short, self.lanes), [0] * self.lanes),
        )
        half, low = (ir.Constant(self.integers, [value] * self.lanes) for value in (32, 0xFFFFFFFF))
        for number, its in enumerate(magics):
            for level, one in enumerate(its):
                grains = builder.sub(sums[number * self.levels + level], builder.mul(taken, self.bits(one)))
                for part, value in enumerate((builder.ashr(grains, half), builder.and_(grains, low))):
                    place = self.at(totals, 4 * number + 2 * level + part)
                    builder.store(builder.add(builder.load(place), builder.call(self._sum, [value])), place)

    def _grains(self, left: Any, right: Any, magics: list[Any]) -> list[Any]:
        """Return sums whose bits grow with the grains of each level."""
        builder = self.builder
        if self.levels == 1:
            # Products of float32 are exact in double precision: fusing changes nothing but the time.
            return [self.multiply_add(left, right, magics[0])]
        product = builder.fmul(left, right)
        rounded = builder.fadd(product, magics[0])
        over = builder.fsub(product, builder.fsub(rounded, magics[0]))
        return [rounded, builder.fadd(over, magics[1])]


class _Multiples(_Streams):
    """The instructions of `add_multiples`."""

    def __init__(self, builder: Any, itemsize: int, first: bool, last: bool) -> None:
        super().__init__(builder)
        self._itemsize, self._first, self._last = itemsize, first, last
        self._larger = self.declared(f"llvm.smax.v{self.lanes}i64", self.integers, [self.integers] * 2)
        self._largest = self.declared(f"llvm.vector.reduce.smax.v{self.lanes}i64", self.index, [self.integers])

    def add(self, streams: list[_Stream], factors: Any, total: Any, out: Any, count: Any) -> Any:
        """Add the multiples, and return the bits of the largest magnitude."""
        builder, zeros = self.builder, ir.Constant(self.integers, [0] * self.lanes)
        multiples = [self.spread_at(factors, number) for number in range(len(streams))]

        def several(vectors: int, whole: bool) -> Any:
            def step(i: Any, largest: list[Any]) -> list[Any]:
                for stream in streams if vectors > 1 else ():
                    stream.ask(i)
                for vector in range(vectors):
                    place = builder.add(i, self.index(vector * self.lanes))
                    value = self.zero if self._first else self.load_as_double(self.at(total, place), 8, whole)
                    for stream, factor in zip(streams, multiples, strict=True):
                        value = builder.fadd(value, builder.fmul(factor, stream.load(place, whole)))
                    if self._last:
                        largest = [builder.call(self._larger, [largest[0], self._written(value, out, place, whole)])]
                    else:
                        self._store(value, self.at(total, place), whole)
                return largest

            return step

        end = self.whole_steps(count)
        _, largest = self.loop(STEP, self.index(0), end, [zeros], several(STEP // self.lanes, True))
        _, largest = self.loop(1, end, count, largest, several(1, False))
        return builder.call(self._largest, largest)

    def _written(self, value: Any, out: Any, place: Any, whole: bool) -> Any:
        """Store what was asked for, and return the bits of its magnitude in double precision."""
        builder = self.builder
        if self._itemsize == 4:
            single = builder.fptrunc(value, ir.VectorType(ir.FloatType(), self.lanes))
            self._store(single, self.at(out, place), whole)
            value = builder.fpext(single, self.vector)
        else:
            self._store(value, self.at(out, place), whole)
        magnitude = ir.Constant(self.integers, [0x7FFFFFFFFFFFFFFF] * self.lanes)
        return builder.and_(self.bits(value), magnitude)

    def _store(self, value: Any, place: Any, whole: bool) -> None:
        if whole:
            stored = self.builder.store(value, self.builder.bitcast(place, value.type.as_pointer()))
            stored.align = 8 if value.type == self.vector else 4
        else:
            self.builder.store(self.builder.extract_element(value, self.short(0)), place)
