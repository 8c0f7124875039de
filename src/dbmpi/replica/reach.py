"""Which inputs the outputs of a layer need, and where among the inputs they belong."""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from dbmpi.errors import UserError
from dbmpi.index.boxes import Box
from dbmpi.network.own import calling

if TYPE_CHECKING:
    from dbmpi.network.layer import Layer


def needed_box(layer: Layer, output: Box) -> Box:
    """Return the inputs that a box of outputs needs: none for an empty box.

    Raises
    ------
    UserError
        If the layer (a user's own) asks for inputs that it does not have.
    """
    whole = Box.whole(layer.input_shape)
    if output.empty:
        return Box(whole.starts, whole.starts)
    with calling(layer.name, f"asked what its outputs {output} need"):
        need: Any = layer.input_box(output)
    if not isinstance(need, Box):
        raise UserError(
            f"layer {layer.name!r}: input_box returns {type(need).__name__} for its outputs {output}; expected a Box"
        )
    if len(need.starts) != len(whole.starts) or need.empty or not whole.holds(need):
        raise UserError(
            f"layer {layer.name!r}: for its outputs {output}, of shape {tuple(layer.output_shape)}, it asks for "
            f"the inputs {need}, but its inputs have shape {tuple(layer.input_shape)}; expected a box within them"
        )
    return need


class Reach:
    """Which inputs the outputs of a layer need along each axis, for layers whose inputs have as many axes as outputs.

    Every output is given a *home* among the inputs: the one at the same relative place, or the nearest to it that
    keeps halos smallest.  Whoever owns its home computes an output.  As homes are in order along every axis, boxes of
    inputs that cover everything once give boxes of outputs that do, too.  Where boxes are no smaller than fields, and
    fields no smaller than their stride, no other cut along an axis needs fewer values from others.

    Parameters
    ----------
    layer
        Its needs along one axis are taken not to depend on the other axes; if they do, boxes are valid but less good.
    """

    def __init__(self, layer: Layer) -> None:
        self.name = layer.name
        whole = Box.whole(layer.output_shape)
        self._starts: list[list[int]] = []
        self._stops: list[list[int]] = []
        self._homes: list[list[int]] = []
        for axis, (outputs, inputs) in enumerate(zip(layer.output_shape, layer.input_shape, strict=True)):
            slabs = (
                Box(
                    (*whole.starts[:axis], y, *whole.starts[axis + 1 :]),
                    (*whole.stops[:axis], y + 1, *whole.stops[axis + 1 :]),
                )
                for y in range(outputs)
            )
            needs = [needed_box(layer, slab) for slab in slabs]
            starts, stops = [need.starts[axis] for need in needs], [need.stops[axis] for need in needs]
            homes = [_home((2 * y + 1) * inputs // (2 * outputs), y, starts, stops) for y in range(outputs)]
            self._starts.append(starts)
            self._stops.append(stops)
            self._homes.append(list(accumulate(homes, max)))

    def follow(self, box: Box) -> Box:
        """Return the outputs whose homes are in a box of inputs."""
        return Box(
            tuple(bisect_left(homes, start) for homes, start in zip(self._homes, box.starts, strict=True)),
            tuple(bisect_left(homes, stop) for homes, stop in zip(self._homes, box.stops, strict=True)),
        )

    def needed(self, output: Box) -> Box:
        """Return the inputs that a box of outputs needs, which is not empty."""
        return Box(
            tuple(starts[start] for starts, start in zip(self._starts, output.starts, strict=True)),
            tuple(stops[stop - 1] for stops, stop in zip(self._stops, output.stops, strict=True)),
        )


def _home(place: int, y: int, starts: list[int], stops: list[int]) -> int:
    """Return the input along an axis whose owner computes output `y`.

    Let inputs be cut at c, and outputs ``0 ... y - 1`` belong to the lower side.  That needs ``stops[y - 1] - c``
    values of the upper side, which needs ``c - starts[y]`` of the lower, or none where a difference is negative.  The
    sum is smallest where neither is.  Places from which this holds whatever side `y` is on are as good as each other;
    if there are none, the middle of what `y` needs divides best.  At the ends, outputs are taken to go on as they do.
    """
    start, stop = starts[y], stops[y]
    if len(starts) == 1:
        return min(max(place, start), stop - 1)
    following = starts[y + 1] if y + 1 < len(starts) else 2 * start - starts[y - 1]
    before = stops[y - 1] if y > 0 else 2 * stop - stops[1]
    low, high = max(start, following - 1), min(stop - 1, before)
    return min(max(place, low), high) if low <= high else (start + stop) // 2
