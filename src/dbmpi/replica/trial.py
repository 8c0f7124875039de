"""Trying a user's own layer on a few outputs, as workers would use it, before a long run depends on it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from dbmpi.errors import UserError
from dbmpi.index.boxes import Box
from dbmpi.kernels import bfloat16
from dbmpi.kernels.bfloat16_filters import rounded_copy
from dbmpi.network.layer import Arrays, Backward, Context, Forward, InParts, takes_parts
from dbmpi.network.own import calling
from dbmpi.replica.cut import needed_box, needed_tensor_box
from dbmpi.replica.operands import Operands

if TYPE_CHECKING:
    from dbmpi.network.layer import Layer

_SAMPLES = 3
_SIDE = 2  # outputs along each axis
_VALUES = 16  # initial values that are checked
_SAME = 1e-3  # relative


def try_layer(layer: Layer, dtype: np.dtype[np.floating], *, rounded: bool = False) -> None:
    """Compute outputs and gradients of small boxes of a layer, in `dtype`, and check them.

    If it is to multiply bfloat16, it is given what it multiplies `rounded`.

    Boxes that it asks for must lie within its inputs and tensors.  It must write its results into the arrays that it is
    given for them, change no other array, and compute the same outputs however they are cut.

    Raises
    ------
    UserError
        If not; names the layer, the result and the expectation.
    """
    whole = Box.whole(layer.output_shape)
    needed_box(layer, whole)
    for short, tensor in layer.tensors.items():
        if (part := needed_tensor_box(layer, short, whole)) != Box.whole(tensor.shape):
            raise UserError(
                f"layer {layer.name!r}: all of its outputs together need {part} of {short!r}, which has shape "
                f"{tensor.shape}; expected all of it"
            )
    for number, short in enumerate(layer.tensors):
        _try_initial(layer, short, number, dtype)
    for box in sorted({*_boxes(layer.output_shape)}, key=lambda box: box.starts):
        outputs = _try_box(layer, box, dtype, rounded)
        one = Box(box.starts, tuple(start + 1 for start in box.starts))
        alone, within = _try_box(layer, one, dtype, rounded), outputs[one.slices(box)]
        if not _same(alone, within, outputs):
            raise UserError(
                f"layer {layer.name!r} computes {alone.ravel()[0]} for its outputs {one} alone and "
                f"{within.ravel()[0]} as a part of {box}: outputs must not depend on how they are cut"
            )


def _boxes(shape: tuple[int, ...]) -> Iterator[Box]:
    """Yield small boxes in the first corner, the middle, and the last corner."""
    for starts in (
        tuple(0 for _ in shape),
        tuple(max(n // 2 - 1, 0) for n in shape),
        tuple(max(n - _SIDE, 0) for n in shape),
    ):
        yield Box(starts, tuple(min(start + _SIDE, n) for start, n in zip(starts, shape, strict=True)))


def _try_initial(layer: Layer, short: str, number: int, dtype: np.dtype[np.floating]) -> None:
    """Check that initial values are numbers, and do not depend on the part that is asked for."""
    size = min(layer.tensors[short].size, _VALUES)
    values, part = np.full(size, np.nan, dtype), np.full(size - size // 2, np.nan, dtype)
    with calling(f"layer {layer.name!r}", f"asked for initial values of {short!r}"):
        layer.initial(short, values, 1, number, 0)
        layer.initial(short, part, 1, number, size // 2)
    _check(layer, f"initial({short!r})", "out", values)
    if not np.array_equal(values[size // 2 :], part):
        raise UserError(
            f"layer {layer.name!r}: the initial values of {short!r} from {size // 2} on are others than those from 0 "
            "on; expected values that depend on the seed and their position only"
        )


def _try_box(layer: Layer, box: Box, dtype: np.dtype[np.floating], rounded: bool) -> np.ndarray:
    """Compute the outputs of a box and all gradients, and return the outputs."""
    context = Context(training=False)
    need = needed_box(layer, box)
    needed = {short: needed_tensor_box(layer, short, box) for short in layer.tensors}
    with calling(f"layer {layer.name!r}", f"asked for the operations for its outputs {box}"):
        flops: Any = layer.flops(box, _SAMPLES, input_gradient=True)
    if not isinstance(flops, int | float | np.number):
        raise UserError(f"layer {layer.name!r}: flops returns {type(flops).__name__}; expected a number of operations")
    # Positive, as some functions are defined for such numbers only; at each position always the same.
    inputs = _numbers(need, _SAMPLES, dtype)
    parameters: Arrays = {short: _numbers(part, 0, dtype) for short, part in needed.items()}
    below, of_tensors = np.empty_like(inputs), {short: np.empty_like(values) for short, values in parameters.items()}
    parameters = Operands((rounded,)).of(0, parameters)
    inputs = rounded_copy(inputs) if rounded else inputs
    read = [inputs, *parameters.values()]
    before = [array.copy() for array in read]
    outputs = _unwritten(layer, box, dtype)
    shapes = f"for inputs of shape {inputs.shape} and outputs of shape {outputs.shape}"
    task = Forward(box, parameters, inputs, outputs, context)
    with calling(f"layer {layer.name!r}", f"forward is called {shapes}"):
        returned: Any = layer.forward(task)  # type: ignore[func-returns-value]
    if isinstance(layer, InParts):
        _try_parts(layer, task)
    _check(layer, "forward", "outputs", outputs, returned)
    for input_gradient in (None, np.full_like(below, np.nan)):
        gradient = _unwritten(layer, box, dtype)
        gradient[...] = 1
        of_parameters = {short: np.full_like(values, np.nan) for short, values in of_tensors.items()}
        task = Backward(box, parameters, inputs, outputs.copy(), context, gradient, of_parameters, input_gradient)
        task.rounded_gradient = np.empty(gradient.shape, bfloat16.BFLOAT16) if rounded else None
        with calling(f"layer {layer.name!r}", f"backward is called {shapes}"):
            returned = layer.backward(task)  # type: ignore[func-returns-value]
        if input_gradient is not None:
            _check(layer, "backward", "input_gradient", input_gradient, returned)
        for short, values in of_parameters.items():
            _check(layer, "backward", f"parameter_gradient[{short!r}]", values)
    if not all(map(np.array_equal, read, before)):
        raise UserError(f"layer {layer.name!r} changes its inputs or parameters; expected that it only reads them")
    return outputs


def _try_parts(layer: Layer, task: Forward) -> None:
    """Check that outputs computed position by position are those that `task` has computed together."""
    box, outputs = task.output, task.outputs
    parts = np.full_like(outputs, np.nan)
    apart = replace(task, outputs=parts)
    for position in product(*(range(start, stop) for start, stop in zip(box.starts[1:], box.stops[1:], strict=True))):
        part = Box((box.starts[0], *position), (box.stops[0], *(index + 1 for index in position)))
        with calling(f"layer {layer.name!r}", f"forward_part is called for {part} of its outputs {box}"):
            cast(InParts, layer).forward_part(apart, part)
    if not _same(parts, outputs, outputs):
        raise UserError(
            f"layer {layer.name!r}: forward_part computes other outputs for the positions of {box} than forward, "
            f"{parts.dtype} {parts.shape}, or leaves some unwritten"
        )


def _same(some: np.ndarray, others: np.ndarray, outputs: np.ndarray) -> bool:
    """Return whether numbers are the same but for rounding, as is usual for `outputs`; infinite ones are allowed."""
    largest = np.abs(outputs[np.isfinite(outputs)]).max(initial=0)
    return np.allclose(some, others, rtol=_SAME, atol=_SAME * float(largest))


def _check(layer: Layer, method: str, name: str, values: np.ndarray, returned: Any = None) -> None:
    """Check that a method has written the values that it was given by this name, and returned nothing."""
    if returned is not None:
        given = f"{returned.dtype} {returned.shape}" if isinstance(returned, np.ndarray) else type(returned).__name__
        raise UserError(
            f"layer {layer.name!r}: {method} returns {given}; expected nothing, and the result written into {name!r}, "
            f"{values.dtype} {values.shape}"
        )
    left = int(np.isnan(values).sum())
    if left:
        raise UserError(
            f"layer {layer.name!r}: {method} leaves {left} of the {values.size} values of {name!r}, {values.dtype} "
            f"{values.shape}, unwritten or NaN"
        )


def _unwritten(layer: Layer, box: Box, dtype: np.dtype[np.floating]) -> np.ndarray:
    """Return NaN for a box of outputs; as a part of a larger array where a layer takes such."""
    gap = int(takes_parts(layer))
    return np.full((*(n + gap for n in box.shape), _SAMPLES), np.nan, dtype)[(slice(gap, None),) * len(box.shape)]


def _numbers(box: Box, samples: int, dtype: np.dtype[np.floating]) -> np.ndarray:
    """Return numbers between 1/4 and 1 for a box, with `samples` for each position if there are any."""
    shape = (*box.shape, samples) if samples else box.shape
    starts = (*box.starts, 0) if samples else box.starts
    phases = np.zeros(shape)
    for axis, (start, length) in enumerate(zip(starts, shape, strict=True)):
        along = (start + np.arange(length)) * (0.37 + 0.21 * axis)
        phases += along.reshape(-1, *(1,) * (len(shape) - axis - 1))
    values: np.ndarray = (0.625 + 0.375 * np.sin(phases)).astype(dtype)
    return values
