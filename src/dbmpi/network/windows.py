"""Windows on the rows and columns of maps, valid borders: the fields of filters, and the windows of pooling.

Shapes of inputs are ``(maps, height, width)``, those of windows ``(rows, columns)``; `stride` is the number of rows,
and of columns, from one window to the next.
"""

from __future__ import annotations

from dbmpi.errors import UserError
from dbmpi.index.boxes import Box


def rows_and_columns(size: int | tuple[int, int]) -> tuple[int, int]:
    """Return the size of a window as a configuration has it: both numbers, or one for a square."""
    return size if isinstance(size, tuple) else (size, size)


def check_maps(layer: str, what: str, input_shape: tuple[int, ...]) -> None:
    """Raise UserError if inputs of `input_shape` have no rows and columns.

    `layer` is the name of the layer, and `what` the part of it that needs them, for the message.
    """
    if len(input_shape) != 3:
        raise UserError(
            f"layer {layer!r}: {what} needs inputs of shape (maps, height, width), and those are of shape "
            f"{input_shape}: it can follow a layer with maps, or images"
        )


def check_windows(layer: str, what: str, size: tuple[int, int], input_shape: tuple[int, ...]) -> None:
    """Raise UserError if the inputs have no rows and columns, or a window is larger than they are.

    Parameters
    ----------
    layer, what : str
        Name of the layer and of its windows, for the message.
    size : (int, int)
        Rows and columns of a window.
    input_shape : tuple[int, ...]
        Of one sample.
    """
    check_maps(layer, what, input_shape)
    if any(window > length for window, length in zip(size, input_shape[1:], strict=True)):
        raise UserError(
            f"layer {layer!r}: {what} of shape {size} does not fit into inputs of shape {input_shape} "
            "(maps, height, width): make it smaller, or the strides below it"
        )


def count(input_shape: tuple[int, ...], size: tuple[int, int], stride: int) -> tuple[int, int]:
    """Return how many rows and columns of windows fit: of `size`, `stride` apart, into inputs of `input_shape`."""
    rows, columns = ((length - window) // stride + 1 for length, window in zip(input_shape[1:], size, strict=True))
    return rows, columns


def seen(output: Box, maps: tuple[int, int], size: tuple[int, int], stride: int) -> Box:
    """Return the box of the inputs that the windows of the outputs in a box cover.

    Parameters
    ----------
    output : Box
        The outputs.
    maps : (int, int)
        First and last (exclusive) map of the inputs.
    size : (int, int)
        Rows and columns of a window.
    stride : int
        Rows, and columns, from one window to the next.
    """
    starts = (start * stride for start in output.starts[1:])
    stops = ((stop - 1) * stride + window for stop, window in zip(output.stops[1:], size, strict=True))
    return Box((maps[0], *starts), (maps[1], *stops))
