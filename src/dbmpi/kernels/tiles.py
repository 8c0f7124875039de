"""Matrix products in tiles: ``out = a @ b``, made for a long `a` and the short rows of a batch.

The scheme is that of Goto and van de Geijn ("Anatomy of high-performance matrix multiplication", ACM TOMS 34(3),
2008), with the costs of this project's products in mind.  One operand is always as narrow as a batch: it is packed
into panels as wide as a tile of the processor's registers, which costs little.  The other is a weight matrix or as
long as one: it is read where it lies.

An element of `out` is summed in the same order for every size of the other dimensions and any number of threads, so
that a sample's result does not depend on the batch it comes in, nor a unit's on how a layer is cut.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numba import prange

from dbmpi.kernels.compile import THREADS, Kernel, inlined, parallel_kernel
from dbmpi.kernels.llvm.tiles import SHAPES, multiply_tile
from dbmpi.kernels.llvm.writer import lanes
from dbmpi.kernels.memory import aligned_empty

Pair = tuple[int, int]

DEPTH = 128
"""Products summed in registers before a tile is added to `out`: a panel of this depth fits into the first cache."""
BLOCK = 192
"""Most rows of `a` that a thread takes at a time: with `DEPTH` columns they fit into the second cache."""
PACKED_BYTES = 4 << 20
"""Size up to which panels are packed at once: a part of the last cache, as every block of `a` passes over them."""
GROUP = 4
"""Panels that are finished before the next ones begin, so that their part of `out` stays in the second cache."""
_WASTE = 1.13
"""By how much whole tiles may exceed the columns that there are: these are computed, too."""


class TiledProduct:
    """Products of float32 or float64 matrices; the packed panels are kept between calls.

    One object must not be used by two threads at once.
    """

    def __init__(self) -> None:
        self._panels = np.empty(0, np.uint8)

    def __call__(self, a: np.ndarray, b: np.ndarray, out: np.ndarray, add: bool = False) -> None:
        """Write ``a @ b`` into `out`, or add it to what is there.

        Parameters
        ----------
        a : (m, k) array
            C- or F-contiguous.
        b : (k, n) array
            C- or F-contiguous.
        out : (m, n) array
            C-contiguous; must not overlap `a` or `b`.
        """
        (m, k), n = a.shape, b.shape[1]
        tile_rows, vectors = tile_shape(n, out.dtype) or SHAPES[0]
        width = vectors * lanes(out.itemsize)
        panels = -(-n // width)
        pieces = -(-k * panels * width * out.itemsize // PACKED_BYTES)
        # Another piece of columns reads `a` once more, another piece of rows reads and writes `out`.
        rows, columns = (k, -(-panels // pieces)) if k < 2 * n else (-(-k // (pieces * DEPTH)) * DEPTH, panels)
        packed = self._workspace(min(rows, k) * columns * width, out.dtype)
        block = _block(-(-m // tile_rows), BLOCK // tile_rows) * tile_rows
        pack, b = (_pack_rows, b) if b.flags.c_contiguous else (_pack_columns, b.T)
        by_columns = not a.flags.c_contiguous
        multiply, a = _multiply(by_columns, tile_rows, vectors), a.T if by_columns else a
        for left in range(0, panels, columns):
            some = left, min(panels, left + columns)
            for first in range(0, k, rows):
                depth = first, min(k, first + rows)
                pack(b.reshape(-1), depth, some, (k, n), width, packed)
                multiply(a.reshape(-1), packed, out.reshape(-1), (m, n, k), depth, some, (width, block), add)

    def _workspace(self, size: int, dtype: np.dtype) -> np.ndarray:
        size *= dtype.itemsize
        if self._panels.nbytes < size:
            self._panels = aligned_empty(size, np.uint8)
        return self._panels[:size].view(dtype)


def tile_shape(columns: int, dtype: np.dtype) -> tuple[int, int] | None:
    """Return rows and vectors of the widest tiles of `dtype` that `columns` columns nearly fill, or None."""
    for rows, vectors in SHAPES:
        width = vectors * lanes(dtype.itemsize)
        if -(-columns // width) * width <= _WASTE * columns:
            return rows, vectors
    return None


def _block(strips: int, most: int) -> int:
    """Return how many strips make a block, so that all threads have equally many blocks of nearly the same size."""
    blocks = -(-strips // (most * THREADS)) * THREADS
    return -(-strips // blocks)


@parallel_kernel
def _pack_rows(b: np.ndarray, rows: Pair, panels: Pair, shape: Pair, width: int, packed: np.ndarray) -> None:
    """Pack rows and panels [first, last) of `b`, of this shape, in panels of `width` columns, filled up with zeros."""
    (first, last), (left, right), (_, n) = rows, panels, shape
    for number in prange(right - left):
        start = (left + number) * width
        filled = min(width, n - start)
        for row in range(last - first):
            # Views, because Numba allows for negative indices wherever it cannot see that there are none.
            source = b[(first + row) * n + start :][:filled]
            target = packed[(number * (last - first) + row) * width :][:width]
            for column in range(filled):
                target[column] = source[column]
            for column in range(filled, width):
                target[column] = 0


@parallel_kernel
def _pack_columns(b: np.ndarray, rows: Pair, panels: Pair, shape: Pair, width: int, packed: np.ndarray) -> None:
    """As `_pack_rows`, for a `b` whose columns are contiguous: element (row, column) at ``column * k + row``."""
    (first, last), (left, right), (k, n) = rows, panels, shape
    for number in prange(right - left):
        panel = left + number
        filled = min(width, n - panel * width)
        for start in range(0, last - first, 16):  # a cache line of every column at a time
            height = min(16, last - first - start)
            block = packed[(number * (last - first) + start) * width :][: height * width].reshape(height, width)
            for column in range(filled):
                source = b[(panel * width + column) * k + first + start :][:height]
                for row in range(height):
                    block[row, column] = source[row]
            block[:, filled:] = 0


@cache
def _multiply(by_columns: bool, tile_rows: int, vectors: int) -> Kernel[..., None]:
    """Return the product by packed panels, for an `a` whose columns are contiguous or whose rows are."""

    def multiply(
        a: np.ndarray,
        packed: np.ndarray,
        out: np.ndarray,
        shape: tuple[int, int, int],
        rows: Pair,
        panels: Pair,
        sizes: Pair,
        add: bool,
    ) -> None:
        m, n, k = shape
        first, last = rows
        left, right = panels
        width, block = sizes
        row_step, column_step = (1, m) if by_columns else (k, 1)
        for number in prange(-(-m // block)):
            top, bottom = number * block, min(m, number * block + block)
            strip = np.zeros(tile_rows * DEPTH, out.dtype)
            tile = np.empty(tile_rows * width, out.dtype)
            for group in range(left, right, GROUP):
                for start in range(first, last, DEPTH):
                    depth, adding = min(DEPTH, last - start), add or start > 0
                    for panel in range(group, min(right, group + GROUP)):
                        b_start = ((panel - left) * (last - first) + start - first) * width
                        columns = min(width, n - panel * width)
                        for row in range(top, bottom, tile_rows):
                            a_start = row * row_step + start * column_step
                            out_start = row * n + panel * width
                            height = min(tile_rows, bottom - row)
                            # fmt: off
                            if height == tile_rows and columns == width:
                                multiply_tile(
                                    tile_rows, vectors, by_columns, a, a_start, m if by_columns else k,
                                    packed, b_start, out, out_start, n, depth, adding,
                                )
                                continue
                            # At the edges, through a whole tile of our own, and a whole strip of `a`.
                            if height == tile_rows:
                                multiply_tile(
                                    tile_rows, vectors, by_columns, a, a_start, m if by_columns else k,
                                    packed, b_start, tile, 0, width, depth, False,
                                )
                            else:
                                _copy_strip(a, a_start, (row_step, column_step), height, depth, tile_rows, strip)
                                multiply_tile(
                                    tile_rows, vectors, True, strip, 0, tile_rows,
                                    packed, b_start, tile, 0, width, depth, False,
                                )
                            # fmt: on
                            _put_tile(tile, width, height, columns, adding, out, out_start, n)

    return parallel_kernel(multiply)


@inlined
def _copy_strip(
    a: np.ndarray, start: int, steps: Pair, height: int, depth: int, tile_rows: int, strip: np.ndarray
) -> None:
    """Copy the last rows of `a`, fewer than a tile has, column by column into a strip of `tile_rows`."""
    for column in range(depth):
        for row in range(height):
            strip[column * tile_rows + row] = a[start + row * steps[0] + column * steps[1]]


@inlined
def _put_tile(
    tile: np.ndarray, width: int, height: int, columns: int, add: bool, out: np.ndarray, out_start: int, n: int
) -> None:
    """Put the upper left part of a tile to `out`, where it begins at `out_start`."""
    for row in range(height):
        source = tile[row * width :][:columns]
        target = out[out_start + row * n :][:columns]
        for column in range(columns):
            target[column] = target[column] + source[column] if add else source[column]
