"""Where the fields of filters lie in arrays of inputs, and how the work on them is cut into blocks and bands."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from dbmpi.kernels.compile import inlined
from dbmpi.kernels.llvm.writer import REGISTERS, lanes

DEPTH = 384
"""Most rows of a field that are multiplied in one go: with two vectors each they fit into the first cache."""
MAPS = 8 if REGISTERS == 32 else 4
"""Most maps in a block, whose sums stay in registers."""
MAPS_OF_WIDE = 6
"""And in one with four vectors of samples for each."""
BY_ROWS = "uvc"
"""Axes of a filter whose elements in one row of the field lie together."""


class Blocks(NamedTuple):
    """Maps or rows in blocks of nearly equal height: `tall` blocks of `height`, then `short` blocks of one less."""

    height: int
    tall: int
    short: int
    vectors: int
    """Vectors of samples that a block is multiplied by at a time, so that its sums do not wait for one another."""

    @classmethod
    def of(cls, maps: int, most: int = MAPS) -> Blocks:
        """Cut `maps` maps into as few blocks as possible, of at most `most` maps."""
        number = -(-maps // most)
        height = -(-maps // number)
        short = number * height - maps
        return cls(height, number - short, short, 2 if height > 4 or REGISTERS < 32 else 4)

    @classmethod
    def of_tied(cls, maps: int, samples: int, itemsize: int) -> Blocks:
        """Cut `maps` maps for filters that stay in the caches, and rows of `samples` elements of `itemsize` bytes.

        Blocks of fewer maps with four vectors of samples take longer pieces of these, which is faster where samples
        fill four vectors as well as two.  (With filters of its own at every position it is slower.)
        """
        blocks = cls.of(maps)
        if REGISTERS < 32 or blocks.vectors == 4 or -(-samples // (2 * lanes(itemsize))) % 2 == 1:
            return blocks
        return cls.of(maps, MAPS_OF_WIDE)._replace(vectors=4)

    @property
    def heights(self) -> tuple[int, int]:
        """Heights of tall and short blocks; 0 where there are no short ones."""
        return self.height, self.height - 1 if self.short else 0

    @property
    def numbers(self) -> tuple[int, int]:
        """How many blocks of each height there are."""
        return self.tall, self.short

    @property
    def tile(self) -> tuple[int, int, int]:
        """The constants of a kernel: the heights and the vectors."""
        return (*self.heights, self.vectors)


class Field(NamedTuple):
    """Where the elements of a field lie in inputs (channels, height, width, samples); in the order of the weights."""

    offsets: np.ndarray
    """Positions (depth,) relative to the first element of the field, int64."""
    beyond: np.ndarray
    """Positions (channels x rows,) of the column right of the field, the next field's last one at stride 1; int64."""


@lru_cache(maxsize=256)
def field_of(order: str, shape: tuple[int, int], input_shape: tuple[int, int, int, int]) -> Field:
    """Return the field of an array of inputs.

    Parameters
    ----------
    order : str
        Axes of a filter, slowest first: a permutation of ``c`` (channel), ``u`` (row) and ``v`` (column).
    shape : tuple[int, int]
        Rows and columns of the field.
    input_shape : tuple[int, int, int, int]
    """
    channels, height, width, samples = input_shape
    axes = {"c": np.arange(channels), "u": np.arange(shape[0]), "v": np.arange(shape[1])}
    grid = dict(zip(order, np.meshgrid(*(axes[axis] for axis in order), indexing="ij"), strict=True))
    offsets = ((grid["c"] * height + grid["u"]) * width + grid["v"]) * samples
    beyond = offsets[grid["v"] == shape[1] - 1] + samples
    return Field(offsets.reshape(-1).astype(np.int64), beyond.astype(np.int64))


def flat(array: np.ndarray) -> np.ndarray:
    """Return an array as one axis, without a copy; a ValueError says if that cannot be."""
    contiguous(array)
    return array.reshape(-1)


def contiguous(*arrays: np.ndarray) -> None:
    """Refuse arrays with gaps.

    Raises
    ------
    ValueError
        If an array is not C-contiguous.
    """
    for array in arrays:
        if not array.flags.c_contiguous:
            raise ValueError(f"given an array {array.shape} with strides {array.strides}, expected a C-contiguous one")


@inlined
def piece_of(depth: int) -> int:
    """Return how many of a field's `depth` rows to multiply in one go: nearly equal pieces."""
    pieces = -(-depth // DEPTH)
    return -(-depth // pieces)


@lru_cache(maxsize=256)
def bands_of(out_height: int, height: int, field_height: int, stride: int, number: int) -> np.ndarray:
    """Cut the rows of the inputs into bands that about equally many rows of fields reach into.

    Parameters
    ----------
    out_height, height : int
        Rows of the outputs and of the inputs.
    field_height, stride : int
        Rows of a field, and from one field to the next.
    number : int
        How many bands.

    Returns
    -------
    (number + 1,) int64 array
        First row of each band, and the end.
    """
    load = np.zeros(height)
    for i in range(out_height):
        load[i * stride : i * stride + field_height] += 1
    wanted = np.linspace(0, load.sum(), number + 1)[1:-1]
    return np.concatenate(([0], np.searchsorted(np.cumsum(load), wanted), [height])).astype(np.int64)
