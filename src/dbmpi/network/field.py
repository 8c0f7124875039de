"""Layers of filters that see a field of all maps below: locally connected ones, and convolutions."""

from __future__ import annotations

from functools import cached_property
from typing import ClassVar, TypeVar

import numpy as np

from dbmpi import config
from dbmpi.index.boxes import Box
from dbmpi.kernels.bfloat16 import BFLOAT16
from dbmpi.kernels.bfloat16_convolution import RoundedConvolution, pays
from dbmpi.kernels.bfloat16_filters import RoundedFilters, rounded_copy
from dbmpi.kernels.convolution import Tied
from dbmpi.kernels.filters import Filters
from dbmpi.kernels.local import Untied
from dbmpi.network import windows
from dbmpi.network.builtin import Weighted
from dbmpi.network.layer import Arrays, Backward, Forward, InParts, Reconstructing

F = TypeVar("F", bound=config.Local | config.Convolution)


class FieldLayer(Weighted[F], InParts, Reconstructing):
    """A layer of filters, valid borders.

    Inputs are ``(channels, height, width)``, outputs ``(maps, (height - rows) // stride + 1, (width - columns) //
    stride + 1)`` for a field of ``(rows, columns)``.  If the inputs' estimate is a part of the loss, there is a
    ``decoder`` like the weights.
    """

    _kind: ClassVar[type[Filters]]

    def __post_init__(self) -> None:
        windows.check_windows(self.name, "a field", self.field, self.input_shape)

    @cached_property
    def field(self) -> tuple[int, int]:
        """Rows and columns that a filter sees."""
        return windows.rows_and_columns(self.section.field)

    @cached_property
    def _filters(self) -> Filters:
        return self._kind(self.section.stride, self.section.activation)

    @cached_property
    def _linear_filters(self) -> Filters:
        return self._kind(self.section.stride)

    @property
    def reconstruction(self) -> float:
        """Weight of the squared error of the inputs' estimate."""
        return self.section.reconstruction

    @cached_property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of the outputs of one sample."""
        return (self.section.maps, *windows.count(self.input_shape, self.field, self.section.stride))

    @property
    def inputs(self) -> int:
        """Number of inputs of one output."""
        return self.input_shape[0] * self.field[0] * self.field[1]

    @property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        weights, bias = self._filter_shapes
        return {"weights": weights, "bias": bias} | ({"decoder": weights} if self.reconstruction > 0 else {})

    @property
    def _filter_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of the weights and of the bias."""
        raise NotImplementedError

    def input_box(self, output: Box) -> Box:
        """Return the rows and columns of the fields, of all channels."""
        return windows.seen(output, (0, self.input_shape[0]), self.field, self.section.stride)

    def forward(self, task: Forward) -> None:
        """Compute the outputs in a box (see the contract of a layer)."""
        self.forward_part(task, task.output)

    def forward_part(self, task: Forward, part: Box) -> None:
        """Compute a part of the outputs in a box: all of its maps at some positions."""
        rows, columns = ((one.start, one.stop) for one in part.slices(task.output)[1:])
        weights, bias = task.parameters["weights"], task.parameters["bias"]
        _suiting(self._filters, weights).forward(weights, bias, task.inputs, task.outputs, (rows, columns))

    def backward(self, task: Backward) -> None:
        """Compute the gradients of a box (see the contract of a layer)."""
        weights, bias = task.parameter_gradient["weights"], task.parameter_gradient["bias"]
        # The gradient before the activation is a by-product of the parameters'; without an activation it is there now.
        early = self.section.activation == "linear"
        if early:
            self._inputs_backward(task)
        filters = _suiting(self._filters, task.parameters["weights"])
        filters.parameter_gradient(task.inputs, task.outputs, task.gradient, weights, bias)
        if not early:
            self._inputs_backward(task)

    def _inputs_backward(self, task: Backward) -> None:
        if task.input_gradient is not None:
            weights = task.parameters["weights"]
            _suiting(self._filters, weights).input_gradient(weights, task.gradient, task.input_gradient)
            task.inputs_done()

    def reconstruct(self, output: Box, parameters: Arrays, outputs: np.ndarray, estimate: np.ndarray) -> None:
        """Estimate the inputs: every output times its filter of the decoder, added up where fields overlap.

        Parameters
        ----------
        output, parameters, outputs, estimate
            See :class:`dbmpi.network.layer.Reconstructing`.
        """
        decoder = parameters["decoder"]
        _suiting(self._filters, decoder).input_gradient(decoder, outputs, estimate)

    def reconstruct_backward(
        self,
        output: Box,
        parameters: Arrays,
        outputs: np.ndarray,
        estimate_gradient: np.ndarray,
        parameter_gradient: Arrays,
        gradient: np.ndarray,
    ) -> None:
        """Compute the gradients of an estimate (see the contract of a reconstructing layer)."""
        decoder, of_decoder = parameters["decoder"], parameter_gradient["decoder"]
        _suiting(self._filters, decoder).add_sums(decoder, estimate_gradient, gradient)
        # For the decoder, a linear filter, the estimate's gradient is the input and the outputs are the gradient.  (The
        # kernel changes its gradient for other activations only.)
        unused, linear, inputs = np.empty_like(parameters["bias"]), self._linear_filters, estimate_gradient
        if decoder.dtype == BFLOAT16:
            inputs = rounded_copy(estimate_gradient)
        _suiting(linear, decoder).parameter_gradient(inputs, outputs, outputs, of_decoder, unused)


def _suiting(filters: Filters, weights: np.ndarray) -> Filters | RoundedFilters:
    """Return the filters for the precision of their weights, or of a decoder."""
    if weights.dtype != BFLOAT16:
        return filters
    return RoundedConvolution(filters) if pays(filters, weights.shape) else RoundedFilters(filters)


class LocalLayer(FieldLayer[config.Local]):
    """A locally connected layer, whose filters are not shared (Le et al., ICML 2012; the image networks of the paper).

    Weights are ``(rows, columns, maps, field rows, field columns, channels)`` and biases ``(rows, columns, maps)``: the
    parameters of a row of positions lie together, so that those of a box are a few long runs.
    """

    takes_parts: ClassVar[bool] = True
    takes_bfloat16: ClassVar[bool] = True
    _kind: ClassVar[type[Filters]] = Untied

    @property
    def _filter_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        maps, *positions = self.output_shape
        return (*positions, maps, *self.field, self.input_shape[0]), (*positions, maps)

    def tensor_box(self, tensor: str, output: Box) -> Box:
        """Return the filters of the positions and maps in the box."""
        whole = Box.whole(self.tensors[tensor].shape)
        return Box(
            (*output.starts[1:], output.starts[0], *whole.starts[3:]),
            (*output.stops[1:], output.stops[0], *whole.stops[3:]),
        )


class ConvolutionLayer(FieldLayer[config.Convolution]):
    """A convolution (a correlation, as everywhere in the field); valid borders.

    Weights are ``(maps, channels, field rows, field columns)`` and biases ``(maps,)``.  Boxes at different positions
    share the filters of their maps; their gradients for these add up.
    """

    takes_bfloat16: ClassVar[bool] = True
    _kind: ClassVar[type[Filters]] = Tied

    @property
    def _filter_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        maps = self.section.maps
        return (maps, self.input_shape[0], *self.field), (maps,)

    def tensor_box(self, tensor: str, output: Box) -> Box:
        """Return the filters of the maps in the box."""
        whole = Box.whole(self.tensors[tensor].shape)
        return Box((output.starts[0], *whole.starts[1:]), (output.stops[0], *whole.stops[1:]))
