"""Products of bfloat16 matrices with float32 sums, made for a long factor and the short rows of a batch.

Both factors are packed in the units of :mod:`dbmpi.kernels.llvm.pairs`.  The short one is packed first, in parts that
stay in the second cache; the long one passes by, 32 of its rows at a time.  Numbers that are neighbours along the sum
are pairs already where they are neighbours in memory; of a factor that lies the other way, two rows are interleaved,
which makes units of a right factor at once.  So where the long factor lies that way, it is made the right one, and
blocks of the sums are transposed.

An element of `out` is summed in the same order for every size of the other dimensions and any number of threads.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numba import prange

from dbmpi.kernels.compile import THREADS, Kernel, at_most, inlined, parallel_kernel
from dbmpi.kernels.llvm.lanes import transpose_block
from dbmpi.kernels.llvm.pairs import (
    CONFIGURATION,
    SIDE,
    UNIT,
    configure_tiles,
    multiply_pairs,
    pack_across,
    pack_along,
    release_tiles,
)
from dbmpi.kernels.memory import CACHE_LINE, aligned_empty
from dbmpi.machine import caches

DEPTH = 8
"""Steps of 32 products that are summed before a block goes back to memory: what a strip takes fits the first cache."""
BLOCK = 8
"""Most strips of 32 rows that a thread takes at a time where the long factor's columns are contiguous.

It reads a part of each row of memory then; a factor whose rows are contiguous is read strip by strip.
"""
SMALL = 1 << 23
"""Multiplications up to which a product is done by one thread: it takes less time than to wake others."""
PACKED_BYTES = caches.found().second * 5 // 8
"""Size up to which the short factor is packed at once: it stays in the second cache, beside what passes by."""
_STEP = 2 * UNIT * UNIT
"""Pairs of a step of 32 rows by 32 products: two units."""
_PLACES = np.arange(0, _STEP, UNIT)
"""Where the rows of two units begin."""
_BLOCK = SIDE * SIDE
"""Sums of a block."""
_TURNS = 4
"""Blocks of sums in turn."""
_LINES = np.arange(0, SIDE * SIDE, SIDE)
"""Where the rows of a block of sums begin."""


class PairedProduct:
    """Products of bfloat16 matrices; the packed factor is kept between calls.

    One object must not be used by two threads at once.

    Parameters
    ----------
    tiles : bool
        Whether the processor's tiles compute, or its vectors.
    """

    def __init__(self, tiles: bool) -> None:
        self._multiply = {across: _multiply(tiles, across) for across in (False, True)}
        self._packed = np.empty(0, np.float32)
        self._configuration = np.frombuffer(CONFIGURATION, np.uint8)

    def __call__(self, a: np.ndarray, b: np.ndarray, out: np.ndarray, add: bool = False) -> None:
        """Write ``a @ b`` into `out`, or add it to what is there.

        Parameters
        ----------
        a, b : (m, k) and (k, n) uint16 arrays
            The bits of bfloat16 numbers; C- or F-contiguous.
        out : (m, n) float32 array
            C-contiguous; must not overlap the others.
        """
        (m, k), n = a.shape, b.shape[1]
        steps, panels = -(-k // SIDE), -(-n // SIDE)
        most = max(1, PACKED_BYTES // (4 * _STEP))  # steps that are packed at once
        # Another piece of columns reads `a` once more, another piece of the sum reads and writes `out`.
        if steps > 4 * panels and most >= panels * DEPTH:
            some, columns = min(steps, most // panels // DEPTH * DEPTH), panels
        else:
            some, columns = steps, min(panels, max(1, most // steps))
        if self._packed.size < some * columns * _STEP:
            self._packed = aligned_empty(some * columns * _STEP)
        across = not a.flags.c_contiguous
        b_across = b.flags.c_contiguous
        strips = -(-m // SIDE)
        block = -(-strips // (-(-strips // (BLOCK * THREADS)) * THREADS)) if across else 1
        a_flat, b_flat = (one.reshape(-1, order="A") for one in (a, b))
        with at_most(THREADS if strips > 1 and m * n * k > SMALL else 1):
            for left in range(0, panels, columns):
                which = left, min(panels, left + columns)
                for first in range(0, steps, some):
                    depth = first, min(steps, first + some)
                    # Rows that lie along the sum are a left factor as they are, those that lie across it a right one.
                    _pack_all(b_flat, (n, k), which, depth, b_across, b_across == across, self._packed)
                    self._multiply[across](
                        *(a_flat, self._packed, out.reshape(-1), (m, n, k), which, depth, block),
                        *(add, self._configuration),
                    )


@inlined
def _pack(
    source: np.ndarray,
    shape: tuple[int, int],
    panels: tuple[int, int],
    depth: tuple[int, int],
    across: bool,
    turned: bool,
    buffer: np.ndarray,
    packed: np.ndarray,
    start: int,
) -> None:
    """Pack the `panels` [first, last), each of 32 rows, in two units for each step of `depth`, filled up with zeros.

    Parameters
    ----------
    source : 1-D uint16 array
        Numbers of a matrix (rows, numbers along the sum) of this `shape`, row after row, or if `across` the other way.
    turned : bool
        Whether the units are to be transposed.
    buffer : 1-D float32 array
        Of two units, for those that are transposed.
    packed : 1-D float32 array
        Takes the units from `start` on.
    """
    rows, length = shape
    first, last = depth
    left, right = panels
    stride = rows if across else length
    for number in range((last - first) * (right - left)):
        # In the order of memory: number after number, or row after row.
        if across:
            step, panel = first + number // (right - left), left + number % (right - left)
        else:
            step, panel = first + number % (last - first), left + number // (last - first)
        height, count = min(SIDE, rows - panel * SIDE), min(SIDE, length - step * SIDE)
        begin = step * SIDE * stride + panel * SIDE if across else panel * SIDE * stride + step * SIDE
        at = start + ((panel - left) * (last - first) + step - first) * _STEP
        target, place = (buffer, 0) if turned else (packed, at)
        if height == SIDE and count == SIDE:
            _pack_units(source, begin, stride, across, target, place)
        else:
            edge = np.zeros(SIDE * SIDE, np.uint16)
            lines, width = (count, height) if across else (height, count)
            for line in range(lines):
                for n in range(width):
                    edge[line * SIDE + n] = source[begin + line * stride + n]
            _pack_units(edge, 0, SIDE, across, target, place)
        if turned:
            for half in range(0, _STEP, UNIT * UNIT):
                transpose_block(buffer, half, _PLACES, 0, UNIT, UNIT, packed, at + half, UNIT)


@inlined
def _pack_units(source: np.ndarray, start: int, stride: int, across: bool, packed: np.ndarray, place: int) -> None:
    """Pack 32 rows by 32 numbers as they lie: see `pack_across` and `pack_along`."""
    if across:
        pack_across(source, start, stride, packed, place)
    else:
        pack_along(source, start, stride, packed, place)


@parallel_kernel
def _pack_all(
    source: np.ndarray,
    shape: tuple[int, int],
    panels: tuple[int, int],
    depth: tuple[int, int],
    across: bool,
    turned: bool,
    packed: np.ndarray,
) -> None:
    """Pack the `panels` [first, last), each of 32 rows, one after the other; see `_pack`."""
    left, right = panels
    for number in prange(right - left):
        buffer = np.empty(_STEP, np.float32)
        start = number * (depth[1] - depth[0]) * _STEP
        _pack(source, shape, (left + number, left + number + 1), depth, across, turned, buffer, packed, start)


@cache
def _multiply(tiles: bool, across: bool) -> Kernel[..., None]:
    """Return the product by a packed factor, for an `a` whose rows are contiguous, or whose columns are (`across`)."""

    def multiply(
        a: np.ndarray,
        packed: np.ndarray,
        out: np.ndarray,
        shape: tuple[int, int, int],
        panels: tuple[int, int],
        depth: tuple[int, int],
        block: int,
        add: bool,
        configuration: np.ndarray,
    ) -> None:
        m, n, k = shape
        left, right = panels
        first, last = depth
        stretch = DEPTH if across else last - first
        strips = (m + SIDE - 1) // SIDE
        for number in prange((strips + block - 1) // block):
            if tiles:
                configure_tiles(configuration)
            top, bottom = number * block, min(strips, number * block + block)
            # Blocks that are done at once take turns, so that none waits for the copy of the one before.
            blocks = (bottom - top) * (right - left) if last - first > DEPTH else _TURNS
            sums, rows = _aligned(blocks * _BLOCK), _aligned(block * stretch * _STEP)
            begin, end = first, first  # what is packed of the strips
            for start in range(first, last, DEPTH):
                stop = min(last, start + DEPTH)
                adding = add or start > 0
                if start == end:
                    begin, end = start, min(last, start + stretch)
                    _pack(a, (m, k), (top, bottom), (begin, end), across, False, sums, rows, 0)
                for strip in range(top, bottom):
                    here = ((strip - top) * (end - begin) + start - begin) * _STEP
                    height = min(SIDE, m - strip * SIDE)
                    for panel in range(left, right):
                        there = ((panel - left) * (last - first) + start - first) * _STEP
                        width = min(SIDE, n - panel * SIDE)
                        target = strip * SIDE * n + panel * SIDE
                        if not across and height == SIDE and width == SIDE:
                            multiply_pairs(tiles, rows, here, packed, there, stop - start, out, target, n, adding)
                            continue
                        # Through a block of our own, which stays until the end.
                        own = ((strip - top) * (right - left) + panel - left) % blocks * _BLOCK
                        if adding and start == first:
                            _get(out, target, n, height, width, across, sums, own)
                        if across:
                            multiply_pairs(tiles, packed, there, rows, here, stop - start, sums, own, SIDE, adding)
                        else:
                            multiply_pairs(tiles, rows, here, packed, there, stop - start, sums, own, SIDE, adding)
                        if stop == last:
                            _put(sums, own, height, width, across, out, target, n)
            if tiles:
                release_tiles()

    return parallel_kernel(multiply)


@inlined
def _aligned(size: int) -> np.ndarray:
    """Return an uninitialised float32 array that starts at a cache line."""
    memory = np.empty(size + UNIT, np.float32)
    return memory[-memory.ctypes.data % CACHE_LINE // 4 :][:size]


@inlined
def _get(
    out: np.ndarray, start: int, stride: int, height: int, width: int, turned: bool, sums: np.ndarray, own: int
) -> None:
    """Copy a block of at most 32 x 32 sums from `out`, where it begins at `start`, to `own` in `sums`; turn it."""
    for row in range(height):
        for column in range(width):
            sums[own + (column * SIDE + row if turned else row * SIDE + column)] = out[start + row * stride + column]


@inlined
def _put(
    sums: np.ndarray, own: int, height: int, width: int, turned: bool, out: np.ndarray, start: int, stride: int
) -> None:
    """Copy a block of sums to `out`, as `_get` has copied it."""
    if turned and height == SIDE and width == SIDE:
        for corner in range(4):
            row, column = corner // 2 * UNIT, corner % 2 * UNIT
            transpose_block(sums, own + column, _LINES, row, UNIT, UNIT, out, start + column * stride + row, stride)
        return
    for row in range(height):
        for column in range(width):
            out[start + row * stride + column] = sums[own + (column * SIDE + row if turned else row * SIDE + column)]
