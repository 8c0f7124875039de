"""Products of bfloat16 numbers in pairs: by tiles of the processor (AMX), or by vectors (AVX512-BF16).

Both instructions sum over pairs of neighbours: an element of the sum takes two products at a time.  Factors are packed
in units of 16 x 16 pairs, 1 KiB, which fill a tile, or 16 vectors.  The unit of a left factor holds 16 rows, each with
the pairs of 32 numbers along the sum; that of a right factor, for each of these pairs, those of 16 columns.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]

from dbmpi.kernels.llvm.writer import FEATURES, Call, Writer, instructions

UNIT = 16
"""Rows, columns or pairs of a unit."""
SIDE = 2 * UNIT
"""Rows and columns of a block of sums, and numbers along the sum that two units of each factor cover."""
CONFIGURATION = bytes([1] + [0] * 15 + [4 * UNIT, 0] * 8 + [0] * 16 + [UNIT] * 8 + [0] * 8)
"""What `configure_tiles` loads: eight tiles of 16 rows of 64 bytes (palette 1)."""
_ROWS = 8
"""Rows of a block that are summed at a time where there are vectors only: with two vectors each, 16 sums."""


@instructions("configuration")
def configure_tiles(call: Call) -> None:
    """Give the tiles of this thread their shape; they are 0 then.

    Arguments of the call
    ---------------------
    configuration : 1-D uint8 array
        `CONFIGURATION`.
    """
    _Pairs(call.builder).call("ldtilecfg", call.pointer("configuration"))


@instructions("")
def release_tiles(call: Call) -> None:
    """Give the tiles of the thread of a `call` back: the system need not keep them when it runs something else."""
    _Pairs(call.builder).call("tilerelease")


@instructions("source start stride target target_start")
def pack_along(call: Call) -> None:
    """Pack 32 rows of 32 numbers that are neighbours along the sum, in two units of a left factor.

    Arguments of the call
    ---------------------
    source : 1-D uint16 array
        Row after row; the first is at `start`, the others `stride` apart.
    target : 1-D float32 array
        Takes the units from `target_start` on; an element is a pair.
    """
    pairs = _Pairs(call.builder)
    pairs.pack_along(call.pointer("source", "start"), call["stride"], call.pointer("target", "target_start"))


@instructions("source start stride target target_start")
def pack_across(call: Call) -> None:
    """Pack 32 numbers along the sum, each with its neighbours in 32 columns, in two units of a right factor.

    Arguments of the call
    ---------------------
    source : 1-D uint16 array
        The columns of one number after those of the other; the first is at `start`, the others `stride` apart.
    target : 1-D float32 array
        Takes the units from `target_start` on; an element is a pair.
    """
    pairs = _Pairs(call.builder)
    pairs.pack_across(call.pointer("source", "start"), call["stride"], call.pointer("target", "target_start"))


@instructions("tiles left left_start right right_start depth out out_start out_stride add", constants="tiles")
def multiply_pairs(call: Call) -> None:
    """Multiply 32 packed rows by 32 packed columns into a block of `out`.

    Products are summed in the order of their places along the sum; numbers too small to be normal count as 0.

    Arguments of the call
    ---------------------
    tiles : constant
        Whether by tiles, which must have been configured, or by vectors.
    left, right : 1-D float32 arrays
        Each of `depth` times two units, from their start on, which is aligned to a cache line; an element is a pair.
    depth : int
        Steps of 32 products: at least 1.
    out : 1-D float32 array
        (32, 32) of its elements, from `out_start` on, whose rows are `out_stride` apart; fastest where all rows are
        aligned to a cache line.
    add : bool
        Go on from the sums in `out`, instead of from 0.
    """
    pairs = _Pairs(call.builder)
    left, right, out = (call.pointer(name, f"{name}_start") for name in ("left", "right", "out"))
    write = pairs.by_tiles if call.constant("tiles") else pairs.by_vectors
    write(left, right, call["depth"], out, call["out_stride"], call["add"])


@instructions("values start count out")
def stream_rounded(call: Call) -> None:
    """Round float32 numbers to bfloat16 past the caches, for what will not be read soon.

    Memory need not deliver the lines then that are overwritten.  What is written afterwards is seen afterwards.

    Arguments of the call
    ---------------------
    values : 1-D float32 array
    start, count : int
        The numbers that are rounded; `count` is a multiple of 32.
    out : 1-D uint16 array
        Takes them from `start` on, which is aligned to a cache line.
    """
    _Pairs(call.builder).stream_rounded(call.pointer("values", "start"), call["count"], call.pointer("out", "start"))


CHAINS = 16
"""Independent sums of `pair_chains` by vectors; those by tiles are 4."""
CHAIN_OPERATIONS = {True: 4 * 2 * UNIT * UNIT * SIDE, False: CHAINS * 2 * SIDE}
"""Operations of a round of `pair_chains`, by tiles and by vectors."""


@instructions("tiles sample rounds", constants="tiles", result="sample")
def pair_chains(call: Call) -> Any:
    """Sum products of pairs for `rounds` rounds without any memory: the fastest that a core computes.

    Arguments of the call
    ---------------------
    tiles : constant
        Whether by tiles, which must have been configured, or by vectors.
    sample : float32
        Start value of the sums by vectors.
    rounds : int
        Length of each chain.

    Returns
    -------
    float
        One element of the sums by vectors, so that the compiler cannot omit them; otherwise `sample`.
    """
    pairs = _Pairs(call.builder)
    start, rounds = pairs.spread(call["sample"]), call["rounds"]

    def by_tiles(_: Any, carried: list[Any]) -> list[Any]:
        for tile in range(4):
            pairs.call("tdpbf16ps", tile, 4 + tile // 2, 6 + tile % 2)
        return carried

    def by_vectors(_: Any, carried: list[Any]) -> list[Any]:
        return [pairs.dot(total, start, start) for total in carried]

    if call.constant("tiles"):
        pairs.loop(1, pairs.index(0), rounds, [], by_tiles)
        return call["sample"]
    _, sums = pairs.loop(1, pairs.index(0), rounds, [start] * CHAINS, by_vectors)
    return pairs.builder.extract_element(reduce(pairs.builder.fadd, sums, start), pairs.short(0))


class _BrainFloat(ir.Type):  # type: ignore[misc]
    """LLVM's type of a bfloat16 number."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BrainFloat)

    def __hash__(self) -> int:
        return hash(_BrainFloat)


class _Pairs(Writer):
    """The instructions of the functions above."""

    def __init__(self, builder: Any) -> None:
        super().__init__(builder, 4)
        self._byte = ir.IntType(8)

    def call(self, name: str, *arguments: Any) -> None:
        """Call the instruction on tiles `name`: numbers are those of tiles."""
        given = [self._byte(one) if isinstance(one, int) else one for one in arguments]
        address = self._byte.as_pointer()
        given = [self.builder.bitcast(one, address) if isinstance(one.type, ir.PointerType) else one for one in given]
        function = self.declared(f"llvm.x86.{name}", ir.VoidType(), [one.type for one in given])
        self.builder.call(function, given)

    def along(self, depth: Any, carried: list[Any], steps: Callable[[Any, list[Any]], list[Any]]) -> list[Any]:
        """Loop over the units of the sum: `steps` takes where they begin and the carried vectors."""
        size = 2 * UNIT * UNIT
        stop = self.builder.mul(depth, self.index(size))
        return self.loop(size, self.index(0), stop, carried, steps)[1]

    def dot(self, total: Any, one: Any, other: Any) -> Any:
        """Return the vector `total` and the products of pairs, summed within each lane."""
        pairs = ir.VectorType(_BrainFloat(), SIDE)
        function = self.declared("llvm.x86.avx512bf16.dpbf16ps.512", self.vector, [self.vector, pairs, pairs])
        return self.builder.call(function, [total, *(self.builder.bitcast(factor, pairs) for factor in (one, other))])

    def stream_rounded(self, values: Any, count: Any, out: Any) -> None:
        """Write `stream_rounded`."""
        builder, whole = self.builder, ir.VectorType(self.short, SIDE)
        past_caches = builder.module.add_metadata([self.short(1)])

        def constant(value: int) -> Any:
            return ir.Constant(whole, [value] * SIDE)

        def steps(i: Any, _: list[Any]) -> list[Any]:
            kind = ir.VectorType(self.element, SIDE)
            value = builder.load(builder.bitcast(self.at(values, i), kind.as_pointer()))
            value.align = 4
            bits = builder.bitcast(value, whole)
            to_even = builder.and_(builder.lshr(bits, constant(16)), constant(1))
            nearest = builder.add(builder.add(bits, constant(0x7FFF)), to_even)
            nearest = builder.select(
                builder.fcmp_unordered("uno", value, value), builder.or_(bits, constant(0x400000)), nearest
            )
            upper = builder.trunc(builder.lshr(nearest, constant(16)), ir.VectorType(ir.IntType(16), SIDE))
            stored = builder.store(upper, builder.bitcast(self.at(out, i), upper.type.as_pointer()))
            stored.align = 2 * SIDE
            stored.set_metadata("nontemporal", past_caches)
            return []

        self.loop(SIDE, self.index(0), count, [], steps)
        if "+sse2" in FEATURES:
            builder.call(self.declared("llvm.x86.sse.sfence", ir.VoidType(), []), [])
        else:
            builder.fence("seq_cst")

    def pack_along(self, source: Any, stride: Any, target: Any) -> None:
        """Write `pack_along`."""
        for number in range(SIDE):
            row = self.at(source, self.builder.mul(stride, self.index(number)))
            self.store(self.builder.bitcast(self.numbers(row, SIDE), self.vector), self.at(target, UNIT * number))

    def pack_across(self, source: Any, stride: Any, target: Any) -> None:
        """Write `pack_across`: interleave two rows."""
        for pair in range(UNIT):
            one = self.at(source, self.builder.mul(stride, self.index(2 * pair)))
            both = [self.numbers(row, SIDE) for row in (one, self.at(one, stride))]
            for half in range(2):
                order = [n + side for n in range(half * UNIT, half * UNIT + UNIT) for side in (0, SIDE)]
                woven = self.builder.bitcast(self.shuffle(both[0], both[1], order), self.vector)
                self.store(woven, self.at(target, UNIT * (UNIT * half + pair)))

    def numbers(self, pointer: Any, count: int) -> Any:
        """Return `count` numbers at `pointer`."""
        kind = ir.VectorType(ir.IntType(16), count)
        value = self.builder.load(self.builder.bitcast(pointer, kind.as_pointer()))
        value.align = 2
        return value

    def by_tiles(self, left: Any, right: Any, depth: Any, out: Any, out_stride: Any, add: Any) -> None:
        """Write `multiply_pairs` by tiles: 0 to 3 have the sums, 4 and 5 rows, 6 and 7 columns."""
        builder, line, across = self.builder, self.index(4 * UNIT), self.builder.mul(out_stride, self.index(4))
        below = self.at(out, builder.mul(out_stride, self.index(UNIT)))
        corners = [self.at(row, column) for row in (out, below) for column in (0, UNIT)]

        def steps(start: Any, _: list[Any]) -> list[Any]:
            units = [self.at(one, start, UNIT * UNIT * half) for one in (left, right) for half in range(2)]
            for tile, products in ((4, []), (6, [(0, 4, 6)]), (7, [(1, 4, 7)]), (5, [(2, 5, 6), (3, 5, 7)])):
                self.call("tileloadd64", tile, units[tile - 4], line)
                for product in products:
                    self.call("tdpbf16ps", *product)
            return []

        with builder.if_else(builder.icmp_signed("!=", add, add.type(0))) as (adding, replacing):
            with adding:
                for tile, corner in enumerate(corners):
                    self.call("tileloadd64", tile, corner, across)
            with replacing:
                for tile in range(4):
                    self.call("tilezero", tile)
        self.along(depth, [], steps)
        for tile, corner in enumerate(corners):
            self.call("tilestored64", tile, corner, across)

    def by_vectors(self, left: Any, right: Any, depth: Any, out: Any, out_stride: Any, add: Any) -> None:
        """Write `multiply_pairs` by vectors: some rows after the other."""
        builder = self.builder
        adding = builder.icmp_signed("!=", add, add.type(0))
        for top in range(0, SIDE, _ROWS):
            half, row = divmod(top, UNIT)

            def steps(start: Any, sums: list[Any], half: int = half, row: int = row) -> list[Any]:
                rows = self.at(left, start, UNIT * (UNIT * half + row))
                columns = [self.at(right, start, UNIT * UNIT * side) for side in range(2)]
                for pair in range(UNIT):
                    of_columns = [self.load(self.at(one, UNIT * pair), 4 * UNIT) for one in columns]
                    of_rows = [self.spread_at(rows, UNIT * n + pair) for n in range(_ROWS)]
                    factors = [(one, other) for one in of_rows for other in of_columns]
                    sums = [self.dot(total, *both) for total, both in zip(sums, factors, strict=True)]
                return sums

            lines = self.strided(self.at(out, builder.mul(out_stride, self.index(top))), out_stride, _ROWS)
            targets = [self.at(line, column) for line in lines for column in (0, UNIT)]
            before = [builder.select(adding, self.load(target), self.zero) for target in targets]
            for target, total in zip(targets, self.along(depth, before, steps), strict=True):
                self.store(total, target)
