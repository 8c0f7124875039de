"""Local contrast normalisation of ``(maps, rows, columns, samples)``: its passes over rows.

The Gaussian window is a product of one for rows and one for columns, and the same for all maps: maps are summed first,
then rows, then columns.  Arrays may be any parts of a layer; the terms of a sum and their order are the same in all of
them.  Loops over the samples, which lie side by side, vectorise; loops over rows are shared by the
threads.

Regions of a pass are rows and columns (first row, first column) by which an array lies within a larger one.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from dbmpi.kernels.compile import inlined, parallel_kernel
from dbmpi.kernels.elementary import add, copy
from dbmpi.kernels.memory import SAFE, Rows


@parallel_kernel
def sum_maps(inputs: np.ndarray, total: np.ndarray) -> None:
    """Set `total` (rows, columns, samples) to the sum of `inputs` (maps, rows, columns, samples) over the maps."""
    maps, rows = inputs.shape[0], inputs.shape[1]
    flat, sums = inputs.reshape(maps, rows, -1), total.reshape(rows, -1)
    for row in prange(rows):
        copy(sums[row], flat[0, row])
        for m in range(1, maps):
            add(sums[row], flat[m, row])


@parallel_kernel
def smooth(
    field: np.ndarray,
    first_rows: np.ndarray,
    row_weights: np.ndarray,
    first_columns: np.ndarray,
    column_weights: np.ndarray,
    result: np.ndarray,
) -> None:
    """Compute a weighted sum of rows and then of columns for each position.

    Parameters
    ----------
    field : array (rows, columns, samples)
    first_rows, first_columns : int64 arrays (result rows,) and (result columns,)
        Index in `field` of the first position that each result sums; may be outside of `field` where weights are zero.
    row_weights, column_weights : arrays (result rows, window) and (result columns, window)
        Weights of the positions from there on; where they are zero, `field` is not read.
    result : array (result rows, result columns, samples)
        Overwritten.
    """
    rows, columns, samples = result.shape
    flat = field.reshape(field.shape[0], -1)
    for row in prange(rows):
        sums = np.zeros(flat.shape[1], field.dtype)
        for offset in range(row_weights.shape[1]):
            weight = row_weights[row, offset]
            if weight != 0:
                _add_scaled(sums, weight, flat[first_rows[row] + offset])
        for column in range(columns):
            output = result[row, column]
            output[:] = 0
            for offset in range(column_weights.shape[1]):
                weight = column_weights[column, offset]
                if weight != 0:
                    start = (first_columns[column] + offset) * samples
                    _add_scaled(output, weight, sums[start : start + samples])


@parallel_kernel
def sum_centred_squares(
    inputs: np.ndarray, first_row: int, first_column: int, mean: np.ndarray, total: np.ndarray
) -> None:
    """Set `total` to the sum over the maps of ``(inputs - mean)**2``.

    Parameters
    ----------
    inputs : array (maps, more rows, more columns, samples)
    first_row, first_column : int
        Row and column of `inputs` where `mean` starts.
    mean : array (rows, columns, samples)
    total : array (rows, columns, samples)
        Overwritten.
    """
    rows, columns, samples = mean.shape
    flat = inputs.reshape(inputs.shape[0], inputs.shape[1], -1)
    start, stop = first_column * samples, (first_column + columns) * samples
    means, sums = mean.reshape(rows, -1), total.reshape(rows, -1)
    for row in prange(rows):
        average, squares = means[row], sums[row]
        squares[:] = 0
        for m in range(inputs.shape[0]):
            values = flat[m, first_row + row, start:stop]
            for i in range(values.size):
                centred = values[i] - average[i]
                squares[i] += centred * centred


@parallel_kernel
def deviation(variance: np.ndarray, floor: float) -> bool:
    """Replace a variance by its root, or by `floor` where that is larger; NaN stays NaN.

    Infinity becomes NaN, so that quotients are not silently zero.

    Returns
    -------
    bool
        Whether all of them, but for NaN, are `SAFE`.
    """
    least, small, large = variance.dtype.type(floor), variance.dtype.type(1 / SAFE), variance.dtype.type(SAFE)
    nothing, infinite = variance.dtype.type(np.nan), variance.dtype.type(np.inf)
    rows = variance.shape[0]
    unsafe = np.zeros(rows, np.uint8)
    for row in prange(rows):
        values = variance[row].reshape(-1)
        found = np.uint8(0)
        for i in range(values.size):
            root = np.sqrt(values[i])
            root = least if root < least else root
            values[i] = nothing if root == infinite else root
            found |= np.uint8((root > large) | (root < small))
        unsafe[row] = found
    return not unsafe.any()


@parallel_kernel
def normalise(
    inputs: np.ndarray,
    input_start: tuple[int, int, int],
    mean: np.ndarray,
    mean_start: tuple[int, int],
    divisor: np.ndarray,
    maps: int,
    output_rows: Rows,
) -> None:
    """Compute ``(inputs - mean) / divisor``.

    Parameters
    ----------
    inputs : array (maps, rows, columns, samples)
    input_start : (int, int, int)
        Map, row and column of `inputs` where the outputs start.
    mean : array (rows, columns, samples)
    mean_start : (int, int)
        Row and column of `mean` where the outputs start.
    divisor : array (output rows, output columns, samples)
    maps : int
        Maps of the outputs.
    output_rows
        The outputs (maps, output rows, output columns, samples) as :func:`dbmpi.kernels.memory.rows_of` gives them.
    """
    outputs, output_steps = output_rows
    rows, columns, samples = divisor.shape
    first_map, first_row, first_column = input_start
    for line in prange(maps * rows):
        m, row = line // rows, line % rows
        values = inputs[first_map + m, first_row + row, first_column : first_column + columns].reshape(-1)
        average = mean[mean_start[0] + row, mean_start[1] : mean_start[1] + columns].reshape(-1)
        below = divisor[row].reshape(-1)
        output = outputs[m * output_steps[0] + row * output_steps[1] :][: columns * samples]
        for i in range(output.size):
            output[i] = (values[i] - average[i]) / below[i]


@parallel_kernel
def divide_gradient(
    maps: int,
    output_rows: Rows,
    gradient_rows: Rows,
    divisor: np.ndarray,
    floor: float,
    of_squares: np.ndarray,
    total: np.ndarray,
) -> None:
    """Divide the gradient by the divisor, and compute the gradient that passes through the divisor.

    Parameters
    ----------
    maps : int
        Maps of the outputs.
    output_rows, gradient_rows
        Both (maps, rows, columns, samples), as :func:`dbmpi.kernels.memory.rows_of` gives them; the gradient is
        overwritten with ``gradient / divisor``.
    divisor : array (rows, columns, samples)
    floor : float
        Where the divisor is not above it, it does not depend on the inputs.
    of_squares : array (rows, columns, samples)
        Overwritten with the gradient for half the smoothed sum of squares.
    total : array (rows, columns, samples)
        Overwritten with the sum over the maps of ``gradient / divisor``.
    """
    (outputs, output_steps), (gradient, gradient_steps) = output_rows, gradient_rows
    rows, columns, samples = divisor.shape
    zero, least = gradient.dtype.type(0), gradient.dtype.type(floor)
    for row in prange(rows):
        below, squares, sums = divisor[row].reshape(-1), of_squares[row].reshape(-1), total[row].reshape(-1)
        squares[:] = 0
        sums[:] = 0
        for m in range(maps):
            output = outputs[m * output_steps[0] + row * output_steps[1] :][: columns * samples]
            values = gradient[m * gradient_steps[0] + row * gradient_steps[1] :][: columns * samples]
            for i in range(values.size):
                quotient = values[i] / below[i]
                values[i] = quotient
                sums[i] += quotient
                squares[i] += quotient * output[i]
        for i in range(squares.size):
            squares[i] = -squares[i] / below[i] if below[i] > least else zero


@parallel_kernel
def sum_centred_gradient(
    of_squares: np.ndarray,
    total_inputs: np.ndarray,
    input_start: tuple[int, int],
    mean: np.ndarray,
    maps: int,
    divided: np.ndarray,
    divided_start: tuple[int, int],
    total: np.ndarray,
) -> None:
    """Compute the sum over the maps of the gradient for the centred inputs.

    Parameters
    ----------
    of_squares, mean, total : arrays (rows, columns, samples)
        The smoothed gradient for the squares; the local mean; the result, overwritten.
    total_inputs : array (more rows, more columns, samples)
        Sum of the inputs over the maps; the others lie within it at `input_start`.
    divided : array (fewer rows, fewer columns, samples)
        Sum over the maps of gradient / divisor; lies within the others at `divided_start`.
    """
    rows, columns, samples = total.shape
    count = total.dtype.type(maps)
    height, width = divided.shape[0], divided.shape[1]
    for row in prange(rows):
        left = input_start[1]
        sums = total_inputs[input_start[0] + row, left : left + columns].reshape(-1)
        average, factor, result = mean[row].reshape(-1), of_squares[row].reshape(-1), total[row].reshape(-1)
        for i in range(result.size):
            result[i] = factor[i] * (sums[i] - count * average[i])
        inner = row - divided_start[0]
        if 0 <= inner < height:
            start = divided_start[1] * samples
            add(result[start : start + width * samples], divided[inner].reshape(-1))


@parallel_kernel
def input_gradient(
    inputs: np.ndarray,
    mean: np.ndarray,
    mean_start: tuple[int, int],
    of_squares: np.ndarray,
    of_mean: np.ndarray,
    divided_rows: Rows,
    divided_shape: tuple[int, int, int],
    divided_start: tuple[int, int, int],
    result: np.ndarray,
) -> None:
    """Add up the three ways by which the outputs depend on the inputs.

    Parameters
    ----------
    inputs, result : arrays (maps, rows, columns, samples)
        `result` is overwritten.
    mean, of_squares : arrays (fewer rows, fewer columns, samples)
        The local mean and the smoothed gradient for the squares; lie within `inputs` at `mean_start`.
    of_mean : array (rows, columns, samples)
        The smoothed sum over the maps of the gradient for the centred inputs.
    divided_rows
        gradient / divisor, as :func:`dbmpi.kernels.memory.rows_of` gives it.
    divided_shape, divided_start : (int, int, int)
        Its maps, rows and columns, and where among those of `inputs` they start.
    """
    divided, divided_steps = divided_rows
    maps, rows, _, samples = inputs.shape
    for line in prange(maps * rows):
        m, row = line // rows, line % rows
        target, values, subtracted = (
            result[m, row].reshape(-1),
            inputs[m, row].reshape(-1),
            of_mean[row].reshape(-1),
        )
        for i in range(target.size):
            target[i] = -subtracted[i]
        inner = row - mean_start[0]
        if 0 <= inner < mean.shape[0]:
            start = mean_start[1] * samples
            average, factor = mean[inner].reshape(-1), of_squares[inner].reshape(-1)
            part, value = target[start : start + average.size], values[start : start + average.size]
            for i in range(part.size):
                part[i] += factor[i] * (value[i] - average[i])
        inner_map, inner = m - divided_start[0], row - divided_start[1]
        if 0 <= inner_map < divided_shape[0] and 0 <= inner < divided_shape[1]:
            start = divided_start[2] * samples
            quotient = divided[inner_map * divided_steps[0] + inner * divided_steps[1] :][: divided_shape[2] * samples]
            add(target[start : start + quotient.size], quotient)


@inlined
def _add_scaled(total: np.ndarray, factor: float, values: np.ndarray) -> None:
    for i in range(total.size):
        total[i] += factor * values[i]
