"""Sums of products that depend neither on how the vectors are cut nor on the number of threads.

Floating-point sums depend on their order.  Here every product is first rounded to a multiple of one *grain*, and
the multiples are added as integers, in any order.  This is reproducible summation (Demmel and Nguyen, "Parallel
reproducible summation", IEEE Trans. Computers 64(7), 2015), with integers instead of floating-point bins, and
with one grain for the whole sum: it follows from the largest magnitudes of the two vectors.

Adding ``magic = 3 * 2^k`` to a product p with ``|p| <= 2^k`` rounds it to a multiple of the grain ``2^(k - 51)``, and
the bits of the result, read as an integer, grow by one with every grain.  A product thus costs an addition and an
integer addition, and loops over them vectorise without any leave to reorder floating-point sums.  A second level
treats what the rounding left over in the same way, with the grain ``2^(k - 103)``.

With ``|x_i| <= X`` and ``|y_i| <= Y``, a sum of one level is off by some ``sqrt(n) 2^-51 X Y``: much less than float32
vectors are, unless they are scaled against one another.  A sum of two levels is off by what the products themselves
were rounded, which for float32 is nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np
from numba import prange

from dbmpi.kernels.compile import Kernel, exact_parallel_kernel, kernel
from dbmpi.kernels.llvm.streams import LANES, add_products
from dbmpi.kernels.llvm.writer import REGISTERS
from dbmpi.kernels.vectors import addresses

Pair = tuple[int, int]

LIMB = 32
LIMBS = 5
"""A sum travels as this many float64 numbers, each of `LIMB` bits, so that an Allreduce adds them exactly."""

LOWEST, HIGHEST = -800, 1000
"""Bounds of k: below, the grain stays where it is; above, there is no sum."""

CHUNK = 2048
"""Elements whose multiples of a grain, each at most 2^51, an int64 can hold the sum of, and as many again."""
BLOCK = CHUNK * LANES
"""Elements that a thread takes at a time: few enough for vectors that are read twice to stay in a cache."""

COARSE, FINE = 1, 2
"""Numbers of levels."""
RIGHTS = {COARSE: 5 if REGISTERS == 32 else 3, FINE: 2}
"""Right vectors of a tile of products: as many as keep the sums in the registers."""


def bound(largest: float) -> int:
    """Return the smallest e with ``largest <= 2^e``, for a finite number that is not negative."""
    mantissa, power = math.frexp(largest)
    return power - (mantissa == 0.5)


def sum_products(
    vectors: Sequence[np.ndarray], pairs: Sequence[Pair], bounds: Sequence[int], levels: int
) -> np.ndarray:
    """Sum the products of several pairs of vectors in one pass over memory.

    Parameters
    ----------
    vectors : sequence of (n,) arrays
        float32 or float64, contiguous, of one length.
    pairs : sequence of (int, int)
        Which vectors to multiply, by their positions in `vectors`.
    bounds : sequence of int
        For every vector an e with ``|x_i| <= 2^e``, the same for all parts of the vectors.
    levels : int
        `COARSE` or `FINE`; float64 vectors need the latter.

    Returns
    -------
    (pairs, LIMBS) float64 array
        The sums over these parts of the vectors: add those of all parts, and give them to `values`.
    """
    plan = _plan(tuple(pairs), tuple(vector.dtype.itemsize for vector in vectors), RIGHTS[levels])
    at, size = addresses(vectors), vectors[0].size
    totals = np.empty((len(plan.products), 4), np.int64)
    for group in plan.groups:
        magic = np.array(
            [3 * 2.0 ** _top(bounds[left], bounds[right]) for left, right in plan.products[group.products]]
        )
        # Whole vectors, although only their types count: a kernel chooses its threads by the sizes of its arguments.
        likes = [
            next(vector for vector in vectors if vector.dtype.itemsize == itemsize) for itemsize in group.itemsizes
        ]
        sums = _sums(levels)(at, *likes, group.tiles, group.pairs, magic, size)
        totals[group.products] = sums.sum(axis=0)
    return to_limbs(totals[plan.wanted])


def sum_magnitudes(vector: np.ndarray, largest: int) -> np.ndarray:
    """Return the limbs of the sum of ``|x_i|`` over `vector`, in two levels, as `sum_products` does.

    `largest` is an e with ``|x_i| <= 2^e``; in `values` the other bound of the pair is 0.
    """
    return to_limbs(_magnitudes(vector, 3 * 2.0 ** _top(largest, 0)).sum(axis=0)[None])


def values(limbs: np.ndarray, bounds: Sequence[Pair]) -> list[float]:
    """Return the sums that rows of added limbs hold, each rounded once; `bounds` are those of the pairs."""
    integers = from_limbs(limbs)
    return [math.ldexp(float(sum_), _top(*pair) - 103) for sum_, pair in zip(integers, bounds, strict=True)]


def doubtful(limbs: np.ndarray, size: int) -> list[bool]:
    """Return which of the sums in `limbs`, of `size` products in one level, may have fewer than 12 correct bits.

    Their errors are some ``2^-51 sqrt(n) |x| |y|`` at most, far below that of float32 vectors; but where vectors are
    scaled against one another, a sum itself may be smaller still.
    """
    least = (1 << 12) * math.sqrt(size)
    return [abs(sum_ >> 52) < least for sum_ in from_limbs(limbs)]


def _top(left: int, right: int) -> int:
    return max(left + right, LOWEST)


def to_limbs(totals: np.ndarray) -> np.ndarray:
    """Write `totals`, sums of two levels as high and low halves, in limbs; all but the last are not negative."""
    limbs = np.zeros((len(totals), LIMBS), np.int64)
    _add_halves(totals, limbs)
    _carry(limbs)
    return limbs.astype(np.float64)


def from_limbs(limbs: np.ndarray) -> list[int]:
    """Return the integers that rows of limbs hold, each of them possibly a sum of many."""
    carried = limbs.astype(np.int64)
    _carry(carried)
    # Now each limb has its 32 bits, and the last one the sign: together a number as processors write it.
    rows = carried.astype(np.uint32).astype("<u4").tobytes()
    size = LIMBS * LIMB // 8
    return [int.from_bytes(rows[at : at + size], "little", signed=True) for at in range(0, len(rows), size)]


@kernel
def _add_halves(totals: np.ndarray, limbs: np.ndarray) -> None:
    """Add the halves to the limbs that their bits belong to: ``high 2^84 + low 2^52 + fine high 2^32 + fine low``."""
    for row in range(len(totals)):
        _add_shifted(limbs[row], 0, totals[row, 3], 0)
        _add_shifted(limbs[row], 1, totals[row, 2], 0)
        _add_shifted(limbs[row], 1, totals[row, 1], 20)
        _add_shifted(limbs[row], 2, totals[row, 0], 20)


@kernel
def _add_shifted(limbs: np.ndarray, first: int, number: int, shift: int) -> None:
    """Add an int64, shifted left by less than a limb, from a limb on."""
    low, high = (number & 0xFFFFFFFF) << shift, (number >> 32) << shift
    limbs[first] += low & 0xFFFFFFFF
    limbs[first + 1] += (low >> 32) + (high & 0xFFFFFFFF)
    limbs[first + 2] += high >> 32


@kernel
def _carry(limbs: np.ndarray) -> None:
    """Reduce every limb but the last to its 32 bits, and carry the rest to the next one."""
    for row in range(len(limbs)):
        for limb in range(LIMBS - 1):
            limbs[row, limb + 1] += limbs[row, limb] >> 32
            limbs[row, limb] &= 0xFFFFFFFF


class _Group(NamedTuple):
    """Products of vectors of two item sizes, as tiles of two left and some right vectors, and as single pairs."""

    itemsizes: tuple[int, int]
    tiles: np.ndarray
    pairs: np.ndarray
    products: slice
    """Where they are among the products of the plan: those of a tile left by left for each right, then the pairs."""


class _Plan(NamedTuple):
    groups: tuple[_Group, ...]
    products: list[Pair]
    wanted: np.ndarray
    """For every pair of the call, its position in `products`."""


@lru_cache(maxsize=64)
def _plan(pairs: tuple[Pair, ...], itemsizes: tuple[int, ...], width: int) -> _Plan:
    """Cover the pairs by tiles of `width` right vectors: many at a time are read faster, and each is read for two."""
    left_over = {_ordered(pair) for pair in pairs}
    tiles: dict[tuple[int, int], list[tuple[int, ...]]] = {}
    alone: dict[tuple[int, int], list[Pair]] = {}
    while left_over:
        lefts = _lefts(left_over, itemsizes)
        rights = sorted(set().union(*(_partners(left_over, left) for left in lefts)))
        for itemsize in sorted({itemsizes[right] for right in rights}):
            kind = itemsizes[lefts[0]], itemsize
            group = [right for right in rights if itemsizes[right] == itemsize]
            while len(group) * len(lefts) > width:
                tiles.setdefault(kind, []).append((lefts[0], lefts[-1], *(group + group[-1:] * width)[:width]))
                group = group[width:]
            rest = [(left, right) for left in lefts for right in group if _ordered((left, right)) in left_over]
            alone.setdefault(kind, []).extend(rest)
        left_over -= {_ordered((left, right)) for left in lefts for right in rights}
    groups, products = [], list[Pair]()
    for kind in sorted(alone):
        first, its_tiles, its_pairs = len(products), tiles.get(kind, []), alone[kind]
        products += [(left, right) for tile in its_tiles for right in tile[2:] for left in tile[:2]] + its_pairs
        shaped = np.array(its_tiles, np.int64).reshape(-1, 2 + width), np.array(its_pairs, np.int64).reshape(-1, 2)
        groups.append(_Group(kind, *shaped, slice(first, len(products))))
    found = {_ordered(pair): position for position, pair in enumerate(products)}
    return _Plan(tuple(groups), products, np.array([found[_ordered(pair)] for pair in pairs], np.int64))


def _ordered(pair: Pair) -> Pair:
    return min(pair), max(pair)


def _partners(pairs: set[Pair], vector: int) -> set[int]:
    return {b if a == vector else a for a, b in pairs if vector in (a, b)}


def _lefts(pairs: set[Pair], itemsizes: tuple[int, ...]) -> tuple[int, ...]:
    """Return the vector that is in most pairs, and the one of its kind that shares most partners with it, if any."""
    counts = Counter(vector for pair in sorted(pairs) for vector in set(pair))
    first = max(counts, key=counts.__getitem__)
    partners = _partners(pairs, first)
    shared = {
        vector: len(partners & _partners(pairs, vector))
        for vector in counts
        if vector != first and itemsizes[vector] == itemsizes[first]
    }
    second = max(shared, key=shared.__getitem__, default=first)
    return (first, second) if shared.get(second, 0) > 1 else (first,)


@kernel
def _bits(number: float) -> np.int64:
    return np.float64(number).view(np.int64)


@kernel
def _add(total: np.ndarray, level: int, bits: np.int64, magic: float, count: int) -> None:
    """Add to a total the grains that `count` sums with `magic` hold; the bits were added modulo 2^64."""
    grains = bits - count * _bits(magic)
    total[2 * level] += grains >> 32
    total[2 * level + 1] += grains & 0xFFFFFFFF


@cache
def _sums(levels: int) -> Kernel[..., np.ndarray]:
    """Return the kernel that sums a group of products in so many levels."""
    width = RIGHTS[levels]

    def sums(
        at: np.ndarray, left: np.ndarray, right: np.ndarray, tiles: np.ndarray, pairs: np.ndarray,
        magic: np.ndarray, size: int,
    ) -> np.ndarray:  # fmt: skip
        """Return int64 (blocks, products, 4): high and low halves of the sums of both levels, in grains."""
        in_tile = 2 * width
        products = in_tile * len(tiles)
        totals = np.zeros((-(-size // BLOCK), products + len(pairs), 4), np.int64)
        for number in prange(len(totals)):
            start, row = number * BLOCK, 4 * number * totals.shape[1]
            count = min(BLOCK, size - start)
            for tile in range(len(tiles)):
                add_products(
                    levels, 2, width, at, tiles, tile * (2 + width), left, right, start, count,
                    magic, tile * in_tile, totals, row + 4 * tile * in_tile,
                )  # fmt: skip
            for pair in range(len(pairs)):
                add_products(
                    levels, 1, 1, at, pairs, 2 * pair, left, right, start, count,
                    magic, products + pair, totals, row + 4 * (products + pair),
                )  # fmt: skip
        return totals

    return exact_parallel_kernel(sums)


@exact_parallel_kernel
def _magnitudes(vector: np.ndarray, magic: float) -> np.ndarray:
    """Return int64 (blocks, 4), as `_sums`."""
    totals = np.zeros((-(-vector.size // CHUNK), 4), np.int64)
    fine = magic * 2.0**-52
    for number in prange(len(totals)):
        x = vector[number * CHUNK : (number + 1) * CHUNK]
        s = t = np.int64(0)
        for i in range(x.size):
            size = abs(np.float64(x[i]))
            rounded = size + magic
            s += _bits(rounded)
            t += _bits(size - (rounded - magic) + fine)
        _add(totals[number], 0, s, magic, x.size)
        _add(totals[number], 1, t, fine, x.size)
    return totals
