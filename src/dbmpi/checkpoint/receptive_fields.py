"""What the units of a network's first layer see: their weights as images where the inputs are images, else as a map.

Values are read in bounded memory, and large images and maps are thinned out evenly.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dbmpi.checkpoint.array_blocks import BLOCK, StoredNumbers

TILES = 100
"""Most units that are shown as images."""
_CHANNELS = 4
"""Most channels of a unit that are shown, side by side."""
_SIDE = 128
"""Most pixels along a side of an image."""
_LARGEST_IMAGE = 2**24
"""Elements of a unit's weights, all of which are read at a time where they are an image."""
_ROWS, _COLUMNS = 512, 1024
"""Most units and inputs of a map."""
_NAME = re.compile(r"(?:.*[/.])?weights?")

Read = Callable[[int, int], np.ndarray]
"""``read(start, stop)`` returns these elements of an array, which the next call may overwrite."""


@dataclass(frozen=True)
class Sheet:
    """Images of units.

    Attributes
    ----------
    tiles : tuple of (rows, columns) arrays
        The units' weights.
    title : str
        What is shown.
    image : bool
        Whether each of the tiles is an image; otherwise there is one, with a row for each unit.
    each : (int, int)
        Rows and columns of the tiles of one unit, which follow one another; of a map, units and inputs for a pixel.
    """

    tiles: tuple[np.ndarray, ...]
    title: str
    image: bool = True
    each: tuple[int, int] = (1, 1)


def first_layer(arrays: Sequence[StoredNumbers]) -> StoredNumbers | None:
    """Return the first weights among the `arrays` of a checkpoint; None where none has that name and several axes."""
    for array in arrays:
        if _NAME.fullmatch(array.name) and len(array.shape) > 1 and array.size:
            return array
    return None


def sheet(name: str, shape: tuple[int, ...], read: Read, input_shape: tuple[int, ...]) -> Sheet:
    """Return the receptive fields of the units of a layer.

    Parameters
    ----------
    name, shape
        Of its weights: (units, inputs) of a dense layer, (maps, channels, rows, columns) of a convolution, or (rows,
        columns, maps, field rows, field columns, channels) of a locally connected one; of others there is a map.
    read
        Returns elements of the weights.
    input_shape
        Of a sample: an image has (rows, columns), (channels, rows, columns) or, with up to four channels, (rows,
        columns, channels).
    """
    units, size = shape[0], math.prod(shape[1:])
    if len(shape) == 6:
        return _local(name, shape, read)
    image = shape[1:] if len(shape) == 4 else input_shape if len(shape) == 2 else ()
    last = len(image) == 3 and len(shape) == 2 and image[2] <= _CHANNELS < image[0]
    if len(image) not in (2, 3) or math.prod(image) != size or size > _LARGEST_IMAGE:
        return _map(name, units, size, read)
    shown = min(units, TILES)
    tiles = []
    for unit in range(shown):
        weights = read(unit * size, (unit + 1) * size).reshape(image)
        tiles.append(_tile(np.moveaxis(weights, 2, 0) if last else weights))
    channels = 1 if len(image) == 2 else image[2 if last else 0]
    pixels = image[:2] if last else image[-2:]
    return Sheet(
        tuple(tiles),
        f"{name}: {_some(shown, units, 'map' if len(shape) == 4 else 'unit')}{_thinned_out(channels, pixels)}",
    )


def _local(name: str, shape: tuple[int, ...], read: Read) -> Sheet:
    """Return filters at evenly spaced positions, as many of each map."""
    rows, columns, maps, *field = shape
    size = math.prod(field)
    shown = min(maps, TILES)
    side = max(1, math.isqrt(TILES // shown))
    seen = _spread(rows, side), _spread(columns, side)
    tiles = []
    for number, row, column in itertools.product(range(shown), *seen):
        start = ((row * columns + column) * maps + number) * size
        tiles.append(_tile(np.moveaxis(read(start, start + size).reshape(field), 2, 0)))
    each = len(seen[0]), len(seen[1])
    where = _some(math.prod(each), rows * columns, "position")
    return Sheet(
        tuple(tiles), f"{name}: {_some(shown, maps, 'map')} at {where}{_thinned_out(field[2], field[:2])}", each=each
    )


def _map(name: str, units: int, size: int, read: Read) -> Sheet:
    """Return the weights as one picture, a row a unit."""
    every, step = -(-units // _ROWS), -(-size // _COLUMNS)
    picture = np.stack(
        [np.concatenate(list(_thinned(read, unit * size, size, step))) for unit in range(0, units, every)]
    )
    thinned = f"every {_th(every)} unit, every {_th(step)} input" if every * step > 1 else ""
    return Sheet((picture,), f"{name}{': ' if thinned else ''}{thinned}", False, (every, step))


def _thinned(read: Read, start: int, size: int, step: int) -> Iterator[np.ndarray]:
    piece = max(1, BLOCK // step) * step
    for first in range(0, size, piece):
        yield read(start + first, start + min(first + piece, size))[::step].copy()


def _tile(weights: np.ndarray) -> np.ndarray:
    """Return an image (rows, columns), or (channels, rows, columns), as one: channels side by side."""
    channels = weights[None] if weights.ndim == 2 else weights[:_CHANNELS]
    step = _step(channels.shape[1:])
    return np.concatenate(list(channels[:, ::step, ::step]), axis=1)


def _some(shown: int, number: int, noun: str) -> str:
    return (
        f"{shown:,} of {number:,} {noun}s"
        if shown < number
        else f"all {number:,} {noun}s"
        if number > 1
        else f"the {noun}"
    )


def _step(image: Sequence[int]) -> int:
    """Return how many rows and columns of an `image` there are for a pixel."""
    return max(1, -(-max(image) // _SIDE))


def _thinned_out(channels: int, image: Sequence[int]) -> str:
    """Say what is shown of an image."""
    which = f"{channels}" if channels <= _CHANNELS else f"the first {_CHANNELS} of {channels}"
    text = f", {which} channels side by side" if channels > 1 else ""
    return text + (f", every {_th(_step(image))} pixel" if _step(image) > 1 else "")


def _spread(length: int, number: int) -> list[int]:
    """Return up to `number` indices of an axis, evenly spaced, one alone in the middle."""
    number = min(length, number)
    return [(2 * place + 1) * length // (2 * number) for place in range(number)]


def _th(number: int) -> str:
    return "" if number == 1 else {2: "2nd", 3: "3rd"}.get(number, f"{number}th")
