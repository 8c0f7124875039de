"""Passes over many long vectors at once, which prefetch every cache line while they compute with earlier ones.

Memory is as fast as the number of lines that are in flight.  A processor predicts only a few streams, and each of them
only within a page: of seven vectors, read a page or two at a time, it predicts too little.  A loop that prefetches
each line itself, some lines ahead, needs the vectors' instructions written out, because LLVM's compiler vectorises no
such loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types

from dbmpi.kernels.llvm.writer import Call, Writer, instructions, lanes
from dbmpi.kernels.memory import CACHE_LINE

AHEAD = 32 * CACHE_LINE
"""Bytes that are prefetched in advance: from 1 to 3 KB the speed is the same for pages of many vectors."""
STEP = CACHE_LINE // 4
"""Elements of a step of a loop."""
LANES = lanes(8)
"""Sums that are kept apart."""


@instructions(
    "levels lefts rights at positions first left right start count magic magic_start totals totals_start",
    constants="levels lefts rights",
)
def add_products(call: Call) -> None:
    """Add the products of some left and right vectors, in grains, to totals: see :mod:`dbmpi.kernels.sums`.

    Products are added one right vector after the other, and for each the left ones in turn.  Indices are not checked.

    Arguments of the call
    ---------------------
    levels, lefts, rights : constants
        1 or 2 levels of grains; numbers of vectors.
    at, positions : int64 arrays
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
    grains, lefts = _Grains(call.builder, call.constant("levels")), call.constant("lefts")
    itemsizes = [call.itemsize("left")] * lefts + [call.itemsize("right")] * call.constant("rights")
    streams = grains.streams(call.pointer("at"), call.pointer("positions", "first"), itemsizes, call["start"])
    magic, totals = call.pointer("magic", "magic_start"), call.pointer("totals", "totals_start")
    grains.add(streams, lefts, call["count"], magic, totals)


@instructions(
    "vectors first last at at_start like factors start total out", constants="vectors first last", result=types.int64
)
def add_multiples(call: Call) -> Any:
    """Add multiples of vectors to a total, in their order; return the bits of the largest magnitude of the last sum.

    ``total[i] (+)= sum of factors[at_start + k] * vector k [start + i]`` over the elements of `out`; the last
    sum goes to `out` instead.  Products and sums are rounded each, in double precision.

    Arguments of the call
    ---------------------
    vectors, first, last : constants
        Number of vectors; whether the total starts as 0; whether the sum goes to `out`.
    at : int64 array
        Addresses, from `at_start` on.
    like : 1-D array
        Of the dtype of the vectors.
    factors : float64 array
    total : 1-D float64 array
    out : 1-D array, float32 or float64
        It may be a part of one of the vectors.
    """
    builder, vectors = call.builder, call.constant("vectors")
    multiples = _Multiples(builder, call.itemsize("out"), call.constant("first"), call.constant("last"))
    positions = builder.alloca(multiples.index, multiples.index(vectors))
    for k in range(vectors):
        builder.store(builder.add(call["at_start"], multiples.index(k)), multiples.at(positions, k))
    streams = multiples.streams(call.pointer("at"), positions, [call.itemsize("like")] * vectors, call["start"])
    factors = call.pointer("factors", "at_start")
    return multiples.add(streams, factors, call.pointer("total"), call.pointer("out"), call.size("out"))


class _Stream:
    """Where a vector is read."""

    def __init__(self, writer: _Streams, pointer: Any, itemsize: int) -> None:
        self._writer, self._pointer, self._itemsize = writer, pointer, itemsize

    def ask(self, i: Any) -> None:
        """Prefetch the elements of a step, from `AHEAD` bytes after element i on."""
        for line in range(0, STEP * self._itemsize, CACHE_LINE):
            offset = self._writer.builder.add(i, self._writer.index((AHEAD + line) // self._itemsize))
            self._writer.prefetch(self._writer.builder.gep(self._pointer, [offset]))  # the end may be nearer

    def load(self, i: Any, whole: bool) -> Any:
        """Return as doubles the elements from i on; or element i alone, and zeros."""
        address = self._writer.at(self._pointer, i)
        return self._writer.load_as_double(address, self._itemsize, whole)


class _Streams(Writer):
    """Writes instructions on vectors of doubles that are read from float32 or float64."""

    def __init__(self, builder: Any) -> None:
        super().__init__(builder, 8)
        self.integers = ir.VectorType(self.index, self.lanes)

    def streams(self, at: Any, positions: Any, itemsizes: Sequence[int], start: Any) -> list[_Stream]:
        """Return the vectors whose addresses are at some positions in `at`, from element `start` on."""
        found = []
        for number, itemsize in enumerate(itemsizes):
            address = self.builder.load(self.at(at, self.builder.load(self.at(positions, number))))
            kind = ir.FloatType() if itemsize == 4 else ir.DoubleType()
            found.append(_Stream(self, self.at(self.builder.inttoptr(address, kind.as_pointer()), start), itemsize))
        return found

    def load_as_double(self, address: Any, itemsize: int, whole: bool) -> Any:
        """Return a vector of doubles; unless it is whole, with one element and zeros."""
        if whole:
            kind = self.vector if itemsize == 8 else ir.VectorType(ir.FloatType(), self.lanes)
            value = self.builder.load(self.builder.bitcast(address, kind.as_pointer()))
            value.align = itemsize
            return value if itemsize == 8 else self.builder.fpext(value, self.vector)
        single = self.builder.load(address)
        single = single if itemsize == 8 else self.builder.fpext(single, self.element)
        return self.builder.insert_element(self.zero, single, self.short(0))

    def bits(self, value: Any) -> Any:
        """Return the bits of doubles as integers."""
        return self.builder.bitcast(value, self.integers)

    def whole_steps(self, count: Any) -> Any:
        """Return how many of `count` elements whole steps take."""
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
                    position = builder.add(i, self.index(vector * self.lanes))
                    values = {stream: stream.load(position, whole) for stream in streams[:lefts]}
                    grains = []
                    for number, (left, right) in enumerate(pairs):
                        if right not in values:
                            values[right] = right.load(position, whole)
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
        taken = self.spread(taken, self.integers)
        half, low = (ir.Constant(self.integers, [value] * self.lanes) for value in (32, 0xFFFFFFFF))
        for number, its in enumerate(magics):
            for level, one in enumerate(its):
                grains = builder.sub(sums[number * self.levels + level], builder.mul(taken, self.bits(one)))
                for part, value in enumerate((builder.ashr(grains, half), builder.and_(grains, low))):
                    address = self.at(totals, 4 * number + 2 * level + part)
                    builder.store(builder.add(builder.load(address), builder.call(self._sum, [value])), address)

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
                    position = builder.add(i, self.index(vector * self.lanes))
                    value = self.zero if self._first else self.load_as_double(self.at(total, position), 8, whole)
                    for stream, factor in zip(streams, multiples, strict=True):
                        value = builder.fadd(value, builder.fmul(factor, stream.load(position, whole)))
                    if self._last:
                        largest = [builder.call(self._larger, [largest[0], self._written(value, out, position, whole)])]
                    else:
                        self._store(value, self.at(total, position), whole)
                return largest

            return step

        end = self.whole_steps(count)
        _, largest = self.loop(STEP, self.index(0), end, [zeros], several(STEP // self.lanes, True))
        _, largest = self.loop(1, end, count, largest, several(1, False))
        return builder.call(self._largest, largest)

    def _written(self, value: Any, out: Any, position: Any, whole: bool) -> Any:
        """Store the sum, and return the bits of its magnitude in double precision."""
        builder = self.builder
        if self._itemsize == 4:
            single = builder.fptrunc(value, ir.VectorType(ir.FloatType(), self.lanes))
            self._store(single, self.at(out, position), whole)
            value = builder.fpext(single, self.vector)
        else:
            self._store(value, self.at(out, position), whole)
        magnitude = ir.Constant(self.integers, [0x7FFFFFFFFFFFFFFF] * self.lanes)
        return builder.and_(self.bits(value), magnitude)

    def _store(self, value: Any, address: Any, whole: bool) -> None:
        if whole:
            stored = self.builder.store(value, self.builder.bitcast(address, value.type.as_pointer()))
            stored.align = 8 if value.type == self.vector else 4
        else:
            self.builder.store(self.builder.extract_element(value, self.short(0)), address)
