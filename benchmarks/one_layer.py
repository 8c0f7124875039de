"""One layer of ours as a contestant: one_layer.py THREADS BATCH KIND CHANNELS ROWS COLUMNS SIZE STRIDE MAPS.

The arguments of the peer ``peers/layers.py``.  MAPS counts for layers that have maps of their own.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import common

if TYPE_CHECKING:
    from dbmpi.network.layer import Layer


class Case(NamedTuple):
    """A layer to be measured."""

    kind: str
    inputs: tuple[int, int, int]
    size: int = 1
    stride: int = 1
    maps: int = 0

    def __str__(self) -> str:
        """Describe it in a table."""
        window = f" of {self.size}x{self.size}" if self.size > 1 else ""
        stride = f", stride {self.stride}" if self.stride > 1 else ""
        maps = f", {self.inputs[0]} to {self.maps} maps" if self.maps else ""
        return f"{self.kind}{window}{stride}{maps}"

    def contestants(self, batch: int) -> tuple[common.Contestant, common.Contestant]:
        """Start ours and PyTorch's, with one thread each."""
        numbers = [str(number) for number in (*self.inputs, self.size, self.stride, self.maps)]
        arguments = ("1", str(batch), self.kind, *numbers)
        return (
            common.Contestant((sys.executable, __file__, *arguments)),
            common.Contestant((common.peers_python(), common.PEERS / "layers.py", *arguments)),
        )

    def layer(self) -> Layer:
        """Return our layer."""
        from dbmpi.network.convolution import Convolution
        from dbmpi.network.dropout import Dropout
        from dbmpi.network.local import Local
        from dbmpi.network.normalisation import Normalisation
        from dbmpi.network.pooling import Pooling

        if self.kind == "dropout":
            return Dropout(self.kind, self.inputs, 0.5)
        if self.kind == "normalisation":
            return Normalisation(self.kind, self.inputs, self.size)
        window = (self.size, self.size)
        if self.kind == "local":
            return Local(self.kind, self.inputs, self.maps, window, self.stride)
        if self.kind == "convolution":
            return Convolution(self.kind, self.inputs, self.maps, window, self.stride)
        return Pooling(self.kind, self.inputs, self.kind, window, self.stride)


def main() -> None:
    """Serve forward and backward passes."""
    batch, kind, (*inputs, size, stride, maps) = int(sys.argv[2]), sys.argv[3], map(int, sys.argv[4:10])
    common.prepare_runtime()
    import numpy as np

    from dbmpi.kernels.memory import aligned_empty
    from dbmpi.network.layer import Context
    from dbmpi.partition.boxes import Box

    layer = Case(kind, (inputs[0], inputs[1], inputs[2]), size, stride, maps).layer()
    box, context, random = Box.whole(layer.output_shape), Context(), np.random.default_rng(1)
    inner, outer = ((*shape, batch) for shape in (layer.input_box(box).shape, layer.output_shape))
    below, below_gradient, above, above_gradient = map(aligned_empty, (inner, inner, outer, outer))
    below[...] = random.normal(size=inner)
    parameters = {short: aligned_empty(tensor.shape) for short, tensor in layer.tensors.items()}
    parameter_gradient = {short: aligned_empty(tensor.shape) for short, tensor in layer.tensors.items()}
    for values in parameters.values():
        values[...] = 0.01 * random.standard_normal(values.shape, np.float32)

    def forward() -> None:
        layer.forward(box, parameters, below, above, context)

    def backward() -> None:
        layer.backward(box, parameters, below, above, above_gradient, parameter_gradient, below_gradient, context)

    def step() -> None:
        forward()
        backward()

    def prepared(action: common.Action) -> common.Action:
        """Fill the gradient first, which a layer may overwrite; it is not the layer that pays for that."""

        def run() -> Mapping[str, Any]:
            above_gradient[...] = 1
            return action()

        return run

    moved = 2 * (below.nbytes + above.nbytes)
    common.serve(
        step=prepared(common.timed(step)),
        forward=common.timed(forward),
        backward=prepared(common.timed(backward)),
        copy=common.copy_bandwidth(64),
        peak=common.fma_peak(),
        work=lambda: {"bytes": moved, "flops": layer.flops(box, batch)},
    )


if __name__ == "__main__":
    main()
