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
from dbmpi.kernels.llvm.lanes import transpose_block
from dbmpi.kernels.llvm.tiles import LINES_AHEAD, SHAPES, copy_block, multiply_tile
from dbmpi.kernels.llvm.writer import VECTOR_BYTES, lanes
from dbmpi.kernels.memory import CACHE_LINE, aligned_empty
from dbmpi.machine import caches

Pair = tuple[int, int]

_CACHES = caches.found()
DEPTH = min(128, _CACHES.first * 2 // 3 // (SHAPES[0][1] * VECTOR_BYTES) // 16 * 16)
"""Products summed in registers before a tile is added to `out`: a panel of this depth fits into the first cache."""
BLOCK = max(24, min(192, _CACHES.second // 4 // (4 * DEPTH)))
"""Most rows of `a` that a thread takes at a time: with `DEPTH` columns they fit into the second cache."""
PACKED_BYTES = 4 << 20
"""Size up to which panels are packed at once: a part of the last cache, as every block of `a` passes over them."""
_MOST_PANELS = 8
"""Panels that are finished before the next ones begin, where their part of `out` stays in the second cache."""
_PIECE = 16
"""Rows that a thread packs at a time."""
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
        group = max(2, min(_MOST_PANELS, (_CACHES.second // 2 // out.itemsize - block * DEPTH) // (block * width)))
        sizes = width, block, DEPTH, group
        pack, b = (_pack_rows, b) if b.flags.c_contiguous else (_pack_columns, b.T)
        by_columns = not a.flags.c_contiguous
        multiply, a = _multiply(by_columns, tile_rows, vectors), a.T if by_columns else a
        for left in range(0, panels, columns):
            some = left, min(panels, left + columns)
            for first in range(0, k, rows):
                piece = first, min(k, first + rows)
                pack(b.reshape(-1), piece, some, (k, n), width, packed)
                multiply(a.reshape(-1), packed, out.reshape(-1), (m, n, k), piece, some, sizes, add)

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
    height, whole = last - first, min(right, n // width)
    for piece in prange(-(-height // _PIECE)):
        for row in range(piece * _PIECE, min(height, piece * _PIECE + _PIECE)):
            start = (first + row) * n
            copy_block(b, start + left * width, width, packed, row * width, height * width, whole - left, width)
            if whole < right:
                # Views, because Numba allows for negative indices wherever it cannot see that there are none.
                source = b[start + whole * width :][: n - whole * width]
                target = packed[((whole - left) * height + row) * width :][:width]
                for column in range(source.size):
                    target[column] = source[column]
                for column in range(source.size, width):
                    target[column] = 0


@parallel_kernel
def _pack_columns(b: np.ndarray, rows: Pair, panels: Pair, shape: Pair, width: int, packed: np.ndarray) -> None:
    """As `_pack_rows`, for a `b` whose columns are contiguous: element (row, column) at ``column * k + row``.

    What fills up the last panel is of no account.
    """
    (first, last), (left, right), (k, n) = rows, panels, shape
    vector = VECTOR_BYTES // b.itemsize
    height = last - first
    whole = height // vector * vector
    for number in prange(right - left):
        panel = left + number
        filled = min(width, n - panel * width)
        block = packed[number * height * width :][: height * width].reshape(height, width)
        block[:, filled:] = 0
        columns = np.empty(width, np.int64)
        for column in range(filled):
            columns[column] = (panel * width + column) * k + first
        for start in range(0, whole, vector):
            for column in range(0, filled, vector):
                # fmt: off
                transpose_block(
                    b, start, columns, column, filled - column, vector,
                    packed, (number * height + start) * width + column, width,
                )
                # fmt: on
        for column in range(filled):
            source = b[columns[column] + whole :][: height - whole]
            for row in range(source.size):
                block[whole + row, column] = source[row]


@cache
def _multiply(by_columns: bool, tile_rows: int, vectors: int) -> Kernel[..., None]:
    """Return the product by packed panels, for an `a` whose columns are contiguous or whose rows are."""
    lines_ahead = LINES_AHEAD[tile_rows]

    def multiply(
        a: np.ndarray,
        packed: np.ndarray,
        out: np.ndarray,
        shape: tuple[int, int, int],
        rows: Pair,
        panels: Pair,
        sizes: tuple[int, int, int, int],
        add: bool,
    ) -> None:
        m, n, k = shape
        first, last = rows
        left, right = panels
        width, block, most, group_size = sizes
        line = CACHE_LINE // out.itemsize
        # Columns of a block of `a` are often a multiple of a page apart, where they push one another out of the first
        # cache: they are copied, an odd number of lines apart.
        copied = (-(-block // (2 * line)) * 2 + 1) * line if by_columns else 0
        stride = copied if by_columns else k
        for number in prange(-(-m // block)):
            top, bottom = number * block, min(m, number * block + block)
            strip = np.zeros(tile_rows * most, out.dtype)
            tile = np.empty(tile_rows * width, out.dtype)
            copy = np.zeros(most * copied + line, out.dtype)
            copy = copy[-copy.ctypes.data % CACHE_LINE // out.itemsize :]
            for group in range(left, right, group_size):
                group_end = min(right, group + group_size)
                for start in range(first, last, most):
                    depth, adding = min(most, last - start), add or start > 0
                    if by_columns:
                        copy_block(a, start * m + top, m, copy, 0, copied, depth, bottom - top)
                    # What follows: the next columns of the block, or the next block.
                    next_start, next_group, next_top = start + most, group, top
                    if next_start >= last:
                        next_start, next_group = first, group_end
                        if group_end >= right:
                            next_group, next_top = left, min(bottom, m - block)
                    turn = 0
                    for panel in range(group, group_end):
                        b_start = ((panel - left) * (last - first) + start - first) * width
                        b_follows = b_start + (last - first) * width
                        if panel == group_end - 1:
                            b_follows = ((next_group - left) * (last - first) + next_start - first) * width
                        columns = min(width, n - panel * width)
                        for row in range(top, bottom, tile_rows):
                            quarter = depth // 4 * line
                            b_next = b_follows + min((row - top) // tile_rows * quarter, depth * width - quarter)
                            ahead, ahead_stride = _ahead(
                                by_columns, turn, lines_ahead, line, (m, k), (next_top, next_start), (block, most)
                            )
                            turn += 1
                            a_start = row - top if by_columns else row * k + start
                            out_start = row * n + panel * width
                            height = min(tile_rows, bottom - row)
                            # fmt: off
                            if height == tile_rows and columns == width:
                                multiply_tile(
                                    tile_rows, vectors, by_columns, copy if by_columns else a, a_start, stride,
                                    packed, b_start, b_next, a, ahead, ahead_stride,
                                    out, out_start, n, depth, adding,
                                )
                                continue
                            # At the edges, through a whole tile of our own, and a whole strip of `a`.
                            if by_columns or height == tile_rows:
                                multiply_tile(
                                    tile_rows, vectors, by_columns, copy if by_columns else a, a_start, stride,
                                    packed, b_start, b_next, a, ahead, ahead_stride,
                                    tile, 0, width, depth, False,
                                )
                            else:
                                _copy_strip(a, a_start, k, height, depth, tile_rows, strip)
                                multiply_tile(
                                    tile_rows, vectors, True, strip, 0, tile_rows,
                                    packed, b_start, b_next, a, ahead, ahead_stride,
                                    tile, 0, width, depth, False,
                                )
                            # fmt: on
                            _put_tile(tile, width, height, columns, adding, out, out_start, n)

    return parallel_kernel(multiply)


@inlined
def _ahead(by_columns: bool, turn: int, lines: int, line: int, shape: Pair, corner: Pair, size: Pair) -> Pair:
    """Return where the lines begin that tile number `turn` requests of a block of `a`, and how far apart they are.

    They are `lines` lines in each of a quarter of the block's columns (at a distance of `m`) or of as many rows.
    """
    (m, k), (row, column), (rows, depth) = shape, corner, size
    many = depth // 4
    if by_columns:
        return (column + turn % 4 * many) * m + row + max(0, min(turn // 4 * lines, rows // line - lines)) * line, m
    across = max(1, depth // (lines * line))
    return (row + max(0, min(turn // across * many, rows - many))) * k + column + turn % across * lines * line, k


@inlined
def _copy_strip(
    a: np.ndarray, start: int, stride: int, height: int, depth: int, tile_rows: int, strip: np.ndarray
) -> None:
    """Copy the last rows of `a`, fewer than a tile has, column by column into a strip of `tile_rows`."""
    for column in range(depth):
        for row in range(height):
            strip[column * tile_rows + row] = a[start + row * stride + column]


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
